"""Install the optional kernels of requirements-gpu.txt that have a ready wheel for this machine's GPU.

`make app` and `make demo` run it once after they install requirements.txt; NO_GPU_EXTRAS=1 leaves it out. Nothing needs
these kernels, so a failure is a warning and the exit code is always 0. Needs the standard library only.
"""

from __future__ import annotations

import importlib.metadata
import platform
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

READY = {"fa3-fwd": {"9.0"}}
"""Package and the compute capabilities that its wheel is built for; 9.0 is Hopper (H100, H200). The wheel is for Linux
on x86-64 and CUDA 13. Packages that build from source are not listed: they need nvcc and take many minutes."""


def main() -> None:
    packages = wanted(compute_capabilities(), torch_build())
    if not packages:
        return
    names = ", ".join(packages)
    sys.stdout.write(f"Installing {names} for this GPU (NO_GPU_EXTRAS=1 leaves it out)\n")
    sys.stdout.flush()
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    ended = subprocess.run(
        [*command, "-c", str(ROOT / "constraints.txt"), *packages.values()], capture_output=True, text=True, check=False
    )
    if ended.returncode:
        reason = (ended.stderr.strip().splitlines() or ["no message"])[-1]
        sys.stderr.write(f"warning: {names} could not be installed: {reason}. Everything runs without it, slower.\n")


def wanted(capabilities: set[str], build: str) -> dict[str, str]:
    """Return {package: its line in requirements-gpu.txt} for GPUs of these compute capabilities.

    `build` is the local part of torch's version: empty for the one on PyPI, else "cpu", "cu126" …
    """
    if (sys.platform, platform.machine()) != ("linux", "x86_64") or not re.fullmatch(r"(cu13\d)?", build):
        return {}
    lines = (ROOT / "requirements-gpu.txt").read_text("utf-8").splitlines()
    found = {re.split(r"[^\w-]", line)[0]: line for line in lines if line and not line.startswith("#")}
    return {name: found[name] for name, built_for in READY.items() if capabilities & built_for}


def compute_capabilities() -> set[str]:
    """Return those of the NVIDIA GPUs here, as in {"9.0"}; an empty set without a GPU or a driver."""
    command = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    try:
        ended = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return set()
    return set(ended.stdout.split()) if ended.returncode == 0 else set()


def torch_build() -> str:
    return importlib.metadata.version("torch").partition("+")[2]


if __name__ == "__main__":
    main()
