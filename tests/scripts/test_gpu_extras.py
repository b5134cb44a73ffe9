"""Which optional kernels `make app` installs, decided by a fake `nvidia-smi`; the installing pip is a fake, too."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LINUX = sys.platform == "linux" and platform.machine() == "x86_64"

pytestmark = pytest.mark.skipif(not LINUX, reason="the ready wheels are for Linux on x86-64")


class Machine:
    """A PATH with the `nvidia-smi` of a test, and packages `torch` and `pip` that shadow the real ones."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.bin, self.packages = folder, folder / "bin", folder / "packages"
        self.bin.mkdir()
        self.torch("2.13.0")
        self.pip("")

    def torch(self, version: str) -> None:
        about = self.packages / "torch-1.dist-info"
        about.mkdir(parents=True, exist_ok=True)
        (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: torch\nVersion: {version}\n")

    def pip(self, then: str) -> None:
        noting = f"import sys; open({str(self.folder / 'asked')!r}, 'a').write(' '.join(sys.argv[1:]) + '\\n')\n"
        (self.packages / "pip.py").write_text(noting + then)

    def nvidia_smi(self, script: str) -> None:
        path = self.bin / "nvidia-smi"
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)

    def run(self) -> subprocess.CompletedProcess[str]:
        environment = os.environ | {"PATH": f"{self.bin}:/usr/bin:/bin", "PYTHONPATH": str(self.packages)}
        command = [sys.executable, "scripts/gpu_extras.py"]
        ended = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60, check=False
        )
        assert ended.returncode == 0, ended.stderr
        return ended

    @property
    def asked(self) -> list[str]:
        """The arguments of each call of pip."""
        path = self.folder / "asked"
        return path.read_text().splitlines() if path.exists() else []


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def test_a_hopper_gpu_gets_flash_attention_3(machine: Machine) -> None:
    machine.nvidia_smi('[ "$*" = "--query-gpu=compute_cap --format=csv,noheader" ] && printf "9.0\\n9.0\\n"')
    assert machine.run().stdout == "Installing fa3-fwd for this GPU (NO_GPU_EXTRAS=1 leaves it out)\n"
    (asked,) = machine.asked
    (line,) = (line for line in (ROOT / "requirements-gpu.txt").read_text().splitlines() if line.startswith("fa3-fwd"))
    assert asked.startswith("install --quiet") and "constraints.txt" in asked and asked.endswith(line)


@pytest.mark.slow
@pytest.mark.parametrize(
    "script",
    ["echo 8.9", "echo 12.0", "echo 'NVIDIA-SMI has failed' >&2; exit 9", "echo '9.0'; exit 1", "echo '[N/A]'"],
    ids=["ada", "blackwell", "no driver", "driver error", "old driver"],
)
def test_another_gpu_or_a_broken_driver_gets_nothing(script: str, machine: Machine) -> None:
    machine.nvidia_smi(script)
    ended = machine.run()
    assert (ended.stdout, ended.stderr, machine.asked) == ("", "", [])


def test_a_machine_without_nvidia_gets_nothing(machine: Machine) -> None:
    ended = machine.run()
    assert (ended.stdout, ended.stderr, machine.asked) == ("", "", [])


@pytest.mark.parametrize(("version", "count"), [("2.13.0+cpu", 0), ("2.13.0+cu126", 0), ("2.13.0+cu130", 1)])
def test_torch_decides_too(version: str, count: int, machine: Machine) -> None:
    machine.nvidia_smi("echo 9.0")
    machine.torch(version)
    machine.run()
    assert len(machine.asked) == count


def test_a_failed_installation_is_a_warning(machine: Machine) -> None:
    machine.nvidia_smi("echo 9.0")
    machine.pip("sys.stderr.write('first\\nERROR: no route to the index\\n'); sys.exit(1)")
    warning = (
        "warning: fa3-fwd could not be installed: ERROR: no route to the index. Everything runs without it, slower.\n"
    )
    assert machine.run().stderr == warning


@pytest.mark.parametrize(("flag", "runs"), [("", True), ("NO_GPU_EXTRAS=1", False)])
@pytest.mark.parametrize("target", ["app", "demo"])
def test_make_runs_it_unless_it_is_told_not_to(target: str, flag: str, runs: bool) -> None:
    """`make --dry-run` only prints what it would do."""
    command = ["make", "--dry-run", "--always-make", target, *([flag] if flag else [])]
    printed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert ("scripts/gpu_extras.py" in printed) is runs
