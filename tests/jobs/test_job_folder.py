"""The jobs' folder: removed while a program uses it, its list of jobs lost or damaged, files that belong to no job."""

from __future__ import annotations

import os
import shutil
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from fake_engine import Garage
from job_runs import CONFIG, PICTURED, ask, done, start_held
from patience import eventually
from PIL import Image

from lightx2v.config.recorded_settings import recorded_settings
from lightx2v.config.request import Request
from lightx2v.errors import ConfigError
from lightx2v.jobs import queue
from lightx2v.jobs.queue import TAKEN, JobManager
from lightx2v.media.video_writer import VideoWriter

USE = """
import sys
from lightx2v.jobs.queue import JobManager
from lightx2v.errors import ConfigError
try:
    jobs = JobManager(None, sys.argv[1])
except ConfigError:
    print("refused", flush=True)
else:
    print("let in", flush=True)
    sys.stdin.read()
    jobs.close()
"""


def another(folder: Path) -> subprocess.Popen[str]:
    """Another program on the folder: says "let in", and stays until its input is closed, or "refused"."""
    command = [sys.executable, "-c", USE, str(folder)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def answer(other: subprocess.Popen[str]) -> str:
    assert other.stdout is not None
    said = other.stdout.readline().strip()
    other.communicate("")
    return said


def write_video(path: Path, config: object = CONFIG, request: Request | None = None) -> None:
    settings = recorded_settings("a preset", config, request or ask(), path)  # type: ignore[arg-type]
    with VideoWriter(path, 16, 16, 16, settings=settings) as writer:
        writer.write(np.zeros((5, 16, 16, 3), dtype=np.uint8))


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Path]:
    """A folder that no manager of the other fixtures uses."""
    yield tmp_path / "place"


@pytest.mark.slow
@pytest.mark.parametrize("lost", ["folder", "file", "log", "replaced"])
def test_the_lock_and_the_jobs_outlive_their_files(
    lost: str, manager: JobManager, garage: Garage, open_manager: Callable[..., JobManager]
) -> None:
    first = done(manager, manager.submit(CONFIG, ask("first"), owner="me"))
    held, event = start_held(manager, garage)
    waiting = manager.submit(CONFIG, ask("waiting"), owner="me")
    file, log = manager.folder / "jobs.sqlite", manager.folder / "jobs.sqlite-wal"
    if lost == "folder":
        shutil.rmtree(manager.folder)
    elif lost == "log":
        log.unlink()
    else:
        file.unlink()
        if lost == "replaced":
            file.write_bytes(b"not a database" * 100)
    eventually(lambda: manager._store.in_place)  # reading the file here would free this process's locks on it
    assert answer(another(manager.folder)) == "refused"
    event.set()
    assert [done(manager, job).state for job in (held, waiting)] == ["succeeded", "succeeded"]
    assert manager.close()
    again = open_manager()
    assert [again.get(job.id).state for job in (first, held, waiting)] == ["succeeded"] * 3
    assert again.get(waiting.id).owner == "me" and again.get(waiting.id).path.is_file()  # type: ignore[union-attr]


@pytest.mark.slow
@pytest.mark.parametrize("instead", ["file", "broken link"])
def test_what_takes_the_folders_place_ends_the_job_and_is_said_once(
    instead: str, manager: JobManager, garage: Garage, caplog: pytest.LogCaptureFixture
) -> None:
    held, event = start_held(manager, garage)
    waiting = manager.submit(CONFIG, ask("waiting"))
    shutil.rmtree(manager.folder)
    if instead == "file":
        manager.folder.write_text("mine")
    else:
        manager.folder.symlink_to(manager.folder.with_name("nowhere"))
    event.set()
    assert done(manager, held).state == "failed"
    time.sleep(4 * queue.FOLDER_SECONDS)
    assert caplog.text.count("cannot be written again yet") == 1 and manager.get(waiting.id).state == "queued"
    manager.folder.unlink()
    assert done(manager, waiting).state == "succeeded"
    eventually(lambda: manager._store.in_place)


@pytest.mark.slow
def test_a_folder_that_another_program_took_meanwhile_stops_the_queue_but_not_the_job(
    open_manager: Callable[..., JobManager], garage: Garage, monkeypatch: pytest.MonkeyPatch
) -> None:
    looking = threading.Event()
    manager = open_manager()
    wait = manager._closing.wait
    monkeypatch.setattr(manager._closing, "wait", lambda seconds: looking.wait() and wait(seconds))
    time.sleep(2 * queue.FOLDER_SECONDS)  # the look in progress
    held, event = start_held(manager, garage)
    waiting = manager.submit(CONFIG, ask("waiting"))
    shutil.rmtree(manager.folder)
    other = another(manager.folder)
    assert other.stdout is not None and other.stdout.readline().strip() == "let in"
    looking.set()
    eventually(lambda: not manager.alive)
    event.set()
    assert done(manager, held).state == "succeeded" and (manager.folder / f"{held.id}.mp4").is_file()
    with pytest.raises(Exception, match=TAKEN[:30]):
        manager.submit(CONFIG, ask("more"))
    assert manager.get(waiting.id).state == "queued"
    other.communicate("")


