"""What stays of finished jobs, and for how long."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
from fake_engine import Garage, Script, tiny_mp4
from job_runs import CONFIG, ask, done, start_held
from patience import PATIENCE, eventually

from lightx2v.errors import BadRequest
from lightx2v.jobs.queue import JobManager
from lightx2v.jobs.store import UnknownJob

pytestmark = pytest.mark.slow


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
        waiter = pool.submit(manager.wait, job.id, PATIENCE)
        time.sleep(0.05)
        manager.delete(job.id)
        with pytest.raises(UnknownJob):
            waiter.result(PATIENCE)
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
    eventually(lambda: len(manager.list()) == 2)
    assert {job.id for job in manager.list()} == {jobs[2].id, jobs[3].id}
    big = done(manager, manager.submit(CONFIG, ask("big")))
    eventually(lambda: len(manager.list()) == 1)
    assert manager.get(big.id).path is not None and foreign.exists()


def test_without_limits_nothing_is_deleted(manager: JobManager) -> None:
    done(manager, manager.submit(CONFIG, ask()))
    assert manager.purge() == []
