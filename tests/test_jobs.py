"""The queue: nothing lost, nothing doubled, nothing stuck, whatever a job does."""

from __future__ import annotations

import gc
import io
import json
import logging
import random
import re
import sqlite3
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import TinyModels
from fake_engine import Garage, Script, tiny_mp4
from PIL import Image

from lightx2v import job_worker
from lightx2v.engine_config import EngineConfig
from lightx2v.engine_slot import explain, release
from lightx2v.errors import BadRequest, Busy, Cancelled, ConfigError, OutOfMemory, OutputError
from lightx2v.job_store import OVER, STATES
from lightx2v.jobs import Engine, Job, JobManager, UnknownJob
from lightx2v.media import probe, read_settings
from lightx2v.progress import CancelToken, OnProgress
from lightx2v.request import Request

TESTS = Path(__file__).parent
CONFIG = EngineConfig(model_path="models/a", model_cls="wan2.2_moe", task="t2v")
OTHER = EngineConfig(model_path="models/b", model_cls="wan2.2_moe", task="t2v")
PICTURED = EngineConfig(model_path="models/a", model_cls="wan2.2_moe", task="i2v")
TIMEOUT = 20.0


def ask(prompt: str = "calm", **fields: object) -> Request:
    return Request(prompt=prompt, **fields)  # type: ignore[arg-type]


@pytest.fixture
def garage() -> Garage:
    return Garage()


@pytest.fixture
def open_manager(garage: Garage, tmp_path: Path) -> Iterator[Callable[..., JobManager]]:
    """Makes managers on tmp_path and closes them after the test."""
    made: list[JobManager] = []

    def make(**options: object) -> JobManager:
        made.append(JobManager(options.pop("garage", garage), tmp_path, **options))  # type: ignore[arg-type]
        return made[-1]

    yield make
    for manager in made:
        manager.close()
    assert not [thread for thread in threading.enumerate() if thread.name == "lightx2v-jobs"]


@pytest.fixture
def manager(open_manager: Callable[..., JobManager]) -> JobManager:
    return open_manager(max_queue=1000)


def done(manager: JobManager, job: Job) -> Job:
    job = manager.wait(job.id, TIMEOUT)
    assert job.over, job
    return job


def hold(garage: Garage, prompt: str = "held", **options: object) -> threading.Event:
    """Scripts a run that stops half-way until the event is set."""
    event = threading.Event()
    garage.script[prompt] = Script(hold=event, **options)  # type: ignore[arg-type]
    return event


def start_held(manager: JobManager, garage: Garage, **options: object) -> tuple[Job, threading.Event]:
    event = hold(garage, **options)
    garage.started.clear()
    job = manager.submit(CONFIG, ask("held"))
    assert garage.started.wait(TIMEOUT)
    return job, event


# ---- one job ------------------------------------------------------------------------------------------------------


def test_a_job_becomes_a_video_with_its_report(manager: JobManager, tmp_path: Path) -> None:
    job = manager.submit(CONFIG, ask("a cat", seed=7), owner="alice", preset="t2v_base")
    assert job.state in ("queued", "running") and re.fullmatch("[0-9a-f]{32}", job.id)
    job = done(manager, job)
    assert job.state == "succeeded" and job.error is None
    assert job.path == tmp_path / f"{job.id}.mp4" and job.path.read_bytes() == tiny_mp4()
    assert read_settings(job.path)
    assert job.result is not None and job.result["seed"] == 7
    assert job.result["path"] == f"{job.id}.mp4" and job.result["preset"] == "t2v_base"
    assert job.config == CONFIG and job.request == ask("a cat", seed=7)
    assert job.started is not None and job.finished is not None and job.created <= job.started <= job.finished
    assert (job.owner, job.preset, job.position, job.progress, job.preview) == ("alice", "t2v_base", None, None, None)


def test_events_tell_the_whole_story_in_order(manager: JobManager) -> None:
    job = done(manager, manager.submit(CONFIG, ask()))
    events = manager.events(job.id)
    assert [event.id for event in events] == list(range(1, len(events) + 1))
    states = [event.data["state"] for event in events if event.kind == "state"]
    assert states == ["queued", "running", "succeeded"]
    stages = list(dict.fromkeys(event.data["stage"] for event in events if event.kind == "progress"))
    assert stages == ["load", "text", "denoise", "decode", "write"]
    steps = [(e.data["step"], e.data["expert"]) for e in events if e.data.get("stage") == "denoise"]
    assert steps == [(1, "high"), (2, "high"), (3, "low"), (4, "low")]
    assert json.loads(json.dumps(events[5].data)) == events[5].data
    assert manager.events(job.id, after=len(events) - 1) == events[-1:]
    assert manager.events(job.id, after=10**30) == [] and manager.events(job.id, after=-5) == events


def test_a_subscriber_sees_every_event_until_the_end(manager: JobManager, garage: Garage) -> None:
    garage.script["slow"] = Script(seconds=0.005)
    job = manager.submit(CONFIG, ask("slow"))
    seen = list(manager.subscribe(job.id))
    assert seen == manager.events(job.id) and seen[-1].data["state"] == "succeeded"
    assert list(manager.subscribe(job.id, after=seen[-1].id)) == []


def test_progress_is_visible_while_it_runs(manager: JobManager, garage: Garage) -> None:
    job, event = start_held(manager, garage)
    job = manager.get(job.id)
    assert job.state == "running" and job.progress is not None
    assert (job.progress.stage, job.progress.step, job.progress.total) == ("denoise", 1, 4)
    event.set()
    assert done(manager, job).progress is None


