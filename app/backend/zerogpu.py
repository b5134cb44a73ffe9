"""Runs on ZeroGPU, where the GPU is lent to one visitor's request: there the page's event has to own the run.

    main process                          forked process with the GPU
    GpuLender.run ─ spaces.GPU(duration) ──►  denoise: the engine, in a thread; yields what happens
        │   ◄── ("progress", …) … ("done", frames, report)
        └──► mp4 is written here: encoding on the lent GPU would be charged

The engine is opened once at start, before the fork. Closing the generator ends the fork's run: its thread sees the
cancelled token at the next step.
"""

from __future__ import annotations

import math
import queue
import secrets
import threading
import time
from collections.abc import Callable, Generator
from contextlib import closing
from dataclasses import replace
from typing import Any, Protocol

from lightx2v.config.engine_config import EngineConfig
from lightx2v.config.recorded_settings import recorded_settings
from lightx2v.config.request import Request
from lightx2v.errors import LightX2VError
from lightx2v.jobs.store import Job
from lightx2v.media.images import jpeg
from lightx2v.media.video_writer import VideoWriter
from lightx2v.progress import CancelToken, OnProgress, Progress

from .studio import Studio

LEAST_SECONDS, MOST_SECONDS, UNKNOWN_SECONDS = 20, 300, 90
MARGIN = 1.3
"""A reservation that is too short loses the run; one that is too long only waits longer for its turn."""

Message = tuple[Any, ...]
LendGpu = Callable[..., Callable[..., Callable[..., Generator[Message]]]]
"""`spaces.GPU`: takes `duration=`, gives a decorator."""


class FramesEngine(Protocol):
    """What is asked of LightX2VPipeline here: frames back, no file."""

    def run(self, request: Request, *, on_progress: OnProgress, cancel: CancelToken, return_frames: bool) -> Any: ...


class GpuLender:
    """One engine, whose runs are requests for the GPU."""

    def __init__(self, lend: LendGpu, engine: FramesEngine, config: EngineConfig, studio: Studio) -> None:
        self._studio, self.config = studio, config

        def seconds(request: dict[str, Any]) -> int:
            return self.reservation(Request.from_json(request))

        def denoise(request: dict[str, Any]) -> Generator[Message]:
            yield from _messages(engine, Request.from_json(request))

        # Requests cross the fork as plain JSON; the duration's signature has to be the function's.
        self._denoise = lend(duration=seconds)(denoise)

    def reservation(self, request: Request) -> int:
        """Whole seconds of GPU to ask for."""
        prediction = self._studio.predict(self.config, request)
        if prediction is None:
            return UNKNOWN_SECONDS
        on_gpu = sum(s for stage, s in prediction.stages.items() if stage not in ("load", "write"))
        return min(MOST_SECONDS, max(LEAST_SECONDS, math.ceil(on_gpu * MARGIN + 5)))

    def run(self, request: Request, *, owner: str, preset: str) -> Generator[Job]:
        """The job as it goes on, the last one being over. Closing this, or `studio.stop`, ends the run."""
        now = time.time()
        job = Job(
            id=secrets.token_hex(16), state="running", owner=owner, preset=preset, client_id=None, config=self.config,
            request=request, created=now, started=now,
        )  # fmt: skip
        try:
            self._studio.adopt(job)
            yield job
            with closing(self._denoise(request.to_json())) as messages:
                for message in messages:
                    if self._studio.stopping(job.id):
                        return
                    job = self._after(job, message)
                    self._studio.adopt(job)
                    yield job
        finally:
            if not job.over:
                self._studio.adopt(replace(job, state="cancelled", finished=time.time()))

    def _after(self, job: Job, message: Message) -> Job:
        kind, *rest = message
        if kind == "progress":
            progress, preview = rest
            return replace(job, progress=progress, preview=preview or job.preview)
        if kind == "failed":
            return replace(job, state="failed", finished=time.time(), error=rest[0])
        frames, report = rest
        return self._finish(job, frames, report)

    def _finish(self, job: Job, frames: Any, report: dict[str, Any]) -> Job:
        """Writes the video; adds to the report what only this side knows."""
        path = self._studio.folder / f"{job.id}.mp4"
        settings = recorded_settings(job.preset, job.config, job.request, path)
        started = time.perf_counter()
        height, width = frames.shape[1:3]
        try:
            with VideoWriter(path, width, height, job.request.fps, settings=settings) as writer:
                writer.write(frames)
        except LightX2VError as error:
            return replace(job, state="failed", finished=time.time(), error=_told(error))
        report["timings"]["seconds"]["write"] = time.perf_counter() - started
        report |= {"path": str(path), "file_bytes": path.stat().st_size}
        self._studio.learn(job.config, replace(job.request, height=height, width=width), report["timings"]["seconds"])
        return replace(job, state="succeeded", finished=time.time(), result=report, path=path, preview=None)


def _messages(engine: FramesEngine, request: Request) -> Generator[Message]:
    """In the forked process: the engine in a thread, so that every step can be told while the next one runs."""
    told: queue.Queue[Message] = queue.Queue()
    cancel = CancelToken()

    def tell(event: Progress) -> None:
        preview = jpeg(event.preview(), max_side=512) if event.preview is not None else None
        told.put(("progress", replace(event, preview=None), preview))

    def work() -> None:
        try:
            result = engine.run(request, on_progress=tell, cancel=cancel, return_frames=True)
            told.put(("done", result.frames, result.report()))
        except LightX2VError as error:
            told.put(("failed", _told(error)))
        except BaseException:
            told.put(("failed", {"type": "LightX2VError", "message": "The run failed. Try again."}))
            raise

    worker = threading.Thread(target=work, daemon=True, name="lightx2v-zerogpu")
    worker.start()
    try:
        while True:
            message = told.get()
            yield message
            if message[0] != "progress":
                return
    finally:
        cancel.cancel()
        worker.join(timeout=30)


def _told(error: LightX2VError) -> dict[str, str]:
    return {"type": type(error).__name__, "message": str(error)}
