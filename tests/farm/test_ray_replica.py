"""A replica whose engine is elsewhere: what travels, and what happens when the other side ends or hangs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from farm_fakes import FakeWorker
from job_runs import CONFIG, OTHER, PICTURED, ask

from lightx2v.config.engine_config import EngineConfig
from lightx2v.config.request import Request
from lightx2v.errors import OutputError
from lightx2v.farm import ray_replica
from lightx2v.farm.messages import Ended, Heard, StepSaved
from lightx2v.farm.ray_replica import RayReplica
from lightx2v.jobs.replica import Outcome
from lightx2v.jobs.store import Job
from lightx2v.progress import CancelToken, Progress
from lightx2v.step_file import StepFile

REPORT = {"request": {"image_path": "/worker/own.png", "seed": 3}, "path": "x.mp4"}
DONE = Ended(outcome=Outcome(report=REPORT), video=b"film", loaded=(CONFIG.to_json(), "p"))


def replica_of(worker: FakeWorker, **options: Any) -> RayReplica:
    assert worker.greeting is not None and not isinstance(worker.greeting, Exception)
    return RayReplica(worker, worker.greeting, "node/gpu-0", "node", **options)


def job_of(request: Request, config: EngineConfig = CONFIG) -> Job:
    return Job(
        id="a" * 32, state="running", owner="o", preset="p", client_id=None, config=config, request=request, created=0.0
    )  # fmt: skip


class Running:
    """One run of a replica, in this thread."""

    def __init__(self, folder: Path, worker: FakeWorker, request: Request | None = None) -> None:
        self.path, self.cancel = folder / "v.mp4", CancelToken()
        self.steps = StepFile(self.path, 7.0)
        self.heard: list[Progress] = []
        self.replica, self.request = replica_of(worker), request or ask()

    def __call__(self, on_progress: Any = None) -> Outcome:
        config = PICTURED if self.request.task == "i2v" else CONFIG
        return self.replica.run(
            job_of(self.request, config),
            self.path,
            on_progress=on_progress or self.heard.append,
            cancel=self.cancel,
            steps=self.steps,
        )


def test_files_travel_as_bytes_both_ways(tmp_path: Path) -> None:
    picture = tmp_path / "a.image-1.png"
    picture.write_bytes(b"png")
    worker = FakeWorker()
    worker.messages = [
        Heard(progress=Progress(stage="denoise", step=1, total=2), preview=b"jpeg"),
        None,
        StepSaved(data=b"newer"),
        DONE,
    ]
    running = Running(tmp_path, worker, ask(task="i2v", image_path=str(picture)))
    running.steps.write(b"older")
    outcome = running()
    (task,) = worker.tasks
    assert task.pictures == {"image_path": (picture.name, b"png")} and task.step == b"older" and task.save_every == 7.0
    assert json.dumps([task.config, task.request]), "plain JSON"
    assert running.path.read_bytes() == b"film" and running.steps.read() == b"newer"
    (event,) = running.heard
    assert event.step == 1 and event.preview is not None and event.preview() == b"jpeg"
    assert outcome.report is not None
    assert outcome.report["request"] == {"image_path": str(picture), "last_frame_path": None, "seed": 3}
    assert running.replica.loaded is not None and running.replica.loaded.config == CONFIG
    assert {file.name for file in tmp_path.iterdir()} == {picture.name, running.path.name, running.steps.path.name}


def test_the_video_without_interpolation_travels_too(tmp_path: Path) -> None:
    worker, report = FakeWorker(), REPORT | {"original_path": "/worker/tmp/x.original.mp4"}
    worker.messages = [
        Ended(outcome=Outcome(report=report), video=b"film", original=b"plain", loaded=(CONFIG.to_json(), "p"))
    ]
    running = Running(tmp_path, worker)
    outcome = running()
    kept = tmp_path / "v.original.mp4"
    assert running.path.read_bytes() == b"film" and kept.read_bytes() == b"plain"
    assert outcome.report is not None and outcome.report["original_path"] == str(kept)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["v.mp4", "v.original.mp4"]


def test_a_cancel_reaches_the_worker_once_and_a_suspend_as_such(tmp_path: Path) -> None:
    for suspend in (False, True):
        worker = FakeWorker()
        ended = Ended(outcome=Outcome(cancelled=True))
        worker.messages = [Heard(progress=Progress(stage="denoise")), None, None, ended]
        running = Running(tmp_path, worker)
        token = running.cancel
        outcome = running(lambda _, t=token, s=suspend: t.suspend() if s else t.cancel())
        assert outcome.cancelled and worker.stops == [(worker.tasks[0].run, suspend)]


def test_a_worker_that_ends_gives_the_job_back_and_is_killed(tmp_path: Path) -> None:
    worker = FakeWorker()
    worker.messages = [StepSaved(data=b"step")]
    running = Running(tmp_path, worker)
    worker.dead = True
    assert running() == Outcome(died=True)
    assert not running.replica.alive and worker.killed and running.steps.read() == b"step"


def test_the_end_of_a_machine_that_the_job_was_told_to_leave_counts_for_nobody(tmp_path: Path) -> None:
    worker = FakeWorker()
    worker.dead = True
    running = Running(tmp_path, worker)
    running.cancel.suspend()
    assert running() == Outcome(cancelled=True)


def test_a_failed_gpu_ends_the_worker_and_not_the_job(tmp_path: Path) -> None:
    worker = FakeWorker()
    worker.messages = [Ended(outcome=Outcome(error={"type": "DeviceError", "message": ""}, fatal=True))]
    running = Running(tmp_path, worker)
    assert running() == Outcome(died=True) and worker.killed


def test_a_worker_that_does_not_answer_is_killed(tmp_path: Path) -> None:
    worker = FakeWorker()
    replica = replica_of(worker, silence=0.0)
    replica.listen()
    assert replica.alive or worker.killed
    worker.hangs = True
    while replica.alive:
        replica.listen()
    assert "has not answered" in replica.lost and worker.killed


def test_a_worker_that_answers_lives_and_says_how_much_memory_it_uses() -> None:
    replica = replica_of(FakeWorker())
    for _ in range(4):
        replica.listen()
    assert replica.alive and (replica.status().memory_used, replica.status().machine) == (1, "node")


def test_a_worker_that_does_not_stop_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_replica, "STOP_SECONDS", 0.0)
    worker = FakeWorker()
    running = Running(tmp_path, worker)
    running.cancel.cancel()
    assert running() == Outcome(cancelled=True) and worker.killed


def test_a_full_disk_here_fails_the_job_and_leaves_no_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    worker = FakeWorker()
    worker.messages = [StepSaved(data=b"step"), DONE]
    running = Running(tmp_path, worker)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    def unsaved(*_: object) -> None:
        raise OutputError("the disk is full")

    monkeypatch.setattr(StepFile, "write", unsaved)
    monkeypatch.setattr(Path, "replace", full)
    outcome = running()
    assert outcome.error is not None and outcome.error["message"].startswith("The disk is full")
    assert running.replica.alive and not list(tmp_path.iterdir())


def test_a_model_that_the_machine_cannot_hold_is_refused_from_then_on(tmp_path: Path) -> None:
    worker = FakeWorker()
    worker.messages = [Ended(outcome=Outcome(cancelled=True, refused="It has no such folder."))]
    running = Running(tmp_path, worker)
    assert running.replica.refusal(CONFIG) == ""
    assert running().refused == "It has no such folder."
    assert running.replica.refusal(CONFIG) == "It has no such folder." and running.replica.refusal(OTHER) == ""