def test_waiting_ends_at_its_timeout(manager: JobManager, garage: Garage) -> None:
    job, event = start_held(manager, garage)
    started = time.monotonic()
    assert manager.wait(job.id, 0.05).state == "running"
    assert manager.wait_events(job.id, after=10**6, timeout=0.05) == []
    assert 0.1 <= time.monotonic() - started < 2
    event.set()


def test_previews_are_small_jpegs_at_most_twice_a_second(manager: JobManager, garage: Garage) -> None:
    calls: list[float] = []

    def preview() -> np.ndarray:
        calls.append(time.monotonic())
        return np.full((60, 104, 3), 200, np.uint8)

    event = hold(garage, steps=30, seconds=0.002, at=("denoise", 30), preview=preview)
    job = manager.submit(CONFIG, ask("held"))
    assert garage.started.wait(TIMEOUT)
    shown = manager.get(job.id).preview
    assert shown is not None and Image.open(io.BytesIO(shown)).size == (104, 60)
    event.set()
    assert done(manager, job).preview is None
    assert all(later - earlier >= job_worker.PREVIEW_SECONDS for earlier, later in zip(calls, calls[1:], strict=False))
    assert b"\xff\xd8\xff" not in (manager.folder / "jobs.sqlite").read_bytes()


def test_a_preview_that_fails_is_tried_once_and_costs_only_the_preview(
    manager: JobManager, garage: Garage, caplog: pytest.LogCaptureFixture
) -> None:
    garage.script["blind"] = Script(preview=lambda: 1 / 0)
    job = done(manager, manager.submit(CONFIG, ask("blind")))
    assert job.state == "succeeded"
    assert caplog.text.count("goes on without previews") == 1


def test_odd_ids_are_unknown_and_not_errors_of_another_kind(manager: JobManager) -> None:
    for id in ("", "0" * 32, "../x", "a" * 10**5, "\0", "\ud800", "%s", "' OR 1=1 --", 7, None):
        for method in (manager.get, manager.cancel, manager.requeue, manager.delete, manager.events, manager.wait):
            with pytest.raises(UnknownJob):
                method(id)  # type: ignore[operator]
        with pytest.raises(UnknownJob):
            manager.move(id, 1)  # type: ignore[arg-type]
    assert UnknownJob.status == 404
    with pytest.raises(UnknownJob):
        manager.find("nobody")


# ---- failures -----------------------------------------------------------------------------------------------------


class HostError(RuntimeError):
    pass


@pytest.mark.parametrize("stage", ["text", "denoise", "decode", "write"])
def test_an_error_ends_its_job_only(
    stage: str, manager: JobManager, garage: Garage, caplog: pytest.LogCaptureFixture
) -> None:
    garage.script["bad"] = Script(error=HostError("/home/user/secret token=abc"), at=(stage, 2))
    bad = manager.submit(CONFIG, ask("bad"))
    good = manager.submit(CONFIG, ask("good"))
    bad = done(manager, bad)
    assert bad.state == "failed" and bad.error is not None and bad.error["type"] == "HostError"
    assert not any(word in bad.error["message"] for word in ("secret", "abc", "/home", "Traceback"))
    assert bad.id in bad.error["message"] and bad.path is None
    assert "HostError: /home/user/secret" in caplog.text and "_incident" in caplog.text
    assert done(manager, good).state == "succeeded"
    assert manager.alive and manager.events(bad.id)[-1].data == {"state": "failed", "error": bad.error}


def test_after_a_bug_the_next_job_gets_a_fresh_engine_and_after_a_known_error_it_does_not(
    manager: JobManager, garage: Garage
) -> None:
    garage.script["user"] = Script(error=BadRequest("The image is too small."))
    garage.script["bug"] = Script(error=ValueError("?"))
    for prompt in ("user", "fine", "bug", "fine"):
        done(manager, manager.submit(CONFIG, ask(prompt)))
    assert len(garage.opened) == 2 and garage.most == 1


def test_our_own_errors_are_shown_as_they_are(manager: JobManager, garage: Garage) -> None:
    garage.script["nan"] = Script(nan=True)
    job = done(manager, manager.submit(CONFIG, ask("nan")))
    assert job.error == {
        "type": "NumericsError",
        "message": "NaN at step 2 of 4, attention torch_sdpa. Try dtype fp32.",
    }
    assert not (manager.folder / f"{job.id}.mp4").exists()


def out_of_memory_errors() -> list[BaseException]:
    import torch

    return [
        MemoryError(),
        OutOfMemory("Out of memory at 1280x720. Make the video smaller."),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB"),
        RuntimeError("CUDA error: out of memory"),
    ]


@pytest.mark.parametrize("index", range(4))
@pytest.mark.parametrize("stage", ["text", "denoise", "decode"])
def test_out_of_memory_gives_advice_frees_the_step_and_the_next_job_runs(
    stage: str, index: int, manager: JobManager, garage: Garage
) -> None:
    garage.script["huge"] = Script(error=out_of_memory_errors()[index], at=(stage, 2))
    huge = done(manager, manager.submit(CONFIG, ask("huge")))
    assert huge.state == "failed" and huge.error is not None and huge.error["type"] == "OutOfMemory"
    assert "smaller" in huge.error["message"]
    assert [ref for ref in garage.step_tensors if ref() is not None] == []
    assert done(manager, manager.submit(CONFIG, ask("small"))).state == "succeeded"
    assert len(garage.opened) == 1, "the weights are fine: no need to load them again"


