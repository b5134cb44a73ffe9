"""--replicas, --gpus_per_replica and --ray: what they ask for, and what is refused."""

from __future__ import annotations

import subprocess
import sys

import pytest

from lightx2v.cli.parser import ArgumentParser
from lightx2v.config.environment import Environment
from lightx2v.config.model_paths import PROJECT
from lightx2v.cost import machine
from lightx2v.errors import ConfigError
from lightx2v.farm import options
from lightx2v.farm.options import FarmOptions, add_farm_flags


def asked(*flags: str, gpus: int = 0, **variables: str) -> FarmOptions | None:
    parser = ArgumentParser()
    add_farm_flags(parser.add_argument)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(options, "gpu_count", lambda: gpus)
        return FarmOptions.of(parser.parse(list(flags)), Environment.read(variables))


@pytest.mark.parametrize(("flags", "gpus"), [((), 8), (("--replicas", "auto"), 0), (("--replicas", "auto"), 1)])
def test_one_worker_needs_no_farm(flags: tuple[str, ...], gpus: int) -> None:
    assert asked(*flags, gpus=gpus) is None


def test_without_the_flags_nobody_counts_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine.subprocess, "run", lambda *_, **__: pytest.fail("it asked the driver's tool"))
    parser = ArgumentParser()
    add_farm_flags(parser.add_argument)
    assert FarmOptions.of(parser.parse([]), Environment.read({})) is None


@pytest.mark.parametrize(
    ("flags", "gpus", "expected"),
    [
        ("--replicas auto", 8, (8, 8, 1, "")),
        ("--replicas auto --gpus_per_replica 4", 8, (2, 2, 4, "")),
        ("--replicas 3", 8, (3, 3, 1, "")),
        ("--replicas 3", 0, (3, 3, 1, "")),
        ("--replicas 2:4", 4, (2, 4, 1, "")),
        ("--replicas 1:4", 4, (1, 4, 1, "")),
        ("--gpus_per_replica 2", 0, (1, 1, 2, "")),
        ("--replicas auto --ray auto", 0, (None, options.MOST, 1, "auto")),
        ("--replicas 2:16 --ray head:6379 --gpus_per_replica 8", 1, (2, 16, 8, "head:6379")),
    ],
)
def test_what_the_flags_ask_for(flags: str, gpus: int, expected: tuple[int | None, int, int, str]) -> None:
    found = asked(*flags.split(), gpus=gpus)
    assert found is not None
    assert (found.low, found.high, found.gpus, found.address) == expected
    assert found.scales == (":" in flags.partition("--ray")[0])


@pytest.mark.parametrize(
    ("flags", "gpus", "message"),
    [
        ("--replicas 5", 4, "asks for 5 workers with 1 GPU each, and this machine has 4. Use at most 4"),
        ("--replicas 3 --gpus_per_replica 2", 4, "Use at most 2"),
        ("--replicas auto --gpus_per_replica 3", 4, "4 GPUs, which do not make groups of 3"),
        ("--gpus_per_replica 8", 4, "4 GPUs, which do not make groups of 8"),
    ],
)
def test_more_than_this_machine_has_is_refused(flags: str, gpus: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        asked(*flags.split(), gpus=gpus)


@pytest.mark.parametrize("text", ["0", "-1", "4:2", "0:3", "many", "2:", ":2", "1:2:3", "2.5", "99999", "²"])
def test_numbers_of_replicas_that_make_no_sense_are_refused(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        asked(f"--replicas={text}")
    assert "--replicas" in capsys.readouterr().err


def test_torchrun_and_replicas_exclude_each_other() -> None:
    with pytest.raises(ConfigError, match="without torchrun"):
        asked("--replicas", "2", RANK="0", WORLD_SIZE="2")


def test_a_missing_ray_is_named_with_the_command_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(options.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install \"lightx2v-studio\[farm\]\""):
        asked("--replicas", "2")
    assert asked() is None


@pytest.mark.parametrize(("variable", "expected"), [("", 0), ("-1", 0), ("0", 1), ("2,5,7", 3), ("GPU-1a,GPU-2b", 2)])
def test_visible_gpus_are_counted_as_cuda_sees_them(
    variable: str, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", variable)
    assert machine.gpu_count() == expected


@pytest.mark.slow
def test_nothing_of_ray_is_imported_before_it_is_asked_for() -> None:
    code = (
        "import sys, lightx2v.server.command, app.main, lightx2v.farm.farm, lightx2v.farm.worker\n"
        "assert not {'ray', 'torch'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=PROJECT, timeout=60)
