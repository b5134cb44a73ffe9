"""Jobs for the queue's tests: configurations, requests, runs that wait until they are let go."""

from __future__ import annotations

import threading

from fake_engine import Garage, Script
from patience import PATIENCE

from lightx2v.config.engine_config import EngineConfig
from lightx2v.config.request import Request
from lightx2v.jobs.queue import JobManager
from lightx2v.jobs.store import Job

CONFIG = EngineConfig(model_path="models/a", model_cls="wan2.2_moe", task="t2v")
OTHER = EngineConfig(model_path="models/b", model_cls="wan2.2_moe", task="t2v")
PICTURED = EngineConfig(model_path="models/a", model_cls="wan2.2_moe", task="i2v")


def ask(prompt: str = "calm", **fields: object) -> Request:
    return Request(prompt=prompt, **fields)  # type: ignore[arg-type]


def done(manager: JobManager, job: Job) -> Job:
    job = manager.wait(job.id, PATIENCE)
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
    assert garage.started.wait(PATIENCE)
    return job, event
