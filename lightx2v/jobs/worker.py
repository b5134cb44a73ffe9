"""The thread that runs the jobs, one after the other, and tells the rest what it is doing.

It shares the store with JobManager under one lock. Only this thread touches the engine.
"""

from __future__ import annotations

import contextlib
import logging
import math
import sqlite3
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace

from ..errors import LightX2VError
from ..media.images import jpeg
from ..progress import CancelToken, Progress
from .engine_slot import EngineSlot, OpenEngine, Outcome
from .files import JobFiles
from .store import INTERRUPTED, Job, JobStore, State

log = logging.getLogger("lightx2v.jobs")

PREVIEW_SECONDS = 0.5
PREVIEW_SIDE = 512
EVENT_SECONDS = 0.5
"""Progress other than denoising steps is logged this often; `Running.progress` is always the newest."""
PURGE_SECONDS = 60.0
RETRY_SECONDS = 1.0


@dataclass(slots=True)
class Running:
    """The job that the worker is at. `asked`: somebody asked to cancel it."""

    id: str
    cancel: CancelToken = field(default_factory=CancelToken)
    asked: bool = False
    progress: Progress | None = None
    preview: bytes | None = None
    next_preview: float = 0.0
    next_event: float = 0.0


class JobWorker:
    """`running` is the job it is at, `broken` says why it has stopped for good; read and changed under the lock.

    `abandoned`: the store is closed, and the thread is on its own because the engine did not stop in time.
    """

    def __init__(
        self,
        open_engine: OpenEngine,
        store: JobStore,
        files: JobFiles,
        changed: threading.Condition,
        *,
        clock: Callable[[], float],
        purge: Callable[[], object],
    ) -> None:
        self.running: Running | None = None
        self.closing = self.abandoned = False
        self.broken = ""
        self._slot = EngineSlot(open_engine)
        self._store, self._files, self._changed = store, files, changed
        self._clock, self._purge = clock, purge
        self._next_purge = 0.0
        self._thread = threading.Thread(target=self._work, daemon=True, name="lightx2v-jobs")

    def start(self) -> None:
        self._thread.start()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive() and not self.broken and not self.closing

    def stop(self, timeout: float) -> bool:
        """Cancels what runs and ends the thread; False if the engine does not listen within `timeout` seconds."""
        with self._changed:
            self.closing = True
            if self.running is not None:
                self.running.cancel.cancel()
            self._changed.notify_all()
        self._thread.join(timeout)
        return not self._thread.is_alive()

    def _work(self) -> None:
        """The thread: takes the next job, runs it, records how it ended, until the manager closes."""
        try:
            while (taken := self._take()) is not None:
                job, running = taken
                outcome = self._slot.run(
                    job.id,
                    job.config,
                    job.request,
                    preset=job.preset,
                    path=self._files.video(job.id),
                    on_progress=lambda event, running=running: self._on_progress(running, event),
                    cancel=running.cancel,
                )
                self._settle(running, outcome)
                if outcome.fatal:
                    self.broken = "The graphics card needs a restart of the program."
                    break
        finally:  # reached by a kill from inside a job too, SystemExit for example
            if not self.closing:
                self.broken = self.broken or "The worker has stopped; its log says why. Restart the program."
                log.critical(self.broken)
                if self.running is not None:
                    self._settle(self.running, Outcome(error={"type": "Interrupted", "message": self.broken}))
            self._slot.close()

    def _take(self) -> tuple[Job, Running] | None:
        """The next job, marked running; blocks until there is one. None when the manager closes."""
        with self._changed:
            while not self.closing:
                try:
                    if time.monotonic() >= self._next_purge:
                        self._next_purge = time.monotonic() + PURGE_SECONDS
                        self._purge()
                    for id in self._store.queued()[:1]:
                        job = self._store.job(id)
                        self._files.ensure_folder()
                        self._files.video(id).unlink(missing_ok=True)  # of a run that was interrupted
                        self._store.start(id, self._clock())
                        self.running = Running(id)
                        self._changed.notify_all()
                        return job, self.running
                    self._changed.wait(PURGE_SECONDS)
                except (sqlite3.Error, OSError, LightX2VError) as error:  # a full disk, mostly: no reason to give up
                    log.error("the queue waits: %s", error)
                    self._changed.wait(RETRY_SECONDS)
        return None

    def _on_progress(self, running: Running, event: Progress) -> None:
        preview = self._preview(running, event)
        with self._changed:
            stage = running.progress.stage if running.progress else ""
            running.progress = replace(event, preview=None)
            running.preview = preview or running.preview
            now = time.monotonic()
            if (
                stage != event.stage
                or event.stage == "denoise"
                or event.step == event.total
                or now >= running.next_event
            ):
                running.next_event = now + EVENT_SECONDS
                data = {f.name: getattr(event, f.name) for f in fields(event) if f.name != "preview"}
                try:
                    self._files.ensure_folder()
                    self._store.add_event(running.id, self._clock(), "progress", data)
                except (sqlite3.Error, OSError) as error:
                    log.warning("an event of job %s could not be stored: %s", running.id, error)
            self._changed.notify_all()

    def _preview(self, running: Running, event: Progress) -> bytes | None:
        """The event's picture as JPEG, at most twice a second; None where there is none."""
        if event.preview is None or time.monotonic() < running.next_preview:
            return None
        try:
            picture = jpeg(event.preview(), max_side=PREVIEW_SIDE)
        except Exception:  # a missing preview is no reason to lose the video
            log.warning("job %s goes on without previews\n%s", running.id, traceback.format_exc())
            running.next_preview = math.inf
            return None
        running.next_preview = time.monotonic() + PREVIEW_SECONDS
        return picture

    def _settle(self, running: Running, outcome: Outcome) -> None:
        """Records how the job ended. Under one lock with `cancel`: who was told that it stops never sees it succeed."""
        with self._changed:
            while not self.abandoned:
                state, error = self._verdict(running, outcome)
                result = outcome.report if state == "succeeded" else None
                try:
                    if state != "succeeded":
                        self._files.video(running.id).unlink(missing_ok=True)
                    self._store.finish(running.id, state, self._clock(), result=result, error=error)
                    break
                except (sqlite3.Error, OSError) as problem:  # without a record the job would run for ever
                    log.error("the end of job %s cannot be recorded yet: %s", running.id, problem)
                    with contextlib.suppress(OSError, LightX2VError):
                        self._purge()  # what is due to go may be what fills the disk
                    self._changed.wait(RETRY_SECONDS)
            self.running = None
            self._next_purge = 0.0
            self._changed.notify_all()

    def _verdict(self, running: Running, outcome: Outcome) -> tuple[State, dict[str, str] | None]:
        if running.asked:
            return "cancelled", None
        if outcome.report is not None:
            return "succeeded", None
        if outcome.cancelled and not self.closing:
            return "cancelled", None
        if outcome.cancelled:
            return "interrupted", INTERRUPTED
        if outcome.error is not None and outcome.error["type"] == INTERRUPTED["type"]:
            return "interrupted", outcome.error
        return "failed", outcome.error
