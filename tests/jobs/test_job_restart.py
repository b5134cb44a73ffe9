"""A process that ends, is killed or finds a full disk loses nothing but the run."""

from __future__ import annotations

import resource
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from fake_engine import Garage
from job_runs import CONFIG, ask, done, start_held
from patience import PATIENCE, eventually

from lightx2v.errors import BadRequest, Busy, ConfigError, OutputError
from lightx2v.jobs import worker as job_worker
from lightx2v.jobs.queue import JobManager

SUPPORT = Path(__file__).parents[1] / "support"


@pytest.mark.slow
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


@pytest.mark.slow
def test_a_process_that_is_killed_loses_nothing_but_the_run(tmp_path: Path, garage: Garage) -> None:
    code = f"""
import sys, time
sys.path.insert(0, {str(SUPPORT)!r})
import threading
from fake_engine import Garage, Script
from job_runs import CONFIG, ask
from lightx2v.jobs.queue import JobManager
garage = Garage()
garage.script["held"] = Script(hold=threading.Event())
manager = JobManager(garage, {str(tmp_path)!r})
ids = [manager.submit(CONFIG, ask(prompt)).id for prompt in ("first", "held", "third")]
manager.wait(ids[0]); garage.started.wait()
print(*ids, flush=True)
time.sleep(60)
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, cwd=SUPPORT.parents[1])
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
        assert manager.wait(ids[2], PATIENCE).state == "succeeded"
        assert [manager.get(id).state for id in ids] == ["succeeded", "interrupted", "succeeded"]
        assert not (tmp_path / ".lightx2v-abc").exists()


@pytest.mark.slow
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
    with pytest.raises(BadRequest, match="Submit a new job"):
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
    assert "which another version wrote" in caplog.text and (tmp_path / f"{odd.id}.mp4").exists()


def test_a_database_that_cannot_be_used_is_named(tmp_path: Path, garage: Garage) -> None:
    (tmp_path / "jobs.sqlite").mkdir()
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


@contextmanager
def no_file_grows_beyond(size: int) -> Iterator[None]:
    """The system refuses this process every write past `size` bytes of a file, as a full disk would."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_under_the_database_delays_and_loses_nothing(
    manager: JobManager, garage: Garage, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(job_worker, "RETRY_SECONDS", 0.01)
    held, event = start_held(manager, garage)
    with no_file_grows_beyond((manager.folder / "jobs.sqlite-wal").stat().st_size):
        with pytest.raises(OutputError, match="Is the disk full"):
            manager.submit(CONFIG, ask("no room"))
        event.set()
        eventually(lambda: caplog.text.count("cannot be recorded yet") > 1)
        assert manager.alive and manager.get(held.id).state == "running"
    assert done(manager, held).state == "succeeded"
    assert done(manager, manager.submit(CONFIG, ask())).state == "succeeded"
    assert [job.request.prompt for job in manager.list()] == ["calm", "held"]