def test_nothing_holds_the_frames_of_a_failed_step_even_through_causes(manager: JobManager, garage: Garage) -> None:
    inner = MemoryError("inner")
    try:
        try:
            raise inner
        except MemoryError as error:
            raise OutOfMemory("outer") from error
    except OutOfMemory as error:
        outer = error
    garage.script["chain"] = Script(error=outer)
    done(manager, manager.submit(CONFIG, ask("chain")))
    assert outer.__traceback__ is None and inner.__traceback__ is None
    assert [ref for ref in garage.step_tensors if ref() is not None] == []


def test_releasing_an_error_copes_with_circles() -> None:
    first, second = ValueError(1), ValueError(2)
    first.__context__, second.__context__ = second, first
    release(first)


def test_out_of_memory_while_loading_fails_the_job_and_loading_is_tried_again(
    manager: JobManager, garage: Garage
) -> None:
    garage.open_error = MemoryError()
    assert done(manager, manager.submit(CONFIG, ask())).state == "failed"
    garage.open_error = None
    assert done(manager, manager.submit(CONFIG, ask())).state == "succeeded"
    assert garage.alive == 1


def test_a_full_disk_says_so() -> None:
    assert "disk is full" in explain(OSError(28, "No space left on device"), "x")["message"]


@pytest.mark.parametrize("output", [b""])
def test_a_run_without_a_file_is_a_failure(output: bytes, manager: JobManager, garage: Garage) -> None:
    garage.script["empty"] = Script(output=output)
    job = done(manager, manager.submit(CONFIG, ask("empty")))
    assert job.state == "failed" and job.error is not None and job.error["type"] == "OutputError"


def test_a_lost_device_stops_the_worker_and_turns_health_red(
    open_manager: Callable[..., JobManager], garage: Garage
) -> None:
    manager = open_manager()
    garage.script["assert"] = Script(error=RuntimeError("CUDA error: device-side assert triggered"))
    first = manager.submit(CONFIG, ask("assert"))
    job = done(manager, first)
    assert job.state == "failed" and job.error is not None and "Restart" in job.error["message"]
    wait_until(lambda: not manager.alive)
    with pytest.raises(Busy, match="restart"):
        manager.submit(CONFIG, ask())
    assert manager.get(first.id).state == "failed"


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_killed_worker_turns_health_red_and_old_ids_still_answer(
    open_manager: Callable[..., JobManager], garage: Garage
) -> None:
    manager = open_manager()
    old = done(manager, manager.submit(CONFIG, ask()))
    assert manager.alive
    garage.script["kill"] = Script(error=SystemExit(1))
    killed = manager.submit(CONFIG, ask("kill"))
    job = done(manager, killed)
    assert job.state == "interrupted" and job.error is not None and "worker has stopped" in job.error["message"]
    wait_until(lambda: not manager.alive)
    assert manager.get(old.id).state == "succeeded"
    assert garage.alive == 0
    with pytest.raises(Busy):
        manager.submit(CONFIG, ask())
    manager.close()
    again = open_manager()
    again.requeue(job.id)
    garage.script.clear()
    assert done(again, job).state == "succeeded"


def test_an_engine_that_fails_to_close_does_not_stop_the_queue(
    open_manager: Callable[..., JobManager], caplog: pytest.LogCaptureFixture
) -> None:
    class Stuck(Garage):
        def __call__(self, *args: object, **options: object) -> object:  # type: ignore[override]
            engine = super().__call__(*args, **options)  # type: ignore[arg-type]
            engine.close = lambda: 1 / 0  # type: ignore[method-assign, assignment]
            return engine

    manager = open_manager(garage=Stuck())
    for config in (CONFIG, OTHER):
        assert done(manager, manager.submit(config, ask())).state == "succeeded"
    assert "closing the engine failed" in caplog.text


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + TIMEOUT
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


# ---- cancelling ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", ["text", "denoise", "decode", "write"])
def test_a_running_job_is_cancelled_within_a_step(stage: str, manager: JobManager, garage: Garage) -> None:
    job, _ = start_held(manager, garage, at=(stage, 2))
    after = manager.submit(CONFIG, ask("after"))
    started = time.monotonic()
    asked = manager.cancel(job.id)
    assert asked.state in ("running", "cancelled") and (asked.cancelling or asked.over)
    job = done(manager, job)
    assert time.monotonic() - started < 2
    assert job.state == "cancelled" and job.error is None and job.path is None
    assert not (manager.folder / f"{job.id}.mp4").exists()
    assert done(manager, after).state == "succeeded"
    assert len(garage.opened) == 1, "a cancelled run leaves a sound engine"


def test_cancelling_while_the_model_loads_stops_the_loading(manager: JobManager, garage: Garage) -> None:
    garage.open_seconds = 60
    job = manager.submit(CONFIG, ask())
    wait_until(lambda: manager.get(job.id).progress is not None)
    manager.cancel(job.id)
    assert done(manager, job).state == "cancelled" and garage.opened == []


