"""The command line, the Python API, the server and the page on several processes: rank 0 talks, all compute."""

from __future__ import annotations

import os
import re
import signal
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import httpx
import parallel_front_ends
import pytest
from parallel_ranks import Running, under_torchrun
from patience import PATIENCE, eventually, free_port

from lightx2v.media.mp4 import probe, read_settings


@pytest.mark.multi
def test_the_command_line_under_torchrun(tmp_path: Path) -> None:
    """torchrun's agent starts the processes, and the program chooses the layout."""
    video = tmp_path / "cat.mp4"
    arguments = ["--preset", parallel_front_ends.PRESET, "--steps", "3", "--save_result_path", str(video)]
    (end,) = Running(1, under_torchrun, parallel_front_ends.infer, *arguments).ended()
    assert end.code == 0, end.output
    assert probe(video).frames == 5
    for rank in (0, 1):
        assert f"[rank {rank}] Run DiT cost" in end.output and f"[rank {rank}] Total Cost cost" in end.output
    assert end.output.count("5 frames") == 1 and "; process 1 0." in end.output
    assert read_settings(video)["engine"]["parallel"] == {
        "cfg_p_size": 2,
        "seq_p_size": 1,
        "seq_p_attn_type": "ulysses",
    }


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--preset", "t2v_base_cfg_ulysses"], "torchrun --nproc_per_node=8, or use cfg_p_size 2, seq_p_size 1 or"),
        (
            ["--preset", "demo_t2v_base", "--set", 'parallel={"cfg_p_size": 2, "seq_p_size": 2}', "--no-enable_cfg"],
            "or use cfg_p_size 1, seq_p_size 2.",
        ),
        (["--preset", "demo_t2v_base", "--set", 'parallel={"seq_p_size": 3}'], "cfg_p_size 1, seq_p_size 2"),
    ],
)
def test_impossible_layouts_are_refused_before_loading(arguments: list[str], message: str) -> None:
    first, second = Running(2, parallel_front_ends.infer, *arguments).ended()
    assert (first.code, second.code) == (2, 2)
    assert message in first.output and "Load models" not in first.output and second.output == ""


@pytest.mark.multi
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_that_torchrun_repeats_stops_all_at_one_step(tmp_path: Path, number: signal.Signals) -> None:
    video = tmp_path / "long.mp4"
    arguments = ["--preset", "demo_t2v_base", "--steps", "200", "--save_result_path", str(video)]
    running = Running(2, parallel_front_ends.infer, *arguments)
    running.wait_for_output(0, "denoise")
    for _ in range(2):
        for rank in (0, 1):
            running.signal(rank, number)
    ends = running.ended()
    assert [end.code for end in ends] == [128 + number] * 2, ends
    assert "Stopped; no video was written." in ends[0].output and "Traceback" not in ends[0].output + ends[1].output
    assert not list(tmp_path.iterdir())


@pytest.mark.multi
def test_the_tutorials_python_example(tmp_path: Path) -> None:
    ends = Running(2, parallel_front_ends.example, str(tmp_path)).ended()
    assert [end.code for end in ends] == [0, 0], ends
    assert probe(tmp_path / "example.mp4").frames == 5


@pytest.mark.multi
@pytest.mark.parametrize("front_end", [parallel_front_ends.server, parallel_front_ends.page])
def test_the_server_and_the_page_make_videos_with_all_processes(
    tmp_path: Path, front_end: Callable[..., object]
) -> None:
    """Make one video, then stop torchrun during a long one."""
    port = free_port()
    running = Running(2, front_end, port, str(tmp_path))
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=PATIENCE, trust_env=False) as client:
            wait_until(running, lambda: answers(client, "/v1/models").get("object") == "list")
            body = {"model": parallel_front_ends.PRESET, "prompt": parallel_front_ends.PROMPT, "num_frames": 5}
            for steps, wanted in ((3, "completed"), (200, "in_progress")):
                made = client.post("/v1/videos", json=body | {"num_inference_steps": steps}).json()
                wait_until(running, lambda made=made, wanted=wanted: state(client, made["id"]) == wanted)
    finally:
        for rank in (0, 1, 0, 1):
            running.signal(rank, signal.SIGTERM)
        ends = running.ended()
    assert [end.code for end in ends] == [143, 0], ends
    assert all(re.search(rf"\[rank {rank}\] (INFO +)?Run DiT cost", end.output) for rank, end in enumerate(ends)), ends
    with closing(sqlite3.connect(tmp_path / "jobs.sqlite")) as jobs:
        assert jobs.execute("SELECT state FROM jobs ORDER BY number").fetchall() == [("succeeded",), ("queued",)]


def answers(client: httpx.Client, path: str) -> dict[str, Any]:
    try:
        return client.get(path).json()
    except (httpx.TransportError, ValueError):
        return {}


def state(client: httpx.Client, id: str) -> str:
    found = answers(client, f"/v1/videos/{id}")
    assert found.get("status") != "failed", found
    return found.get("status", "")


def wait_until(running: Running, ready: Callable[[], bool]) -> None:
    eventually(lambda: ready() or not running.alive)
    assert running.alive, running.ended()


@pytest.mark.multi
def test_nothing_listens_to_other_machines(tmp_path: Path) -> None:
    """Check the ports that the processes open themselves; torchrun's own port is not ours."""
    arguments = ["--preset", "demo_t2v_base", "--steps", "200", "--save_result_path", str(tmp_path / "x.mp4")]
    running = Running(2, parallel_front_ends.infer, *arguments)
    try:
        running.wait_for_output(0, "denoise")
        addresses = [listening(pid) for pid in running.pids]
    finally:
        for rank in (0, 1):
            running.signal(rank, signal.SIGINT)
        running.ended()
    assert all(addresses) and set.union(*addresses) == {"0100007F"}


def listening(pid: int) -> set[str]:
    """The addresses, in hexadecimal, on which a process accepts connections."""
    inodes = set()
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        try:
            inodes.add(os.readlink(entry))
        except OSError:
            continue
    found = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and f"socket:[{fields[9]}]" in inodes:
                found.add(fields[1].partition(":")[0])
    return found
