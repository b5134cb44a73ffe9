"""A process that ends, is killed or finds a full disk loses nothing but the run."""

from __future__ import annotations

import resource
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from fake_engine import Garage, Script
from job_runs import CONFIG, ask, done, start_held
from patience import PATIENCE, eventually

from lightx2v.errors import BadRequest, Busy, ConfigError, GroupFailed, OutputError
from lightx2v.jobs import worker as job_worker
from lightx2v.jobs.queue import JobManager
from lightx2v.jobs.store import Job

SUPPORT = Path(__file__).parents[1] / "support"


@pytest.mark.slow
def test_after_a_restart_the_running_job_goes_on_first_and_then_the_queued_ones_run(
    open_manager: Callable[..., JobManager], garage: Garage
) -> None:
    manager = open_manager()
    finished = done(manager, manager.submit(CONFIG, ask("finished"), owner="me"))
    held, _ = start_held(manager, garage, saves=b"half of it")
    waiting = [manager.submit(CONFIG, ask(f"waiting {n}", seed=n), owner="me") for n in range(2)]
    last = manager.events(held.id)[-1].id
    assert manager.close()
    assert garage.alive == 0 and garage.ran == ["finished", "held"]
    with pytest.raises(Busy):
        manager.get(held.id)

    garage.script.clear()
    again = open_manager()
    assert [done(again, job).state for job in waiting] == ["succeeded", "succeeded"]
    assert garage.ran[2:] == ["held", "waiting 0", "waiting 1"]
    assert garage.went_on_from == [None, None, b"half of it", None, None]
    assert again.get(finished.id) == finished
    job = again.get(held.id)
    assert job.state == "succeeded" and job.error is None and job.path is not None
    first, *_ = again.events(held.id, last)
    assert first.id == last + 1 and first.data["state"] == "queued" and "goes on at its last" in first.data["note"]
    assert again.get(waiting[1].id).request.seed == 1
    assert not list(again.folder.glob("*.step.*")), "the step goes with the video"


KILLED = """
import sys, threading, time
sys.path.insert(0, sys.argv[2])
from fake_engine import Garage, Script
from job_runs import CONFIG, ask
from lightx2v.jobs.queue import JobManager
from lightx2v.jobs.store import Job
garage = Garage()
garage.script["held"] = Script(hold=threading.Event(), saves=b"half of it")
manager = JobManager(garage, sys.argv[1])
if not manager.list():
    ids = [manager.submit(CONFIG, ask(prompt)).id for prompt in ("first", "held", "third")]
    manager.wait(ids[0])
garage.started.wait()
print(*(job.id for job in reversed(manager.list())), flush=True)
for line in sys.stdin:
    manager.cancel(line.strip())
    print("asked", flush=True)
time.sleep(60)
"""


@contextmanager
def program(folder: Path, code: str = KILLED) -> Iterator[subprocess.Popen[str]]:
    """A program with three jobs, whose second one is running. It is killed at the end of the block."""
    command = [sys.executable, "-c", code, str(folder), str(SUPPORT)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, **pipes, text=True, cwd=SUPPORT.parents[1]) as process:  # type: ignore[call-overload]
        try:
            yield process
        finally:
            process.kill()


@pytest.mark.slow
def test_a_killed_job_goes_on_by_itself_once_and_is_interrupted_the_second_time(tmp_path: Path, garage: Garage) -> None:
    with program(tmp_path) as process:
        assert process.stdout is not None
        ids = process.stdout.readline().split()
        with pytest.raises(ConfigError, match="Another process"):
            JobManager(garage, tmp_path)
        (tmp_path / ".lightx2v-abc").mkdir()
        (tmp_path / ".lightx2v-abc" / "video.mp4").write_bytes(b"half")
    with program(tmp_path) as process:
        assert process.stdout is not None and process.stdout.readline().split() == ids
        assert not (tmp_path / ".lightx2v-abc").exists()
    with JobManager(garage, tmp_path) as manager:
        assert manager.wait(ids[2], PATIENCE).state == "succeeded"
        assert [manager.get(id).state for id in ids] == ["succeeded", "interrupted", "succeeded"]
        error = manager.get(ids[1]).error
        assert error is not None and "ended twice" in error["message"] and "Run it again" in error["message"]
        states = [event.data["state"] for event in manager.events(ids[1]) if event.kind == "state"]
        assert states == ["queued", "running", "queued", "running", "interrupted"]
        manager.requeue(ids[1])
        assert manager.wait(ids[1], PATIENCE).state == "succeeded" and garage.went_on_from[-1] == b"half of it"