@pytest.mark.slow
@pytest.mark.parametrize("damage", ["gone", "text", "cut", "overwritten", "empty", "no tables", "no place", "no data"])
def test_a_lost_or_damaged_list_of_jobs_comes_back_from_the_videos(damage: str, place: Path, garage: Garage) -> None:
    place.mkdir()
    picture = place / "cat.png"
    Image.new("RGB", (32, 32), "red").save(picture)
    with JobManager(garage, place, max_queue=100, start=False) as manager:
        ids = [manager.submit(CONFIG, ask(f"job {n}", seed=n)).id for n in range(40)]
        pictured = manager.submit(PICTURED, ask("moves", task="i2v", image_path=str(picture)))
        manager._store._db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
    picture.unlink()
    for number, id in enumerate(ids[:3]):
        write_video(place / f"{id}.mp4", CONFIG, ask(f"job {number}", seed=number))
        os.utime(place / f"{id}.mp4", (1_700_000_000 + number,) * 2)
    write_video(place / f"{pictured.id}.mp4", PICTURED, pictured.request)
    (place / "mine.mp4").write_bytes(b"a video of the user")
    (place / f"{'a' * 32}.mp4").write_bytes(b"no video")
    file = place / "jobs.sqlite"
    data = file.read_bytes()
    assert len(data) > 20_000
    if damage == "no tables":
        file.unlink()
        with sqlite3.connect(file) as db:
            db.execute("PRAGMA user_version = 3")
        db.close()
    elif damage in ("no place", "no data"):
        with sqlite3.connect(file) as db:
            db.execute("DROP INDEX jobs_by_state")
            db.execute(f"ALTER TABLE {'jobs' if damage == 'no place' else 'events'} DROP COLUMN {damage[3:]}")
        db.close()
    else:
        file.write_bytes(
            {
                "text": b"this is not a database, it is a text" * 100,
                "cut": data[:9000],
                "overwritten": data[:4096] + b"\xff" * (len(data) - 4096),
                "empty": b"",
                "gone": b"",
            }[damage]
        )
        if damage == "gone":
            file.unlink()
    with JobManager(garage, place, start=False) as manager:
        jobs = {job.id: job for job in manager.list()}
        assert set(jobs) == {*ids[:3], pictured.id}
        for number, id in enumerate(ids[:3]):
            job = jobs[id]
            assert (job.state, job.preset, job.request) == ("succeeded", "a preset", ask(f"job {number}", seed=number))
            assert job.config == CONFIG and job.finished == 1_700_000_000 + number
            assert job.result is not None and (job.result["width"], job.result["frames"]) == (16, 5)
        assert Path(str(jobs[pictured.id].request.image_path)).is_file()
        assert done(manager, jobs[ids[0]]).path == place / f"{ids[0]}.mp4"
    with JobManager(garage, place, start=False) as manager:
        assert {job.id for job in manager.list()} == set(jobs), "recovered once"
    assert (place / "mine.mp4").is_file() and (place / f"{'a' * 32}.mp4").is_file()


@pytest.mark.slow
def test_a_list_of_jobs_that_is_in_use_is_not_taken_for_a_damaged_one(place: Path, garage: Garage) -> None:
    with JobManager(garage, place, start=False):
        with pytest.raises(ConfigError, match="Another process"):
            JobManager(garage, place, start=False)
    assert not list(place.glob("*.damaged"))


def test_files_of_no_job_are_swept_at_the_start(place: Path, garage: Garage) -> None:
    place.mkdir()
    picture = place / "cat.png"
    Image.new("RGB", (32, 32), "red").save(picture)
    with JobManager(garage, place, start=False) as manager:
        job = manager.submit(PICTURED, ask("moves", task="i2v", image_path=str(picture)))
    kept = {path.name for path in place.iterdir()} - {"jobs.sqlite", "jobs.sqlite-wal"}
    assert len(kept) == 2
    for name in (f"{'b' * 32}.image-0123abcd.png", f"{'c' * 32}.name", ".lightx2v-0123abcd"):
        (place / name).write_bytes(b"of a killed process")
    (place / ".lightx2v-work").mkdir()
    (place / ".lightx2v-work" / "video.mp4").write_bytes(b"half")
    with JobManager(garage, place, start=False) as manager:
        assert manager.get(job.id).state == "queued"
    assert {path.name for path in place.iterdir()} - {"jobs.sqlite", "jobs.sqlite-wal"} == kept
