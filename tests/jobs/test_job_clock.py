"""Jobs under a clock that is put back, and the column that keeps their order then."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable

import pytest
from fake_engine import Garage, tiny_mp4
from job_runs import CONFIG, ask, done
from patience import eventually

from lightx2v.jobs.queue import JobManager


def test_a_clock_that_is_put_back_does_not_make_new_videos_old(open_manager: Callable[..., JobManager]) -> None:
    now = [1e9]
    manager = open_manager(size_cap=2 * len(tiny_mp4()) + 10, ttl=10_000, clock=lambda: now[0])
    jobs = []
    for n in range(5):
        jobs.append(done(manager, manager.submit(CONFIG, ask(f"{n}"))))
        now[0] -= 3000
        eventually(lambda: len(manager.list()) <= 2)
        assert {job.id for job in manager.list()} == {job.id for job in jobs[-2:]}


def test_age_counts_whatever_the_order(open_manager: Callable[..., JobManager]) -> None:
    now = [1e9]
    manager = open_manager(size_cap=10**9, ttl=1000, clock=lambda: now[0])
    first = done(manager, manager.submit(CONFIG, ask("first")))
    now[0] -= 900
    done(manager, manager.submit(CONFIG, ask("second")))
    now[0] += 1100
    manager.purge()  # the worker does so too, at times of its own
    assert [job.id for job in manager.list()] == [first.id]
    now[0] += 1000
    manager.purge()
    assert not manager.list()


@pytest.mark.slow
def test_jobs_of_the_first_version_are_older_than_those_that_end_now(
    open_manager: Callable[..., JobManager], garage: Garage
) -> None:
    now = [1e9]
    manager = open_manager(clock=lambda: now[0])
    folder = manager.folder
    old = [done(manager, manager.submit(CONFIG, ask(f"{n}"))) for n in range(2)]
    manager.close()
    with sqlite3.connect(folder / "jobs.sqlite") as db:
        db.execute("ALTER TABLE jobs DROP COLUMN ending")
        db.execute("PRAGMA user_version = 1")
    db.close()
    now[0] -= 5000
    with JobManager(garage, folder, size_cap=2 * len(tiny_mp4()) + 10, clock=lambda: now[0]) as again:
        new = done(again, again.submit(CONFIG, ask("new")))
        eventually(lambda: len(again.list()) == 2)
        assert {job.id for job in again.list()} == {old[1].id, new.id}
