"""The command line goes on with a run that was killed or stopped: the same command with --resume, the same video."""

from __future__ import annotations

import re
import signal
from pathlib import Path

import parallel_front_ends
import pytest
from parallel_ranks import Ended, Running
from patience import eventually

from lightx2v.step_file import StepFile

pytestmark = pytest.mark.multi

STEPS = 30
COMMAND = ("--preset", parallel_front_ends.PRESET, "--steps", str(STEPS), "--save_every", "0.05")


def infer(*arguments: str, processes: int = 1) -> Running:
    return Running(processes, parallel_front_ends.infer, *COMMAND, *arguments)


def whole(*arguments: str, processes: int = 1) -> Ended:
    """The first process's end, of a command that must succeed."""
    ends = infer(*arguments, processes=processes).ended()
    assert [end.code for end in ends] == [0] * processes, ends
    return ends[0]


def step_of(output: str) -> int:
    """The steps that were done before."""
    first, *others = re.findall(rf"went on at (?:step (\d+) of {STEPS}|decoding) after a restart", output)
    assert others[-1] == first, "the summary says it, too"
    return int(first) - 1 if first else STEPS


@pytest.mark.parametrize("processes", [1, 2])
def test_a_killed_run_goes_on_at_its_last_saved_step_with_the_same_bits(tmp_path: Path, processes: int) -> None:
    undisturbed, video = tmp_path / "whole.mp4", tmp_path / "cat.mp4"
    whole("--save_result_path", str(undisturbed), processes=processes)
    running = infer("--save_result_path", str(video), processes=processes)
    eventually(StepFile(video).exists)
    for rank in range(processes):
        running.signal(rank, signal.SIGKILL)
    running.ended()
    assert not video.exists()
    end = whole("--save_result_path", str(video), "--resume", processes=processes)
    assert 0 < step_of(end.output) <= STEPS
    assert video.read_bytes() == undisturbed.read_bytes()
    assert not list(tmp_path.glob("*.step.*")), "the step goes with the video"


def test_ctrl_c_saves_the_step_and_says_how_to_go_on(tmp_path: Path) -> None:
    """Without a name for the video, and with a drawn seed: the command finds the newest step that is its own."""

    def infer(*arguments: str) -> Running:
        return Running(1, parallel_front_ends.infer_into, str(tmp_path), *COMMAND, "--seed", "-1", *arguments)

    other = infer("--shift", "7")
    eventually(lambda: StepFile.all_in(tmp_path))
    other.signal(0, signal.SIGKILL)
    other.ended()
    (others,) = StepFile.all_in(tmp_path)
    running = infer()
    eventually(lambda: len(StepFile.all_in(tmp_path)) > 1)
    running.signal(0, signal.SIGINT)
    (end,) = running.ended()
    assert end.code == 130 and "The same command with --resume goes on from there." in end.output
    assert "Stopped; no video was written." in end.output
    saved = re.findall(r"Stopped; (\d+) of \d+ steps are saved", end.output)
    (steps,) = [file for file in StepFile.all_in(tmp_path) if file.path != others.path]
    others.path.touch()  # newer, but of another command
    (end,) = infer("--resume").ended()
    assert end.code == 0 and saved == [str(step_of(end.output))]
    assert steps.video.exists() and not steps.exists() and others.exists() and not others.video.exists()


def test_a_damaged_step_and_a_missing_one_begin_at_the_first_step_and_say_so(tmp_path: Path) -> None:
    video = tmp_path / "cat.mp4"
    end = whole("--save_result_path", str(video), "--resume", "--steps", "2")
    assert "There is no saved step of this video to go on from" in end.output
    StepFile(video).write(b"half a step")
    end = whole("--save_result_path", str(video), "--resume", "--force", "--steps", "2")
    assert "warning: The video was started over: the saved step is damaged" in end.output
    assert not StepFile(video).exists()


def test_a_run_of_less_than_twenty_seconds_writes_nothing(tmp_path: Path) -> None:
    running = Running(1, parallel_front_ends.infer, *COMMAND[:-2], "--save_result_path", str(tmp_path / "cat.mp4"))
    running.wait_for_output(0, "denoise")
    running.signal(0, signal.SIGTERM)
    (end,) = running.ended()
    assert end.code == 143 and not list(tmp_path.iterdir())
