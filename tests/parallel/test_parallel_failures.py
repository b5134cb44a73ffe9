"""When one of several processes fails, none of the others waits forever, and all report the first failure."""

from __future__ import annotations

import signal
import time
from pathlib import Path

import parallel_troubles
import pytest
from parallel_ranks import Ended, Running, group, tiny_models, under_torchrun

MESSAGES = {
    "raise": "ValueError on process {who}: nobody thought of this",
    "starve": "on process {who}: ",
    "kill": "Process {who} ",
    "stop": "Process {who} has sent no heartbeat",
    "exit": "",
    "forge": "ValueError on process {who}: nobody thought of this",
}
CASES = [
    *[("kill", "load", 1), ("kill", "denoise", 0), ("kill", "denoise", 1), ("kill", "decode", 1)],
    *[("kill", "idle", 0), ("kill", "idle", 1)],
    *[("raise", "load", 0), ("raise", "denoise", 1), ("starve", "denoise", 0), ("starve", "decode", 1)],
    *[("stop", "denoise", 0), ("stop", "idle", 1)],
    *[("exit", "between", 0), ("exit", "between", 1), ("forge", "denoise", 1)],
]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models(tmp_path_factory.mktemp("failures"))


@pytest.mark.multi
def test_errors_and_cancels_end_alike_on_all_processes_and_leave_nothing_behind(root: Path) -> None:
    both = group(2).call(parallel_troubles.mistakes, str(root))
    leader, follower = both
    assert leader == follower
    loading, good, large, folder, *rest = leader
    text, noise, late, early, decoding, lora, again, drawn, picture, pictured, world = rest
    assert loading == "Cancelled"
    assert large[0] == "BadRequest" and folder[0] not in ("GroupFailed", "Cancelled")
    cancelled = ["Cancelled", "The run was cancelled."]
    assert [text, noise, late, early] == [[*cancelled, step] for step in (-1, 0, 2, 1)]
    assert decoding == [*cancelled, 3]
    assert lora[0] == "LoraError"
    assert again == good and drawn != good
    assert picture[0] == "BadRequest" and isinstance(pictured, str)
    assert world[0] == "ConfigError" and "2 were started" in world[1]


@pytest.mark.slow
def test_running_out_of_memory_on_all_processes_fails_only_that_request(root: Path) -> None:
    assert group(2).call(parallel_troubles.starved, str(root), True) == [["OutOfMemory", "made"]] * 2


@pytest.mark.slow
def test_nan_in_the_frames_of_one_process_fails_only_that_request(root: Path) -> None:
    ends = group(2).call(parallel_troubles.black, str(root))
    assert ends == [[["NumericsError", "The VAE made NaN or infi"], "made"]] * 2


@pytest.mark.slow
def test_a_process_that_waits_for_the_others_reacts_to_signals(root: Path) -> None:
    """torchrun ends the others if one is killed before all have connected."""
    running = Running(2, parallel_troubles.failing, str(root), "kill", "meet", 1)
    running.wait_for(1)
    running.signal(0, signal.SIGTERM)
    assert [end.code for end in running.ended()] == [-15, -9]


def test_a_process_whose_partner_dies_while_connecting_reports_it(root: Path) -> None:
    killed, alone = Running(2, parallel_troubles.failing, str(root), "kill", "connect", 0).ended()
    assert (killed.code, alone.code) == (-9, 1)
    assert "Process 1 cannot connect to the others" in alone.output and "one of them has ended" in alone.output


@pytest.mark.multi
def test_a_failure_of_one_process_ends_all(root: Path) -> None:
    """All cases run at once, since they mostly wait. The others kill a process that has stopped.

    A failure that another program writes into torchrun's store is ignored.
    """
    started = time.monotonic()
    groups = {case: Running(2, parallel_troubles.failing, str(root), *case) for case in CASES}
    wrong = []
    for (how, where, who), running in groups.items():
        ends = running.ended()
        expected = {"kill": -9, "stop": -9, "exit": 0}.get(how, 1)
        message, output = MESSAGES[how].format(who=who), "".join(end.output for end in ends)
        if (ends[1 - who].code, ends[who].code) != (1, expected) or message not in output or "stranger" in output:
            wrong.append((how, where, who, ends))
    assert not wrong, "\n".join(describe(case) for case in wrong)
    assert time.monotonic() - started < 110, "some process waited until it was killed"


def describe(case: tuple[str, str, int, list[Ended]]) -> str:
    how, where, who, ends = case
    said = "\n".join(f"    {rank}: {end.code}: {end.output[-1500:]}" for rank, end in enumerate(ends))
    return f"{how} of {who} while {where}:\n{said}"


@pytest.mark.multi
def test_torchrun_starts_the_group_again_and_the_queue_goes_on(root: Path) -> None:
    (end,) = Running(1, under_torchrun, parallel_troubles.queue, str(root)).ended()
    assert end.code == 0, end.output[-3000:]
    ends = (root / "queue.txt").read_text().split()
    assert ends == ["succeeded"] * 3, "the job in which a process was killed starts over by itself"
