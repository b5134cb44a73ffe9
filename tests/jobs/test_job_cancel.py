"""Cancelling a job: at once, in every stage, as often as one likes."""

from __future__ import annotations

import time

import pytest
from fake_engine import Garage, Script
from job_runs import CONFIG, ask, done, start_held
from patience import eventually

from lightx2v.errors import Cancelled
from lightx2v.jobs.queue import JobManager


@pytest.mark.slow
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
    eventually(lambda: manager.get(job.id).progress is not None)
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
