"""The list of presets: what each is for, and the seconds that this machine needs for it."""

from __future__ import annotations

from pathlib import Path

import pytest

from lightx2v.config.presets import AIMS, list_presets, resolve
from lightx2v.config.request import Request
from lightx2v.config.schedule import schedule_of
from lightx2v.cost.machine import Machine, MachineReader
from lightx2v.jobs.preset_list import preset_lines
from lightx2v.jobs.run_times import RunTimes


def forwards(preset: str) -> int:
    found = resolve(preset)
    image = {"image_path": "a.png"} if found.engine.task == "i2v" else {}
    return sum(schedule_of(Request(prompt="x", **found.request, **image)).forwards)


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> str:
    machine = Machine(name="a laptop", cores=4, ram_free=16 << 30, ram_total=16 << 30)
    monkeypatch.setattr(MachineReader, "__call__", lambda self: machine)
    return machine.name


def test_a_preset_is_for_what_its_forwards_allow() -> None:
    """The order of the aims is that of the forwards, for each task."""
    alone = [info for info in list_presets() if info.gpus == 1 and not info.offload]
    for task in ("t2v", "i2v"):
        of = {aim: [forwards(i.name) for i in alone if (i.task, i.aim, i.demo) == (task, aim, False)] for aim in AIMS}
        assert all(of.values())
        assert max(of["draft"]) <= min(of["fast"]) < min(of["balanced"]) <= max(of["balanced"]) < min(of["best"])


@pytest.mark.parametrize(
    ("preset", "expected"),
    # t2v: 13 of 20 steps are above 875 at shift 12; i2v: 8 above 900 at shift 5. Guidance runs each of these twice.
    [("t2v_hybrid", 33), ("i2v_hybrid", 28), ("t2v_three_phase", 9), ("i2v_three_phase", 9), ("t2v_base", 80)],
)
def test_the_new_presets_run_the_experts_this_often(preset: str, expected: int) -> None:
    assert forwards(preset) == expected == (forwards(f"demo_{preset}") if "base" not in preset else 80)


def test_before_any_run_a_line_has_a_name_an_aim_and_a_title(here: str, tmp_path: Path) -> None:
    lines = list(preset_lines(tmp_path))
    assert lines[0].split()[:3] == ["demo_t2v_base", "best", "–"]
    names = [line.split()[0] for line in lines]
    assert names == [info.name for info in list_presets()]
    assert {line.split()[1] for line in lines} == set(AIMS)


def test_what_one_run_has_taken_predicts_every_preset_of_one_process(here: str, tmp_path: Path) -> None:
    found = resolve("t2v_base")
    seconds = {"text": 1.0, "denoise": 800.0, "decode": 8.0, "write": 1.0}
    RunTimes(tmp_path / "rates.json").record(found.engine, Request(prompt="x", **found.request), seconds, here)
    said = {line.split()[0]: line.split()[2:4] for line in preset_lines(tmp_path)}
    assert said["t2v_base"] == ["13", "min"], "809 s"
    assert said["t2v_base_cfg_ulysses"][0] == "–"
    # 480p has 32 760 of 75 600 tokens: 3.0 s of a forward against 10 s
    assert float(said["t2v_three_phase"][0]) == pytest.approx(9 * 10 * 0.3 + 4, rel=0.15)