def test_a_queued_job_is_cancelled_at_once_and_never_runs(manager: JobManager, garage: Garage) -> None:
    _, event = start_held(manager, garage)
    waiting = manager.submit(CONFIG, ask("waiting"))
    assert manager.cancel(waiting.id).state == "cancelled"
    event.set()
    done(manager, manager.submit(CONFIG, ask("last")))
    assert garage.ran == ["held", "last"]


def test_cancelling_again_or_too_late_changes_nothing(manager: JobManager, garage: Garage) -> None:
    garage.script["bad"] = Script(error=ValueError())
    held, _ = start_held(manager, garage)
    for _ in range(3):
        manager.cancel(held.id)
    assert done(manager, held).state == "cancelled"
    assert manager.cancel(held.id).state == "cancelled"
    for prompt, state in (("fine", "succeeded"), ("bad", "failed")):
        job = done(manager, manager.submit(CONFIG, ask(prompt)))
        assert manager.cancel(job.id) == job and job.state == state
        assert len([e for e in manager.events(job.id) if e.data.get("state") == state]) == 1


def test_a_cancelled_job_never_succeeds_even_if_the_engine_does_not_listen(manager: JobManager, garage: Garage) -> None:
    job, event = start_held(manager, garage, ignore_cancel=True)
    assert manager.cancel(job.id).cancelling
    event.set()
    job = done(manager, job)
    assert job.state == "cancelled" and job.result is None
    assert not (manager.folder / f"{job.id}.mp4").exists()
    assert done(manager, manager.submit(CONFIG, ask("next"))).state == "succeeded"


def test_an_error_after_a_cancel_is_still_a_cancelled_job(manager: JobManager, garage: Garage) -> None:
    job, event = start_held(manager, garage, ignore_cancel=True, error=RuntimeError("broken pipe"))
    manager.cancel(job.id)
    event.set()
    assert done(manager, job).state == "cancelled"


def test_an_engine_that_cancels_by_itself_gives_a_cancelled_job(manager: JobManager, garage: Garage) -> None:
    garage.script["own"] = Script(error=Cancelled("The run was cancelled."))
    assert done(manager, manager.submit(CONFIG, ask("own"))).state == "cancelled"


# ---- the queue ----------------------------------------------------------------------------------------------------


def test_jobs_run_in_order_and_know_their_place(manager: JobManager, garage: Garage) -> None:
    first, event = start_held(manager, garage)
    others = [manager.submit(CONFIG, ask(f"job {number}")) for number in range(4)]
    assert [job.position for job in others] == [1, 2, 3, 4]
    assert manager.get(first.id).position is None and manager.waiting == 4
    assert manager.counts() == {**dict.fromkeys(STATES, 0), "running": 1, "queued": 4}
    event.set()
    for job in others:
        assert done(manager, job).state == "succeeded"
    assert garage.ran == ["held", "job 0", "job 1", "job 2", "job 3"]


def test_a_full_queue_is_busy_and_says_how_full(open_manager: Callable[..., JobManager], garage: Garage) -> None:
    manager = open_manager(max_queue=2)
    _, event = start_held(manager, garage)
    waiting = [manager.submit(CONFIG, ask()) for _ in range(2)]
    with pytest.raises(Busy, match="2 jobs are waiting") as caught:
        manager.submit(CONFIG, ask("too many"))
    assert caught.value.status == 429
    cancelled = manager.cancel(waiting[0].id)
    manager.submit(CONFIG, ask("fits"))
    with pytest.raises(Busy):
        manager.requeue(cancelled.id)
    event.set()


def test_50_submissions_at_once_run_one_by_one(open_manager: Callable[..., JobManager], garage: Garage) -> None:
    manager = open_manager(max_queue=20)
    _, event = start_held(manager, garage)
    start = threading.Barrier(50)

    def submit(number: int) -> Job | Busy:
        start.wait()
        try:
            return manager.submit(CONFIG, ask(f"{number}"), owner=f"user {number}")
        except Busy as busy:
            return busy

    with ThreadPoolExecutor(50) as pool:
        answers = list(pool.map(submit, range(50)))
    jobs = [answer for answer in answers if isinstance(answer, Job)]
    assert len(jobs) == 20 and len({job.id for job in jobs}) == 20
    assert sorted(job.position or 0 for job in jobs) == list(range(1, 21))
    in_order = [job.request.prompt for job in sorted(jobs, key=lambda job: job.position or 0)]
    event.set()
    assert {done(manager, job).state for job in jobs} == {"succeeded"}
    assert garage.ran[1:] == in_order
    assert garage.most_running == 1


def test_a_job_can_be_moved(manager: JobManager, garage: Garage) -> None:
    _, event = start_held(manager, garage)
    a, b, c = (manager.submit(CONFIG, ask(name)) for name in "abc")
    assert manager.move(c.id, 1).position == 1
    assert manager.move(a.id, 99).position == 3
    d = manager.submit(CONFIG, ask("d"))
    assert d.position == 4
    event.set()
    done(manager, d)
    assert garage.ran == ["held", "c", "b", "a", "d"]
    with pytest.raises(BadRequest, match="succeeded; only a job that waits can be moved"):
        manager.move(b.id, 1)


def test_a_waiting_job_can_be_changed_and_keeps_its_place(manager: JobManager, garage: Garage) -> None:
    held, event = start_held(manager, garage)
    first = manager.submit(CONFIG, ask("first"))
    manager.submit(CONFIG, ask("second"))
    changed = manager.edit(first.id, ask("better"))
    assert changed.position == 1 and changed.request.prompt == "better"
    with pytest.raises(BadRequest, match="running; only a job that waits can be changed"):
        manager.edit(held.id, ask("no"))
    with pytest.raises(BadRequest, match="task"):
        manager.edit(first.id, ask(task="i2v", image_path="x.png"))
    event.set()
    done(manager, first)
    assert garage.ran[:2] == ["held", "better"]


