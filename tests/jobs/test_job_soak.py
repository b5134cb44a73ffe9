"""The queue over the real engine, and under 200 mixed jobs at once."""

from __future__ import annotations

import gc
import logging
import random
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TinyModels
from fake_engine import Garage, Script
from job_runs import CONFIG, OTHER, ask, done
from patience import PATIENCE

from lightx2v.config.engine_config import EngineConfig
from lightx2v.config.presets import resolve
from lightx2v.config.request import Request
from lightx2v.jobs.engine_slot import Engine
from lightx2v.jobs.queue import JobManager
from lightx2v.jobs.store import OVER, Job
from lightx2v.media.mp4 import probe
from lightx2v.models.dit import WanDiT
from lightx2v.pipeline import LightX2VPipeline


@dataclass(frozen=True)
class RealQueue:
    """A queue over the real engine, and one job that has succeeded."""

    manager: JobManager
    config: EngineConfig
    first: Job

    def submit(self, **changes: Any) -> Job:
        return self.manager.submit(self.config, replace(self.first.request, **changes), preset="tiny")

    def video(self, job: Job) -> bytes:
        """The video of a job that succeeds."""
        job = done(self.manager, job)
        assert job.path is not None, job.error
        return job.path.read_bytes()


@pytest.fixture
def real(open_manager: Callable[..., JobManager], tiny: TinyModels) -> RealQueue:
    def open_pipeline(config: EngineConfig, **more: Any) -> Engine:
        return LightX2VPipeline.from_config(config, **more)

    manager = open_manager(garage=open_pipeline)
    size = {"height": 32, "width": 48, "frames": 5}
    resolved = resolve({"model_path": str(tiny.t2v), "device": "cpu"}, size | {"steps": 4})
    request = Request(prompt="a red ball", **resolved.request)
    first = done(manager, manager.submit(resolved.engine, request, preset="tiny"))
    assert first.state == "succeeded", first.error
    return RealQueue(manager, resolved.engine, first)


@pytest.mark.slow
def test_the_real_engine_makes_the_video_with_previews_and_its_timings(
    real: RealQueue, caplog: pytest.LogCaptureFixture
) -> None:
    job = real.first
    assert job.path is not None and probe(job.path).frames == 5
    assert "continues without previews" not in caplog.text
    assert job.result is not None and len(job.result["timings"]["steps"]) == 4
    assert job.result["timings"]["seconds"]["load"] > 0, "the first job waited for the engine"
    again = done(real.manager, real.submit())
    assert again.result is not None and "load" not in again.result["timings"]["seconds"]


@pytest.mark.slow
def test_out_of_memory_frees_the_step_and_the_next_job_makes_the_same_video_as_before(
    real: RealQueue, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward, velocities = WanDiT.forward, []

    def fail_at_the_second_step(self: WanDiT, *args: Any, **options: Any) -> Any:
        velocity = forward(self, *args, **options)
        velocities.append(weakref.ref(velocity[0]))
        if len(velocities) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9.00 GiB.")
        return velocity

    with monkeypatch.context() as patch:
        patch.setattr(WanDiT, "forward", fail_at_the_second_step)
        starved = done(real.manager, real.submit())
    assert starved.state == "failed" and starved.error is not None and starved.error["type"] == "OutOfMemory"
    assert [ref for ref in velocities if ref() is not None] == []
    assert real.video(real.submit()) == real.video(real.first)


@pytest.mark.slow
def test_a_cancelled_run_stops_within_a_step_and_the_next_job_makes_the_same_video_as_before(
    real: RealQueue, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward, started, begun = WanDiT.forward, threading.Event(), []

    def slow(self: WanDiT, *args: Any, **options: Any) -> Any:
        started.set()
        begun.append(time.monotonic())
        time.sleep(0.02)
        return forward(self, *args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(WanDiT, "forward", slow)
        job = real.submit(steps=200)
        assert started.wait(PATIENCE)
        real.manager.cancel(job.id)
        cancelled = time.monotonic()
        assert done(real.manager, job).state == "cancelled"
    assert sum(at > cancelled for at in begun) <= 2, "it went on after the step it was in"
    assert real.video(real.submit()) == real.video(real.first)
    assert len(list(real.manager.folder.glob("*.mp4"))) == 2


ENDS = {
    "fine": "succeeded",
    "error": "failed",
    "oom": "failed",
    "nan": "failed",
    "cancel": "cancelled",
    "deaf": "cancelled",
}
"""How each kind of job ends. Both last ones are cancelled; the deaf engine does not listen."""


def script_of(kind: str, dice: random.Random) -> Script:
    at = (dice.choice(("text", "denoise", "decode", "write")), 2)
    return {
        "fine": Script(seconds=0.0005),
        "error": Script(error=ValueError("x"), at=at),
        "oom": Script(error=MemoryError(), at=at),
        "nan": Script(nan=True),
        "cancel": Script(hold=threading.Event()),
        "deaf": Script(hold=threading.Event(), ignore_cancel=True),
    }[kind]


@pytest.fixture
def quick_gc() -> Iterator[None]:
    """The session's other objects, torch's above all, would make each of a hundred collections take 0.3 s."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.mark.slow
@pytest.mark.usefixtures("quick_gc")
def test_soak_200_mixed_jobs_leave_nothing_behind(
    manager: JobManager, garage: Garage, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.CRITICAL)
    threads, started = set(threading.enumerate()), time.process_time()
    dice = random.Random(0)
    kinds = dice.choices(list(ENDS), weights=(5, 2, 2, 1, 2, 1), k=200)
    garage.script = {str(number): script_of(kind, dice) for number, kind in enumerate(kinds)}

    def submit(number: int) -> Job:
        job = manager.submit(dice.choice([CONFIG] * 9 + [OTHER]), ask(f"{number}"), owner=f"{number % 7}")
        if (hold := garage.script[f"{number}"].hold) is not None:
            time.sleep(dice.random() * 0.01)
            manager.cancel(job.id)
            hold.set()
        return job

    with ThreadPoolExecutor(16) as pool:
        jobs = [done(manager, job) for job in pool.map(submit, range(200))]
    assert [(kind, job.state) for kind, job in zip(kinds, jobs, strict=True)] == [(kind, ENDS[kind]) for kind in kinds]
    assert time.process_time() - started < 30
    assert garage.most == 1 and garage.most_running == 1 and len(garage.ran) == len(set(garage.ran))
    assert manager.waiting == 0 and sum(manager.counts()[state] for state in OVER) == 200
    videos = {f"{job.id}.mp4" for job in jobs if job.state == "succeeded"}
    assert {file.name for file in tmp_path.iterdir() if not file.name.startswith("jobs.sqlite")} == videos
    gc.collect()
    assert [ref for ref in garage.step_tensors if ref() is not None] == []
    assert not set(threading.enumerate()) - threads
    assert done(manager, manager.submit(CONFIG, ask())).state == "succeeded"
