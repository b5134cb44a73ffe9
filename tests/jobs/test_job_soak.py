"""The queue over the real engine, and 200 mixed jobs at once."""

from __future__ import annotations

import gc
import logging
import random
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import TinyModels
from fake_engine import Garage, Script
from job_runs import CONFIG, OTHER, ask, done
from patience import PATIENCE

from lightx2v.config.engine_config import EngineConfig
from lightx2v.config.request import Request
from lightx2v.jobs.engine_slot import Engine
from lightx2v.jobs.queue import JobManager
from lightx2v.jobs.store import OVER, Job
from lightx2v.media.mp4 import probe
from lightx2v.progress import CancelToken, OnProgress


@pytest.mark.slow
def test_the_real_engine_survives_out_of_memory_and_cancel_and_repeats_itself_exactly(
    open_manager: Callable[..., JobManager],
    tiny: TinyModels,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    import torch

    from lightx2v.config.presets import resolve
    from lightx2v.models.dit import WanDiT
    from lightx2v.pipeline import LightX2VPipeline

    def open_pipeline(config: EngineConfig, *, preset: str, on_progress: OnProgress, cancel: CancelToken) -> Engine:
        return LightX2VPipeline.from_config(config, preset=preset, on_progress=on_progress)

    manager = open_manager(garage=open_pipeline)
    size = {"height": 32, "width": 48, "frames": 5}
    resolved = resolve({"model_path": str(tiny.t2v), "device": "cpu"}, size | {"steps": 4})
    request = Request(prompt="a red ball", **resolved.request)
    first = done(manager, manager.submit(resolved.engine, request, preset="tiny"))
    assert first.state == "succeeded" and first.path is not None, first.error
    assert probe(first.path).frames == 5 and "continues without previews" not in caplog.text
    assert first.result is not None and len(first.result["timings"]["steps"]) == 4

    forward, calls, started = WanDiT.forward, [0], threading.Event()
    refs: list[weakref.ref[torch.Tensor]] = []

    def failing(self: WanDiT, *args: Any, **options: Any) -> Any:
        velocity = forward(self, *args, **options)
        refs.append(weakref.ref(velocity[0]))
        calls[0] += 1
        if calls[0] == 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9.00 GiB.")
        return velocity

    monkeypatch.setattr(WanDiT, "forward", failing)
    starved = done(manager, manager.submit(resolved.engine, request))
    assert starved.state == "failed" and starved.error is not None and starved.error["type"] == "OutOfMemory"
    assert [ref for ref in refs if ref() is not None] == []

    forwards: list[float] = []

    def slow(self: WanDiT, *args: Any, **options: Any) -> Any:
        started.set()
        forwards.append(time.monotonic())
        time.sleep(0.02)
        return forward(self, *args, **options)

    monkeypatch.setattr(WanDiT, "forward", slow)
    long = manager.submit(resolved.engine, replace(request, steps=200))
    assert started.wait(PATIENCE)
    manager.cancel(long.id)
    asked = time.monotonic()
    assert done(manager, long).state == "cancelled"
    assert sum(begun > asked for begun in forwards) <= 2, "it went on after the step it was in"

    monkeypatch.setattr(WanDiT, "forward", forward)
    again = done(manager, manager.submit(resolved.engine, request, preset="tiny"))
    assert again.path is not None and again.path.read_bytes() == first.path.read_bytes()
    assert sorted(file.suffix for file in manager.folder.iterdir() if file.suffix == ".mp4") == [".mp4", ".mp4"]


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
    dice = random.Random(0)
    stages = ("text", "denoise", "decode", "write")
    outcomes: dict[str, Callable[[], Script]] = {
        "fine": lambda: Script(seconds=0.0005),
        "error": lambda: Script(error=ValueError("x"), at=(dice.choice(stages), 2)),
        "oom": lambda: Script(error=MemoryError(), at=(dice.choice(stages), 2)),
        "nan": lambda: Script(nan=True),
        "cancel": lambda: Script(hold=threading.Event()),
        "deaf": lambda: Script(hold=threading.Event(), ignore_cancel=True),
    }
    threads, started = set(threading.enumerate()), time.process_time()
    kinds = dice.choices(list(outcomes), weights=(5, 2, 2, 1, 2, 1), k=200)
    for number, kind in enumerate(kinds):
        garage.script[f"{number}"] = outcomes[kind]()

    def client(number: int) -> tuple[int, Job]:
        job = manager.submit(dice.choice([CONFIG] * 9 + [OTHER]), ask(f"{number}"), owner=f"{number % 7}")
        if kinds[number] in ("cancel", "deaf"):
            time.sleep(dice.random() * 0.01)
            manager.cancel(job.id)
            hold = garage.script[f"{number}"].hold
            assert hold is not None
            hold.set()
        return number, job

    with ThreadPoolExecutor(16) as pool:
        jobs = dict(pool.map(client, range(200)))
    ended = {number: done(manager, job) for number, job in jobs.items()}
    expected = {
        "fine": "succeeded",
        "error": "failed",
        "oom": "failed",
        "nan": "failed",
        "cancel": "cancelled",
        "deaf": "cancelled",
    }
    wrong = [(kinds[n], job.state) for n, job in ended.items() if job.state != expected[kinds[n]]]
    assert wrong == []
    assert time.process_time() - started < 30
    assert garage.most == 1 and garage.most_running == 1 and len(garage.ran) == len(set(garage.ran))
    assert manager.waiting == 0 and sum(manager.counts()[state] for state in OVER) == 200
    videos = {f"{job.id}.mp4" for job in ended.values() if job.state == "succeeded"}
    assert {file.name for file in tmp_path.iterdir() if not file.name.startswith("jobs.sqlite")} == videos
    gc.collect()
    assert [ref for ref in garage.step_tensors if ref() is not None] == []
    assert not set(threading.enumerate()) - threads
    assert done(manager, manager.submit(CONFIG, ask())).state == "succeeded"