def test_a_job_the_engine_could_never_run_is_refused_when_submitted(manager: JobManager) -> None:
    with pytest.raises(BadRequest, match="task"):
        manager.submit(PICTURED, ask())
    assert manager.list() == []


def test_seconds_until_the_start_add_up(open_manager: Callable[..., JobManager], garage: Garage) -> None:
    manager = open_manager(predict=lambda config, request: request.frames / 1.0, clock=lambda: 1000.0)
    garage.script["slow"] = Script(at=("text", 1), hold=(event := threading.Event()))
    manager.submit(CONFIG, ask("slow", frames=81))
    assert garage.started.wait(TIMEOUT)
    jobs = [manager.submit(CONFIG, ask(frames=frames)) for frames in (5, 9, 13)]
    assert [manager.get(job.id).starts_in for job in jobs] == [81.0, 86.0, 95.0]
    assert [job.starts_in for job in manager.list(states=["queued"])] == [95.0, 86.0, 81.0]
    event.set()


# ---- one engine ---------------------------------------------------------------------------------------------------


def test_the_engine_is_kept_while_the_config_is_equal_and_closed_before_another(
    manager: JobManager, garage: Garage
) -> None:
    equal = EngineConfig.from_json(CONFIG.to_json())
    for config in (CONFIG, equal, CONFIG, OTHER, OTHER, CONFIG):
        done(manager, manager.submit(config, ask()))
    assert garage.opened == [CONFIG, OTHER, CONFIG]
    assert garage.most == 1
    manager.close()
    assert garage.alive == 0


def test_submitting_during_a_switch_waits_and_never_loads_two(manager: JobManager, garage: Garage) -> None:
    garage.open_seconds = 0.05
    configs = [CONFIG, OTHER] * 4
    jobs = [manager.submit(config, ask(f"{number}")) for number, config in enumerate(configs)]
    assert {done(manager, job).state for job in jobs} == {"succeeded"}
    assert garage.opened == configs and garage.most == 1


# ---- owners -------------------------------------------------------------------------------------------------------


def test_owners_see_their_own_jobs_only(manager: JobManager) -> None:
    mine = [manager.submit(CONFIG, ask(f"mine {n}"), owner="me") for n in range(2)]
    yours = manager.submit(CONFIG, ask("yours"), owner="you")
    assert [job.id for job in manager.list("me")] == [job.id for job in reversed(mine)]
    assert [job.id for job in manager.list("you")] == [yours.id]
    assert manager.list("") == [] and manager.list("' OR 1 --") == []
    assert len(manager.list()) == 3 and len(manager.list(limit=2)) == 2 and manager.list(limit=-1) == []


def test_two_users_with_the_same_prompt_and_picture_share_nothing(manager: JobManager, tmp_path: Path) -> None:
    uploads = []
    for colour in ("red", "blue"):
        folder = tmp_path / colour
        folder.mkdir()
        Image.new("RGB", (32, 32), colour).save(folder / "image.png")
        uploads.append(folder / "image.png")
    request = [ask(task="i2v", image_path=str(path)) for path in uploads]
    a, b = (manager.submit(PICTURED, r, owner=o) for r, o in zip(request, "ab", strict=True))
    assert a.id != b.id and a.request.image_path != b.request.image_path
    for job, upload in ((a, uploads[0]), (b, uploads[1])):
        assert Path(job.request.image_path or "").read_bytes() == upload.read_bytes()
    a, b = done(manager, a), done(manager, b)
    assert a.path != b.path and a.path is not None and b.path is not None
    manager.delete(a.id)
    assert not a.path.exists() and b.path.exists()


def test_the_same_client_id_gives_the_same_job(manager: JobManager) -> None:
    def submit(number: int) -> Job:
        return manager.submit(CONFIG, ask("once"), owner="me", client_id="abc")

    with ThreadPoolExecutor(8) as pool:
        jobs = list(pool.map(submit, range(8)))
    assert len({job.id for job in jobs}) == 1 and len(manager.list()) == 1
    assert manager.find("abc", owner="me").id == jobs[0].id
    assert manager.submit(CONFIG, ask("once"), owner="you", client_id="abc").id != jobs[0].id
    with pytest.raises(BadRequest, match="used for another job"):
        manager.submit(CONFIG, ask("other"), owner="me", client_id="abc")
    done(manager, jobs[0])
    assert submit(0).state == "succeeded"


@pytest.mark.parametrize("label", ["x" * 201, "a\nb", "\0", "\ud800", "é", 7])
def test_labels_are_short_and_printable(label: object, manager: JobManager) -> None:
    for name in ("owner", "preset", "client_id"):
        with pytest.raises(BadRequest, match=name):
            manager.submit(CONFIG, ask(), **{name: label})  # type: ignore[arg-type]


# ---- pictures -----------------------------------------------------------------------------------------------------


