"""A real server that is killed in mid-run: its job goes on by itself to the video of an undisturbed run, bit by bit."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import parallel_front_ends
import pytest
from parallel_ranks import Running
from patience import PATIENCE, eventually, free_port

STEPS = 40


@contextmanager
def server(folder: Path, processes: int = 1) -> Iterator[tuple[Running, httpx.Client]]:
    port = free_port()
    running = Running(processes, parallel_front_ends.server, port, str(folder), "--save_every", "0.05")
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=PATIENCE, trust_env=False) as client:
            eventually(lambda: answers(client) or not running.alive)
            yield running, client
    finally:
        for rank in range(processes):
            running.signal(rank, signal.SIGKILL)
        running.ended()


def answers(client: httpx.Client) -> bool:
    try:
        return client.get("/health").status_code == 200
    except httpx.TransportError:
        return False


def submit(client: httpx.Client, steps: int = STEPS) -> str:
    body = {"prompt": parallel_front_ends.PROMPT, "num_frames": 5, "num_inference_steps": steps, "seed": 7}
    return client.post("/v1/videos", json=body).json()["id"]


def finished(client: httpx.Client, id: str) -> dict[str, Any]:
    job = eventually(lambda: (job := client.get(f"/v1/videos/{id}").json())["completed_at"] and job)
    assert job["status"] == "completed", job
    return job


def events(client: httpx.Client, id: str) -> list[tuple[str, dict[str, Any]]]:
    blocks = client.get(f"/v1/videos/{id}/events").text.strip().split("\n\n")
    fields = [dict(line.split(": ", 1) for line in block.splitlines()) for block in blocks if "data: " in block]
    return [(field["event"], json.loads(field["data"])) for field in fields]


@pytest.mark.multi
@pytest.mark.parametrize(("number", "processes"), [(signal.SIGKILL, 1), (signal.SIGTERM, 1), (signal.SIGKILL, 2)])
def test_a_job_goes_on_after_the_server_was_ended_in_mid_run(tmp_path: Path, number: int, processes: int) -> None:
    with server(tmp_path, processes) as (running, client):
        id = submit(client)
        later = submit(client, steps=2)
        step_file = tmp_path / f"{id}.mp4.step.safetensors"
        eventually(step_file.exists)
        for rank in range(processes):
            running.signal(rank, number)
        for rank in range(processes):
            running.wait_for(rank)
    assert step_file.exists() and not (tmp_path / f"{id}.mp4").exists()
    with server(tmp_path, processes) as (running, client):
        seen: list[int] = []
        while not (job := client.get(f"/v1/videos/{id}").json())["completed_at"]:
            if job["step"] and job["step"]["stage"] == "denoise":
                seen.append(job["step"]["step"])
                assert 0 < job["step"]["resumed_after"] <= job["step"]["step"]
        assert job["status"] == "completed" and job["warnings"] == []
        heard = events(client, id)
        after = next(data["resumed_after"] for kind, data in heard if kind == "progress" and data["stage"] == "denoise")
        assert 0 < after <= STEPS and all(step >= after for step in seen)
        assert len(job["timings"]["steps"]) == STEPS - after
        assert not [data for kind, data in heard if kind == "progress" and data["stage"] == "text"]
        assert [data["status"] for kind, data in heard if "note" in data] == ["queued"]
        assert not step_file.exists()
        assert finished(client, later)["started_at"] >= job["completed_at"], "the killed job ran first"
        undisturbed = finished(client, submit(client))["id"]
        videos = [client.get(f"/v1/videos/{video}/content").content for video in (id, undisturbed)]
        assert videos[0] == videos[1]
