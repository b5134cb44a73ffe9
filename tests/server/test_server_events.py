"""Server-sent events: progress as it happens, resumed where a client stopped, until the job is over."""

from __future__ import annotations

import contextlib
import json
import shutil
import socket
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from fake_engine import Garage, Script
from patience import PATIENCE, eventually
from served import listening, serve

from lightx2v.server import event_stream as events

pytestmark = pytest.mark.slow


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


def test_events_arrive_while_the_job_runs_and_a_client_may_disconnect(tmp_path: Path) -> None:
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


def test_a_client_resumes_a_running_jobs_events_after_the_last_one_that_it_has_seen(tmp_path: Path) -> None:
    hold = threading.Event()
    garage = Garage(script={"hold": Script(hold=hold, at=("denoise", 3))})
    with serve(tmp_path, garage) as served, listening(served) as client:
        id = served.submit("hold")
        assert garage.started.wait(PATIENCE)
        seen = served.jobs.events(id)
        headers = {"Last-Event-ID": str(seen[-1].id - 1)}
        with client.stream("GET", f"/v1/videos/{id}/events", headers=headers) as stream:
            hold.set()
            events_ = parsed(stream.read().decode())
    numbers = [number for number, *_ in events_ if number is not None]
    assert numbers == list(range(seen[-1].id, numbers[-1] + 1))
    steps = [data["step"] for _, kind, data in events_ if kind == "progress" and data["stage"] == "denoise"]
    assert steps == [2, 3, 4] and events_[-1][2]["status"] == "completed"


def test_a_stream_that_waits_reads_nothing_and_hears_of_a_change_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hold, reads = threading.Event(), []
    garage = Garage(script={"hold": Script(hold=hold)})
    with serve(tmp_path, garage) as served, listening(served) as client:
        id = served.submit("hold")
        assert garage.started.wait(PATIENCE)
        read = served.jobs.events
        monkeypatch.setattr(served.jobs, "events", lambda *given: reads.append(time.monotonic()) or read(*given))
        with client.stream("GET", f"/v1/videos/{id}/events") as stream:
            lines = stream.iter_lines()
            next(lines)
            time.sleep(1)
            assert len(reads) == 1
            hold.set()
            assert any("event: video" in line for line in lines)


def test_after_a_restart_states_are_known_and_ids_continue_beyond_the_lost_steps(tmp_path: Path) -> None:
    garage = Garage(script={"hold": Script(hold=threading.Event())})
    with serve(tmp_path, garage) as served:
        id = served.submit("hold")
        assert garage.started.wait(PATIENCE)
        before = served.jobs.events(id)
        assert {event.kind for event in before} == {"state", "progress"}
        shutil.copytree(tmp_path, tmp_path / "killed")  # the folder as a process leaves it that is killed now
    with serve(tmp_path / "killed") as served:
        after = parsed(served.client.get(f"/v1/videos/{id}/events").text)
        assert [data["status"] for _, kind, data in after if kind == "state"] == [
            *("queued", "in_progress"),
            *("queued", "in_progress", "completed"),
        ]
        notes = [data.get("note", "") for _, kind, data in after if kind == "state"]
        assert "goes on at its last saved step" in notes.pop(2) and not any(notes)
        assert not [number for number, kind, _ in after if kind == "progress" and number <= before[-1].id]
        headers = {"Last-Event-ID": str(before[-1].id)}
        resumed = parsed(served.client.get(f"/v1/videos/{id}/events", headers=headers).text)
        assert resumed[0][1] == "state" and "note" in resumed[0][2], "the client hears of the restart"
        assert resumed[-1][1] == "video"


def test_of_three_hundred_streams_at_once_exactly_the_allowed_number_is_let_in(tmp_path: Path) -> None:
    """And all of their places are free again, also those of clients that left before the first line."""
    hold = threading.Event()
    garage = Garage(script={"hold": Script(hold=hold)})
    with serve(tmp_path, garage) as served, listening(served) as client:
        id = served.submit("hold")
        assert garage.started.wait(PATIENCE)
        address = (client.base_url.host, client.base_url.port)
        request = f"GET /v1/videos/{id}/events HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n".encode()

        def statuses(count: int) -> list[bytes]:
            """Of streams that are asked for at the same moment and left open until all have an answer."""
            with contextlib.ExitStack() as stack:
                opened = [stack.enter_context(socket.create_connection(address, PATIENCE)) for _ in range(count)]
                for connection in opened:
                    connection.sendall(request)
                return [connection.recv(12)[9:] for connection in opened]

        assert Counter(statuses(300)) == {b"200": events.MAX_STREAMS, b"429": 300 - events.MAX_STREAMS}
        for _ in range(3):
            for _ in range(50):
                with socket.create_connection(address, PATIENCE) as connection:
                    connection.sendall(request)
        assert eventually(lambda: statuses(events.MAX_STREAMS).count(b"200") == events.MAX_STREAMS)
        hold.set()


def test_too_many_streams_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(events, "MAX_STREAMS", 0)
    with serve(tmp_path) as served:
        id = served.submit()
        answer = served.client.get(f"/v1/videos/{id}/events")
        assert answer.status_code == 429 and "event streams are already open" in answer.json()["error"]["message"]
        assert "position" not in answer.json()["error"], "it is not the queue that is full"