def test_a_picture_is_copied_so_the_upload_may_go(manager: JobManager, garage: Garage, tmp_path: Path) -> None:
    upload = tmp_path / "upload.png"
    Image.new("RGB", (32, 32), "red").save(upload)
    _, event = start_held(manager, garage)
    job = manager.submit(PICTURED, ask(task="flf2v", image_path=str(upload), last_frame_path=str(upload)))
    upload.unlink()
    own = [Path(job.request.image_path or ""), Path(job.request.last_frame_path or "")]
    assert len({*own}) == 2 and all(path.is_file() and path.name.startswith(job.id) for path in own)
    edited = manager.edit(job.id, replace(job.request, prompt="same pictures"))
    assert edited.request.image_path == job.request.image_path
    event.set()
    manager.delete(done(manager, job).id)
    assert not any(path.exists() for path in own)


def test_a_bad_picture_is_refused_when_submitted_and_leaves_nothing(manager: JobManager, tmp_path: Path) -> None:
    upload = tmp_path / "upload.png"
    Image.new("RGB", (32, 32), "red").save(upload)
    (tmp_path / "bad.png").write_bytes(b"GIF89a")
    before = set(tmp_path.iterdir())
    with pytest.raises(BadRequest, match="JPEG, PNG or WebP"):
        manager.submit(PICTURED, ask(task="flf2v", image_path=str(upload), last_frame_path=str(tmp_path / "bad.png")))
    assert set(tmp_path.iterdir()) == before and manager.list() == []


# ---- history ------------------------------------------------------------------------------------------------------


def test_deleting_removes_the_job_and_all_its_files(manager: JobManager, garage: Garage) -> None:
    job = done(manager, manager.submit(CONFIG, ask()))
    other = done(manager, manager.submit(CONFIG, ask()))
    (manager.folder / f"{job.id}.jpg").write_bytes(b"poster")
    manager.delete(job.id)
    assert [file.name for file in manager.folder.glob("*.mp4")] == [f"{other.id}.mp4"]
    assert not list(manager.folder.glob(f"{job.id}*"))
    for method in (manager.get, manager.delete, manager.events):
        with pytest.raises(UnknownJob):
            method(job.id)
    held, event = start_held(manager, garage)
    with pytest.raises(BadRequest, match="Cancel it first"):
        manager.delete(held.id)
    waiting = manager.submit(CONFIG, ask("waiting"))
    manager.delete(waiting.id)
    event.set()
    done(manager, held)
    assert "waiting" not in garage.ran


def test_waiting_for_a_job_that_is_deleted_ends(manager: JobManager, garage: Garage) -> None:
    _, event = start_held(manager, garage)
    job = manager.submit(CONFIG, ask("waiting"))
    with ThreadPoolExecutor(1) as pool:
        waiter = pool.submit(manager.wait, job.id, TIMEOUT)
        time.sleep(0.05)
        manager.delete(job.id)
        with pytest.raises(UnknownJob):
            waiter.result(TIMEOUT)
    event.set()


class Clock:
    now = 1_000_000.0

    def __call__(self) -> float:
        return self.now


def test_old_results_go_by_age_and_never_what_waits_or_runs(
    open_manager: Callable[..., JobManager], garage: Garage
) -> None:
    clock = Clock()
    manager = open_manager(ttl=3600, clock=clock)
    old = done(manager, manager.submit(CONFIG, ask("old")))
    clock.now += 3000
    young = done(manager, manager.submit(CONFIG, ask("young")))
    held, event = start_held(manager, garage)
    waiting = manager.submit(CONFIG, ask("waiting"))
    clock.now += 1000
    assert manager.purge() == [old.id]
    assert not list(manager.folder.glob(f"{old.id}*"))
    clock.now += 10**6
    assert manager.purge() == [young.id]
    assert {job.id for job in manager.list()} == {held.id, waiting.id}
    event.set()
    assert done(manager, waiting).state == "succeeded"


def test_results_go_by_size_the_oldest_first_and_never_the_newest(
    open_manager: Callable[..., JobManager], garage: Garage
) -> None:
    size = len(tiny_mp4())
    manager = open_manager(size_cap=2 * size + 10)
    garage.script["big"] = Script(output=bytes(10 * size))
    jobs = [done(manager, manager.submit(CONFIG, ask(f"{n}"))) for n in range(4)]
    foreign = manager.folder / "holiday.mp4"
    foreign.write_bytes(bytes(10 * size))
    wait_until(lambda: len(manager.list()) == 2)
    assert {job.id for job in manager.list()} == {jobs[2].id, jobs[3].id}
    big = done(manager, manager.submit(CONFIG, ask("big")))
    wait_until(lambda: len(manager.list()) == 1)
    assert manager.get(big.id).path is not None and foreign.exists()


def test_without_limits_nothing_is_deleted(manager: JobManager) -> None:
    done(manager, manager.submit(CONFIG, ask()))
    assert manager.purge() == []


# ---- restarts -----------------------------------------------------------------------------------------------------


def test_queued_jobs_run_after_a_restart_and_the_running_one_is_interrupted(
    open_manager: Callable[..., JobManager], garage: Garage
) -> None:
    manager = open_manager()
    finished = done(manager, manager.submit(CONFIG, ask("finished"), owner="me"))
    held, _ = start_held(manager, garage)
    waiting = [manager.submit(CONFIG, ask(f"waiting {n}", seed=n), owner="me") for n in range(2)]
    assert manager.close()
    assert garage.alive == 0 and garage.ran == ["finished", "held"]
    with pytest.raises(Busy):
        manager.get(held.id)

    again = open_manager()
    assert [done(again, job).state for job in waiting] == ["succeeded", "succeeded"]
    assert garage.ran[2:] == ["waiting 0", "waiting 1"]
    assert again.get(finished.id) == finished
    job = again.get(held.id)
    assert job.state == "interrupted" and job.error is not None and "Run it again" in job.error["message"]
    last = again.events(held.id)[-1].id
    garage.script.clear()
    assert again.requeue(held.id).state in ("queued", "running")
    job = done(again, held)
    assert job.state == "succeeded" and job.error is None and job.path is not None
    assert [event.id for event in again.events(held.id, last)][0] == last + 1
    assert again.get(waiting[1].id).request.seed == 1


