"""The queue of a launched page.

Covered: fifty submissions at once run one at a time and in order, up to the queue's limit; a click beyond the limit;
jobs do not affect each other; a submission while the model changes, with never two in memory; many jobs leave no
process, file handle or temporary file behind; jobs and results survive a restart.
"""

from __future__ import annotations

import re
import secrets
import signal
import threading
from pathlib import Path
from typing import Any

import psutil
import pytest
from page_events import Keyboard
from patience import PATIENCE, eventually
from studio_app import Page, Refused, launched, stop

pytestmark = pytest.mark.multi

SMALL = {"height": 32, "width": 32, "frames": 1}


def test_fifty_submissions_at_once_run_one_by_one_up_to_the_limit(space: Page) -> None:
    first = space.ask("generate", prompt="an endless first one", settings=SMALL)["id"]
    space.wait(first, "running")
    taken: list[dict[str, Any]] = []
    refused: list[str] = []

    def ask(number: int) -> None:
        try:
            made = space.ask("generate", prompt=f"number {number}", settings=SMALL)
            taken.append({**made, "prompt": f"number {number}"})
        except Refused as error:
            refused.append(str(error))

    threads = [threading.Thread(target=ask, args=(n,)) for n in range(50)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
    assert len(taken) == 10 and len(refused) == 40
    assert all("queue is full" in text for text in refused), refused
    assert sorted(job["position"] for job in taken) == list(range(1, 11))
    space.ask("cancel", id=first)
    for job in taken:
        assert space.wait(job["id"])["state"] == "succeeded"
    events = [(e["event"], e["prompt"]) for e in space.painted if e["event"] in ("begin", "end")]
    assert events[::2] == [("begin", p) for _, p in events[1::2]], "one ends before the next begins"
    begun = [prompt for event, prompt in events if event == "begin" and prompt.startswith("number ")]
    assert begun == [job["prompt"] for job in sorted(taken, key=lambda job: job["position"])], "first come, first run"


def test_a_click_reports_the_runs_that_the_queue_refused(space: Page) -> None:
    keyboard, session = Keyboard(space, space.http.get("/config").json()), secrets.token_hex(6)
    first = space.ask("generate", prompt="an endless first one", settings=SMALL)["id"]
    space.wait(first, "running")

    def click() -> dict[str, Any]:
        return keyboard.press("generate", session=session, prompt="a\nb\nc\nd", per_line=True)

    *_, taken, refused = [click() for _ in range(3)]
    queued = set(re.findall(r'data-id="(\w+)"', refused["queue"]))
    space.stop([*queued, first])
    again = click()
    space.stop(re.findall(r'data-id="(\w+)"', again["queue"]))
    assert len(queued) == 10 and "2 / 4: The queue is full" in refused["cost"]
    assert "The queue is full" not in taken["cost"] + again["cost"]


def test_a_job_gives_the_same_video_alone_and_after_others(space: Page) -> None:
    alone = space.make("the same", seed=5, settings=SMALL)["id"]
    space.make("another", preset="demo_t2v_base", seed=9, negative_prompt="blur", settings={**SMALL, "steps": 3})
    after = space.make("the same", seed=5, settings=SMALL)["id"]
    first, second = ((space.folder / f"{id}.mp4").read_bytes() for id in (alone, after))
    assert first == second


def test_two_models_are_never_in_memory(space: Page) -> None:
    kinds = ("demo_t2v_base", "demo_t2v_fp8", "demo_t2v_distill_lora") * 2
    settings = [{**SMALL, "steps": 2} if kind.endswith("base") else SMALL for kind in kinds]
    jobs = [space.ask("generate", prompt="x", preset=k, settings=s) for k, s in zip(kinds, settings, strict=True)]
    assert all(space.wait(job["id"])["state"] == "succeeded" for job in jobs)
    held = 0
    for event in space.painted:
        held += {"open": 1, "close": -1}.get(event["event"], 0)
        assert held in (0, 1)


def test_many_jobs_leave_nothing_behind(space: Page) -> None:
    server = psutil.Process(space.process.pid)

    def held() -> tuple[int, int, int]:
        return server.num_fds(), server.num_threads(), len(server.children(recursive=True))

    def run(count: int) -> None:
        for _ in range(count):
            space.make("one of many", settings=SMALL)

    run(3)
    before = held()
    run(9)
    assert eventually(lambda: all(b <= a + 4 for a, b in zip(before, held(), strict=True)))
    left = {path.suffix for path in space.folder.iterdir() if path.is_file()}
    assert left <= {".mp4", ".sqlite", ".sqlite-wal", ".sqlite-shm", ".json", ".jsonl", ".key"}, left


@pytest.mark.slow
def test_a_restart_keeps_jobs_results_and_predictions(tmp_path: Path) -> None:
    with launched(tmp_path / "outputs") as page:
        done = page.make("before the restart", settings=SMALL)
        key = (page.folder / "browser.key").read_text()
        running = page.ask("generate", prompt="an endless one that is cut off")["id"]
        page.wait(running, "running")
        waiting = page.ask("generate", prompt="one that waits", settings=SMALL)["id"]
        assert stop(page.process, signal.SIGTERM) == 143
    with launched(tmp_path / "outputs") as page:
        assert page.ask("status", id=done["id"])["state"] == "succeeded"
        assert page.http.get(f"/studio/{done['id']}/video.mp4").status_code == 200
        assert page.wait(running, "running"), "the job that was cut off runs again, before the others"
        page.ask("cancel", id=running)
        assert page.wait(waiting)["state"] == "succeeded", "the queued job runs"
        assert (page.folder / "browser.key").read_text() == key, "sessions survive"
        again = page.ask("generate", prompt="after the restart", settings=SMALL)
        assert again["predicted_seconds"] is not None
        assert page.wait(again["id"])["state"] == "succeeded"
        assert stop(page.process, signal.SIGINT) == 130
