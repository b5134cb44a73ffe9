"""The command line, the Python API, the server and the page on several processes: one of them talks, all work."""

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
import parallel_faces
import pytest
from parallel_ranks import Running, under_torchrun
from patience import PATIENCE, eventually, free_port

from lightx2v.media.mp4 import probe, read_settings


def test_the_command_line_under_torchrun(tmp_path: Path) -> None:
    """torchrun's agent starts the processes; the layout is chosen."""
    video = tmp_path / "cat.mp4"
    arguments = ["--preset", parallel_faces.PRESET, "--steps", "3", "--save_result_path", str(video)]
    (end,) = Running(1, under_torchrun, parallel_faces.infer, *arguments).ended()
    assert end.code == 0, end.said
    assert probe(video).frames == 5
    for rank in (0, 1):
        assert f"[rank {rank}] Run DiT cost" in end.said and f"[rank {rank}] Total Cost cost" in end.said
    assert end.said.count("5 frames") == 1 and "; process 1 0." in end.said
    assert read_settings(video)["engine"]["parallel"] == {
        "cfg_p_size": 2,
        "seq_p_size": 1,
        "seq_p_attn_type": "ulysses",
    }


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--preset", "t2v_base_cfg_ulysses"], "torchrun --nproc_per_node=8, or use cfg_p_size 2, seq_p_size 1 or"),
        (
            ["--preset", "demo_t2v_base", "--set", 'parallel={"cfg_p_size": 2, "seq_p_size": 2}', "--no-enable_cfg"],
            "or use cfg_p_size 1, seq_p_size 2.",
        ),
        (["--preset", "demo_t2v_base", "--set", 'parallel={"seq_p_size": 3}'], "cfg_p_size 1, seq_p_size 2"),
    ],
)
def test_impossible_layouts_are_refused_before_loading(arguments: list[str], told: str) -> None:
    first, second = Running(2, parallel_faces.infer, *arguments).ended()
    assert (first.code, second.code) == (2, 2)
    assert told in first.said and "Load models" not in first.said and second.said == ""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_that_torchrun_repeats_stops_all_at_one_step(tmp_path: Path, number: signal.Signals) -> None:
    video = tmp_path / "long.mp4"
    arguments = ["--preset", "demo_t2v_base", "--steps", "200", "--save_result_path", str(video)]
    running = Running(2, parallel_faces.infer, *arguments)
    running.wait_to_hear(0, "denoise")
    for _ in range(2):
        for rank in (0, 1):
            running.signal(rank, number)
    ends = running.ended()
    assert [end.code for end in ends] == [128 + number] * 2, ends
    assert "Stopped; no video was written." in ends[0].said and "Traceback" not in ends[0].said + ends[1].said
    assert not list(tmp_path.iterdir())


def test_the_tutorials_python_example(tmp_path: Path) -> None:
    ends = Running(2, parallel_faces.example, str(tmp_path)).ended()
    assert [end.code for end in ends] == [0, 0], ends
    assert probe(tmp_path / "example.mp4").frames == 5


@pytest.mark.parametrize("face", [parallel_faces.server, parallel_faces.page])
def test_what_serves_others_makes_videos_with_all_processes(tmp_path: Path, face: Callable[..., object]) -> None:
    """One video, then a long one during which torchrun is told to stop."""
    port = free_port()
    running = Running(2, face, port, str(tmp_path))
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=PATIENCE, trust_env=False) as client:
            wait_until(running, lambda: answers(client, "/v1/models").get("object") == "list")
            wish = {"model": parallel_faces.PRESET, "prompt": parallel_faces.PROMPT, "num_frames": 5}
            for steps, wanted in ((3, "completed"), (200, "in_progress")):
                made = client.post("/v1/videos", json=wish | {"num_inference_steps": steps}).json()
                wait_until(running, lambda made=made, wanted=wanted: state(client, made["id"]) == wanted)
    finally:
        for rank in (0, 1, 0, 1):
            running.signal(rank, signal.SIGTERM)
        ends = running.ended()
    assert [end.code for end in ends] == [143, 0], ends
    assert all(re.search(rf"\[rank {rank}\] (INFO +)?Run DiT cost", end.said) for rank, end in enumerate(ends)), ends
    with closing(sqlite3.connect(tmp_path / "jobs.sqlite")) as jobs:
        assert jobs.execute("SELECT state FROM jobs ORDER BY number").fetchall() == [("succeeded",), ("interrupted",)]


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


def test_nothing_listens_to_other_machines(tmp_path: Path) -> None:
    """Of what the processes themselves open; torchrun's own port is its business."""
    arguments = ["--preset", "demo_t2v_base", "--steps", "200", "--save_result_path", str(tmp_path / "x.mp4")]
    running = Running(2, parallel_faces.infer, *arguments)
    try:
        running.wait_to_hear(0, "denoise")
        heard = [listening(pid) for pid in running.pids]
    finally:
        for rank in (0, 1):
            running.signal(rank, signal.SIGINT)
        running.ended()
    assert all(heard) and set.union(*heard) == {"0100007F"}


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