def test_a_process_that_is_killed_loses_nothing_but_the_run(tmp_path: Path, garage: Garage) -> None:
    code = f"""
import sys, time
sys.path.insert(0, {str(TESTS)!r})
from test_jobs import *
garage = Garage()
garage.script["held"] = Script(hold=threading.Event())
manager = JobManager(garage, {str(tmp_path)!r})
ids = [manager.submit(CONFIG, ask(prompt)).id for prompt in ("first", "held", "third")]
manager.wait(ids[0]); garage.started.wait()
print(*ids, flush=True)
time.sleep(60)
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, cwd=TESTS.parent)
    assert process.stdout is not None
    with process.stdout:
        ids = process.stdout.readline().decode().split()
        with pytest.raises(ConfigError, match="Another process"):
            JobManager(garage, tmp_path)
        (tmp_path / ".lightx2v-abc").mkdir()
        (tmp_path / ".lightx2v-abc" / "video.mp4").write_bytes(b"half")
        process.kill()
        process.wait()
    with JobManager(garage, tmp_path) as manager:
        assert manager.wait(ids[2], TIMEOUT).state == "succeeded"
        assert [manager.get(id).state for id in ids] == ["succeeded", "interrupted", "succeeded"]
        assert not (tmp_path / ".lightx2v-abc").exists()


def test_a_second_manager_on_the_folder_is_refused(manager: JobManager, garage: Garage) -> None:
    with pytest.raises(ConfigError, match="Another process"):
        JobManager(garage, manager.folder)
    assert done(manager, manager.submit(CONFIG, ask())).state == "succeeded"


def test_an_engine_that_hangs_does_not_keep_the_program_from_ending(
    open_manager: Callable[..., JobManager], garage: Garage
) -> None:
    manager = open_manager()
    job, event = start_held(manager, garage, ignore_cancel=True)
    started = time.monotonic()
    assert not manager.close(timeout=0.1)
    assert time.monotonic() - started < 2
    event.set()
    assert manager.close()
    assert open_manager().get(job.id).state == "interrupted"


def test_requeueing_what_succeeded_waits_or_runs_changes_nothing(manager: JobManager, garage: Garage) -> None:
    finished = done(manager, manager.submit(CONFIG, ask()))
    with pytest.raises(BadRequest, match="Submit it anew"):
        manager.requeue(finished.id)
    held, event = start_held(manager, garage)
    waiting = manager.submit(CONFIG, ask("waiting"))
    assert manager.requeue(held.id).state == "running" and manager.requeue(waiting.id).position == 1
    event.set()


def test_jobs_of_another_version_are_dropped_and_the_others_kept(
    open_manager: Callable[..., JobManager], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    manager = open_manager()
    odd, kept = (done(manager, manager.submit(CONFIG, ask())) for _ in range(2))
    manager.close()
    with sqlite3.connect(tmp_path / "jobs.sqlite") as db:
        db.execute('UPDATE jobs SET request = \'{"prompt": 1, "wings": 2}\' WHERE id = ?', (odd.id,))
    db.close()
    again = open_manager()
    assert [job.id for job in again.list()] == [kept.id]
    assert "from another version" in caplog.text and (tmp_path / f"{odd.id}.mp4").exists()


def test_a_database_that_cannot_be_used_is_named(tmp_path: Path, garage: Garage) -> None:
    (tmp_path / "jobs.sqlite").write_bytes(b"this is not a database, it is a text" * 100)
    with pytest.raises(OutputError, match="jobs.sqlite"):
        JobManager(garage, tmp_path)
    with pytest.raises(OutputError):
        JobManager(garage, "/proc/nowhere")
    newer = tmp_path / "newer"
    with JobManager(garage, newer):
        pass
    with sqlite3.connect(newer / "jobs.sqlite") as db:
        db.execute("PRAGMA user_version = 99")
    db.close()
    with pytest.raises(ConfigError, match="newer version"):
        JobManager(garage, newer)


def test_a_full_disk_under_the_database_delays_and_loses_nothing(
    manager: JobManager, garage: Garage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(job_worker, "RETRY_SECONDS", 0.01)
    held, event = start_held(manager, garage)
    pages = manager._store._db.execute("PRAGMA page_count").fetchone()[0]
    with manager._lock:
        manager._store._db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
        manager._store._db.execute(f"PRAGMA max_page_count = {pages}")
        with pytest.raises(OutputError, match="disk full"):
            while True:
                manager.submit(CONFIG, ask("x" * 10_000))
    event.set()
    time.sleep(0.1)
    assert manager.alive
    with manager._lock:
        manager._store._db.execute("PRAGMA max_page_count = 1000000")
    assert done(manager, held).state == "succeeded"
    assert done(manager, manager.submit(CONFIG, ask())).state == "succeeded"


# ---- the real engine ----------------------------------------------------------------------------------------------


def test_the_real_engine_survives_out_of_memory_and_cancel_and_repeats_itself_exactly(
    open_manager: Callable[..., JobManager],
    tiny: TinyModels,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    import torch

    from lightx2v.config import resolve
    from lightx2v.models.dit import WanDiT
    from lightx2v.pipeline import LightX2VPipeline

    def open_pipeline(config: EngineConfig, *, preset: str, on_progress: OnProgress, cancel: CancelToken) -> Engine:
        return LightX2VPipeline.from_config(config, preset=preset, on_progress=on_progress)

    manager = open_manager(garage=open_pipeline)
    size = {"height": 32, "width": 48, "frames": 5}
    resolved = resolve({"model_path": str(tiny.t2v), "device": "cpu"}, size | {"steps": 4})
    request = Request(prompt="a red ball", **resolved.request)
    first = done(manager, manager.submit(resolved.engine, request, preset="tiny"))
    assert first.state == "succeeded" and first.path is not None, first.error
    assert probe(first.path).frames == 5 and "goes on without previews" not in caplog.text
    assert first.result is not None and len(first.result["timings"]["steps"]) == 4

    forward, calls, started = WanDiT.forward, [0], threading.Event()
    refs: list[weakref.ref[torch.Tensor]] = []

    def failing(self: WanDiT, *args: Any, **options: Any) -> Any:
        velocity = forward(self, *args, **options)
        refs.append(weakref.ref(velocity[0]))
        calls[0] += 1
        if calls[0] == 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9.00 GiB.")
        return velocity

    monkeypatch.setattr(WanDiT, "forward", failing)
    starved = done(manager, manager.submit(resolved.engine, request))
    assert starved.state == "failed" and starved.error is not None and starved.error["type"] == "OutOfMemory"
    assert [ref for ref in refs if ref() is not None] == []

    def slow(self: WanDiT, *args: Any, **options: Any) -> Any:
        started.set()
        time.sleep(0.02)
        return forward(self, *args, **options)

    monkeypatch.setattr(WanDiT, "forward", slow)
    long = manager.submit(resolved.engine, replace(request, steps=200))
    assert started.wait(TIMEOUT)
    asked = time.monotonic()
    manager.cancel(long.id)
    assert done(manager, long).state == "cancelled" and time.monotonic() - asked < 2

    monkeypatch.setattr(WanDiT, "forward", forward)
    again = done(manager, manager.submit(resolved.engine, request, preset="tiny"))
    assert again.path is not None and again.path.read_bytes() == first.path.read_bytes()
    assert sorted(file.suffix for file in manager.folder.iterdir() if file.suffix == ".mp4") == [".mp4", ".mp4"]


# ---- all together -------------------------------------------------------------------------------------------------


@pytest.fixture
def quick_gc() -> Iterator[None]:
    """The session's other objects, torch's above all, would make each of a hundred collections take 0.3 s."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.mark.usefixtures("quick_gc")
