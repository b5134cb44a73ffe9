"""Jobs on a full disk: deleting works, and clients get an error that says so."""

from __future__ import annotations

import base64
import errno
import os
import sqlite3
import threading
from collections import namedtuple
from pathlib import Path
from tempfile import SpooledTemporaryFile

import pytest
from fake_engine import Garage, Script
from job_runs import CONFIG, ask
from patience import PATIENCE
from served import I2V, serve

from lightx2v.jobs import worker as job_worker
from lightx2v.jobs.files import JobFiles
from lightx2v.jobs.store import JobStore
from lightx2v.server import application

pytestmark = pytest.mark.slow

Usage = namedtuple("Usage", "total used free")


class FullDisk:
    """SQLite needs room even to delete; there is some as soon as one of the videos in `folder` is gone."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self._folder = folder
        self._videos: list[Path] = []
        for name in ("remove", "finish"):
            monkeypatch.setattr(JobStore, name, self._guarded(getattr(JobStore, name)))

    def fill(self) -> None:
        self._videos = list(self._folder.glob("*.mp4"))

    def _guarded(self, real):
        def write(store: JobStore, *given, **more) -> None:
            if self._videos and all(video.exists() for video in self._videos):
                raise sqlite3.OperationalError("database or disk is full")
            real(store, *given, **more)

        return write


def test_deleting_a_video_works_on_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = FullDisk(tmp_path, monkeypatch)
    with serve(tmp_path) as served:
        id = served.submit(file_name="cat")
        assert served.end_of(id)["status"] == "completed"
        disk.fill()
        assert served.client.delete(f"/v1/videos/{id}").json()["deleted"]
        assert served.client.get(f"/v1/videos/{id}").status_code == 404 and not list(tmp_path.glob(f"{id}*"))


def test_expired_results_make_room_for_the_new_video(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job_worker, "RETRY_SECONDS", 0.01)
    now, hold, disk = [1e9], threading.Event(), FullDisk(tmp_path, monkeypatch)
    garage = Garage(script={"held": Script(hold=hold)})
    with serve(tmp_path, garage, ttl=3600, clock=lambda: now[0]) as served:
        old = served.submit()
        assert served.end_of(old)["status"] == "completed"
        new = served.submit("held")
        assert garage.started.wait(PATIENCE)
        disk.fill()
        now[0] += 3601
        hold.set()
        assert served.end_of(new)["status"] == "completed"
        assert served.client.get(f"/v1/videos/{old}").status_code == 404


def test_a_folder_that_cannot_be_read_ends_no_worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job_worker, "RETRY_SECONDS", 0.01)
    real, troubles = JobStore.finish, [1, 2, 3]

    def finish(store: JobStore, *given, **more) -> None:
        if troubles and troubles.pop():
            raise sqlite3.OperationalError("disk I/O error")
        real(store, *given, **more)

    def sizes(files: JobFiles) -> dict[str, int]:
        if troubles:
            raise OSError(errno.EIO, "Input/output error")
        return {}

    monkeypatch.setattr(JobStore, "finish", finish)
    with serve(tmp_path, size_cap=1) as served:
        monkeypatch.setattr(JobFiles, "sizes", sizes)
        assert served.end_of(served.submit())["status"] == "completed"
        assert served.client.get("/health").status_code == 200 and not troubles


def test_a_transaction_that_fails_leaves_nothing_and_the_next_one_works(tmp_path: Path) -> None:
    store = JobStore(tmp_path / "jobs.sqlite")
    id = "0" * 32

    def add() -> None:
        store.add(id, config=CONFIG, request=ask(), owner="", preset="", client_id=None, time=0.0)

    with pytest.raises(OSError), store.transaction():
        add()
        raise OSError
    assert store.queued() == [] and store.events(id, 0) == []
    add()
    assert store.queued() == [id] and [event.id for event in store.events(id, 0)] == [1]
    store.close()


def test_a_name_that_cannot_be_stored_costs_the_name_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with serve(tmp_path) as served:

        def full(path: Path, *given, **more) -> None:
            path.touch()
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(Path, "write_text", full)
        answer = served.client.post("/v1/tasks/video/", json={"prompt": "a cat", "save_result_path": "cat.mp4"}).json()
        assert answer["save_result_path"] == f"{answer['task_id']}.mp4"
        assert served.end_of(answer["task_id"])["status"] == "completed" and len(served.jobs.list()) == 1


@pytest.mark.parametrize("form", [True, False])
def test_an_image_that_does_not_fit_on_the_disk_is_an_error_507(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: bool
) -> None:
    """Starlette lays uploads of more than a megabyte on the disk, and the service all pictures."""
    with serve(tmp_path, presets=(I2V,)) as served:

        def full(*given, **more) -> None:
            raise OSError(errno.ENOSPC, "No space left on device", "/tmp/secret")

        monkeypatch.setattr(SpooledTemporaryFile, "rollover", full)
        monkeypatch.setattr(Path, "write_bytes", full)
        picture = bytes(2_000_000)
        if form:
            files = {"prompt": (None, "a cat"), "input_reference": ("a.png", picture)}
            answer = served.client.post("/v1/videos", files=files)
        else:
            body = {"prompt": "a cat", "input_reference": base64.b64encode(picture).decode()}
            answer = served.client.post("/v1/videos", json=body)
        assert answer.status_code == 507 and "secret" not in answer.text and not served.jobs.list()
        monkeypatch.undo()
        assert served.client.get("/health").status_code == 200


def test_other_troubles_of_the_system_stay_inside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with serve(tmp_path) as served:
        monkeypatch.setattr(served.jobs, "list", lambda *given, **more: Path("/nowhere/secret").read_text())
        answer = served.client.get("/v1/videos")
        assert answer.status_code == 500 and "secret" not in answer.text


def test_a_server_whose_disk_is_full_is_alive_but_not_ready(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with serve(tmp_path) as served:
        assert served.client.get("/ready").status_code == 200
        monkeypatch.setattr(application.shutil, "disk_usage", lambda path: Usage(10**9, 10**9, 0))
        answer = served.client.get("/ready")
        assert answer.status_code == 503 and "disk" in answer.json()["error"]["message"]
        monkeypatch.setattr(application.shutil, "disk_usage", lambda path: os.statvfs("/no/such/folder"))
        answer = served.client.get("/ready")
        assert (
            answer.status_code == 503
            and "Cannot read the output folder: No such file" in answer.json()["error"]["message"]
        )
        assert served.client.get("/health").status_code == 200