@pytest.mark.slow
def test_a_job_that_was_asked_to_stop_is_cancelled_even_if_the_program_is_killed_first(
    tmp_path: Path, garage: Garage
) -> None:
    with program(tmp_path, KILLED.replace("Script(hold", "Script(ignore_cancel=True, hold")) as process:
        assert process.stdout is not None and process.stdin is not None
        ids = process.stdout.readline().split()
        process.stdin.write(f"{ids[1]}\n")
        process.stdin.flush()
        assert process.stdout.readline() == "asked\n"
    with JobManager(garage, tmp_path) as manager:
        assert manager.get(ids[1]).state == "cancelled" and "held" not in garage.ran
        assert not list(tmp_path.glob("*.step.*"))


def test_a_program_that_is_stopped_again_and_again_interrupts_no_job(
    open_manager: Callable[..., JobManager], garage: Garage
) -> None:
    manager = open_manager()
    job, event = start_held(manager, garage)
    for _ in range(3):
        garage.started.clear()
        manager.close()
        manager = open_manager()
        assert garage.started.wait(PATIENCE) and manager.get(job.id).state == "running"
    event.set()
    assert done(manager, job).state == "succeeded"


def test_a_saved_step_goes_with_its_job_and_with_its_settings(
    open_manager: Callable[..., JobManager], garage: Garage, tmp_path: Path
) -> None:
    manager = open_manager(save_every=7.0)
    job, _ = start_held(manager, garage, saves=b"half of it")
    step = tmp_path / f"{job.id}.mp4.step.safetensors"
    assert garage.save_every == [7.0] and step.read_bytes() == b"half of it"
    manager.cancel(job.id)
    assert done(manager, job).state == "cancelled" and not step.exists()

    def stopped() -> tuple[JobManager, Job, Path]:
        """A job in the queue that a restart has put back."""
        manager = open_manager()
        job, _ = start_held(manager, garage, saves=b"half of it")
        manager.close()
        return open_manager(start=False), job, tmp_path / f"{job.id}.mp4.step.safetensors"

    manager.close()
    for change in ("edit", "cancel", "delete"):
        manager, job, step = stopped()
        assert step.exists() and manager.get(job.id).state == "queued"
        if change == "edit":
            manager.edit(job.id, job.request)
            assert step.exists(), "nothing was changed"
            manager.edit(job.id, replace(job.request, seed=5))
        else:
            getattr(manager, change)(job.id)
        assert not step.exists(), change
        if change == "edit":
            manager.delete(job.id)
        manager.close()


def test_a_failed_job_keeps_its_step_and_useless_steps_are_swept(
    open_manager: Callable[..., JobManager], garage: Garage, tmp_path: Path
) -> None:
    garage.script["full"] = Script(error=OutputError("The disk is full."), at=("write", 1), saves=b"all but the file")
    manager = open_manager()
    job = done(manager, manager.submit(CONFIG, ask("full")))
    assert job.state == "failed"
    garage.script.clear()
    fine = done(manager, manager.submit(CONFIG, ask("fine")))
    manager.close()
    for id, part in ((fine.id, ""), (fine.id, ".part"), ("0" * 32, ""), ("1" * 32, ".part")):
        (tmp_path / f"{id}.mp4.step.safetensors{part}").write_bytes(b"left by a killed program")
    manager = open_manager()
    assert [path.name for path in tmp_path.glob("*.step.*")] == [f"{job.id}.mp4.step.safetensors"]
    manager.requeue(job.id)
    assert done(manager, job).state == "succeeded" and garage.went_on_from[-1] == b"all but the file"


def test_the_end_of_another_process_of_the_group_ends_no_job(
    open_manager: Callable[..., JobManager], garage: Garage
) -> None:
    garage.script["held"] = Script(error=GroupFailed("Process 1 ended without a message."))
    manager = open_manager()
    job = manager.submit(CONFIG, ask("held"))
    eventually(lambda: not manager.alive)
    assert manager.get(job.id).state == "queued"
    manager.close()
    manager = open_manager()
    assert done(manager, job).state == "interrupted", "the second time it may be the job's fault"


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
    garage.script.clear()
    assert done(open_manager(), job).state == "succeeded"


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
