"""Progress as it comes, from where a client was, until the job is over."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import pytest
from fake_engine import Garage, Script
from patience import PATIENCE
from served import listening, serve

from lightx2v.server import event_stream as events


def parsed(text: str) -> list[tuple[int | None, str, dict[str, Any]]]:
    """(id, kind, data) of each event."""
    found = []
    for block in text.split("\n\n"):
        lines = dict(line.split(": ", 1) for line in block.splitlines() if line and not line.startswith(":"))
        if lines:
            found.append((int(lines["id"]) if "id" in lines else None, lines["event"], json.loads(lines["data"])))
    return found


def test_a_finished_jobs_events_end_with_the_job(tmp_path: Path) -> None:
    with serve(tmp_path) as served:
        id = served.submit()
        served.end_of(id)
        all_ = parsed(served.client.get(f"/v1/videos/{id}/events").text)
        assert [data["status"] for _, kind, data in all_ if kind == "state"] == ["queued", "in_progress", "completed"]
        steps = [(data["stage"], data["step"]) for _, kind, data in all_ if kind == "progress"]
        assert [step for stage, step in steps if stage == "denoise"] == [1, 2, 3, 4]
        assert all_[-1][1] == "video" and all_[-1][2]["status"] == "completed"
        later = parsed(served.client.get(f"/v1/videos/{id}/events", headers={"Last-Event-ID": "3"}).text)
        assert later == all_[3:]
        assert served.client.get(f"/v1/videos/{'0' * 32}/events").status_code == 404
        assert served.client.get(f"/v1/videos/{id}/events", headers={"Last-Event-ID": "x"}).status_code == 422


def test_events_come_while_the_job_runs_and_a_client_that_leaves_costs_nothing(tmp_path: Path) -> None:
    hold = threading.Event()
    garage = Garage(script={"hold": Script(hold=hold)})
    with serve(tmp_path, garage) as served, listening(served) as client:
        id = served.submit("hold")
        assert garage.started.wait(PATIENCE)
        with client.stream("GET", f"/v1/videos/{id}/events") as stream:
            assert stream.headers["content-type"].startswith("text/event-stream")
            lines = stream.iter_lines()
            seen = [next(lines) for _ in range(8)]
            assert any("in_progress" in line for line in seen)
        hold.set()
        with client.stream("GET", f"/v1/videos/{id}/events") as stream:
            assert parsed(stream.read().decode())[-1][2]["status"] == "completed"


def test_too_many_watchers_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(events, "MAX_STREAMS", 0)
    with serve(tmp_path) as served:
        id = served.submit()
        answer = served.client.get(f"/v1/videos/{id}/events")
        assert answer.status_code == 429 and "watching already" in answer.json()["error"]["message"]
        assert "position" not in answer.json()["error"], "it is not the queue that is full"