def test_soak_200_mixed_jobs_leave_nothing_behind(
    manager: JobManager, garage: Garage, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.CRITICAL)
    dice = random.Random(0)
    stages = ("text", "denoise", "decode", "write")
    outcomes: dict[str, Callable[[], Script]] = {
        "fine": lambda: Script(seconds=0.0005),
        "error": lambda: Script(error=ValueError("x"), at=(dice.choice(stages), 2)),
        "oom": lambda: Script(error=MemoryError(), at=(dice.choice(stages), 2)),
        "nan": lambda: Script(nan=True),
        "cancel": lambda: Script(seconds=0.001),
        "deaf": lambda: Script(seconds=0.0005, ignore_cancel=True),
    }
    threads, started = threading.active_count(), time.monotonic()
    kinds = dice.choices(list(outcomes), weights=(5, 2, 2, 1, 2, 1), k=200)
    for number, kind in enumerate(kinds):
        garage.script[f"{number}"] = outcomes[kind]()

    def client(number: int) -> tuple[int, Job]:
        job = manager.submit(dice.choice([CONFIG] * 9 + [OTHER]), ask(f"{number}"), owner=f"{number % 7}")
        if kinds[number] in ("cancel", "deaf"):
            time.sleep(dice.random() * 0.01)
            manager.cancel(job.id)
        return number, job

    with ThreadPoolExecutor(16) as pool:
        jobs = dict(pool.map(client, range(200)))
    ended = {number: done(manager, job) for number, job in jobs.items()}
    expected = {
        "fine": "succeeded",
        "error": "failed",
        "oom": "failed",
        "nan": "failed",
        "cancel": "cancelled",
        "deaf": "cancelled",
    }
    wrong = [(kinds[n], job.state) for n, job in ended.items() if job.state != expected[kinds[n]]]
    assert wrong == []
    assert time.monotonic() - started < 30
    assert garage.most == 1 and garage.most_running == 1 and len(garage.ran) == len(set(garage.ran))
    assert manager.waiting == 0 and sum(manager.counts()[state] for state in OVER) == 200
    videos = {f"{job.id}.mp4" for job in ended.values() if job.state == "succeeded"}
    assert {file.name for file in tmp_path.iterdir() if not file.name.startswith("jobs.sqlite")} == videos
    gc.collect()
    assert [ref for ref in garage.step_tensors if ref() is not None] == []
    assert threading.active_count() == threads
    assert done(manager, manager.submit(CONFIG, ask())).state == "succeeded"
