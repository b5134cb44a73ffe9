"""JobWorker: the thread that runs the jobs one after the other and publishes their progress.

It shares the store with JobManager under one lock. No other thread touches the engine while this one runs.
"""

import contextlib
import logging
import math
import sqlite3
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from functools import partial

from ..errors import LightX2VError
from ..media.images import jpeg
from ..progress import CancelToken, Progress
from .engine_slot import EngineSlot, Outcome
from .files import JobFiles
from .store import INTERRUPTED, Job, JobEvent, JobStore, State, StepLog

log = logging.getLogger("lightx2v.jobs")

PREVIEW_SECONDS = 0.5
PREVIEW_SIDE = 512
EVENT_SECONDS = 0.5
"""Least time between two logged events that are not denoising steps. `Running.progress` is always the newest."""
PURGE_SECONDS = 60.0
RETRY_SECONDS = 1.0


@dataclass(slots=True)
class Running:
    """The job that is running. `event` is the id of its latest event, `steps` counts the progress events among them."""

    id: str
    event: int
    steps: int = 0
    cancel: CancelToken = field(default_factory=CancelToken)
    cancel_requested: bool = False
    progress: Progress | None = None
    preview: bytes | None = None
    next_preview: float = 0.0
    next_event: float = 0.0


class JobWorker:
    """`running` is the current job; `broken` is the reason why the thread has ended for good. Use both under the lock.

    `abandoned`: the store is closed, and the thread must not use it, because the engine did not stop in time.
    """

    def __init__(
        self,
        slot: EngineSlot,
        store: JobStore,
        files: JobFiles,
        steps: StepLog,
        changed: threading.Condition,
        *,
        clock: Callable[[], float],
        purge: Callable[[], object],
        save_every: float,
    ) -> None:
        self.running: Running | None = None
        self.closing = self.abandoned = False
        self.broken = ""
        self._slot, self._store, self._files, self._steps = slot, store, files, steps
        self._changed, self._clock, self._purge, self._save_every = changed, clock, purge, save_every
        self._next_purge = 0.0
        self._thread = threading.Thread(target=self._work, daemon=True, name="lightx2v-jobs")

    def start(self) -> None:
        self._thread.start()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive() and not self.broken and not self.closing

    def interrupt(self) -> None:
        """Suspend the running job, and start no other."""
        with self._changed:
            self.closing = True
            if self.running is not None:
                self.running.cancel.suspend()
            self._changed.notify_all()

    def stop(self, timeout: float) -> bool:
        """Interrupt, and wait for the thread to end. False if the engine does not stop within `timeout` seconds."""
        self.interrupt()
        if self._thread.ident is None:  # never started
            self._slot.close()
            return True
        self._thread.join(timeout)
        return not self._thread.is_alive()

    def _work(self) -> None:
        """The thread: take the next job, run it, record its end, until the manager closes."""
        try:
            while (next_job := self._take()) is not None:
                job, running = next_job
                on_progress = partial(self._on_progress, running)
                path, steps = self._files.video(job.id), self._files.steps(job.id, self._save_every)
                outcome = self._slot.run(job, path, on_progress=on_progress, cancel=running.cancel, steps=steps)
                self._finish(running, outcome)
                if outcome.fatal:
                    self.broken = "The GPU needs a restart of the program."
                    break
        finally:  # also when a job ends the thread, with SystemExit for example
            if not self.closing:
                self.broken = self.broken or "The worker has stopped. See the program's log, then restart it."
                log.critical(self.broken)
                if self.running is not None:
                    self._finish(self.running, Outcome(error={"type": "Interrupted", "message": self.broken}))
            self._slot.close()

    def _take(self) -> tuple[Job, Running] | None:
        """Wait for the next job and mark it as running. None when the manager closes."""
        with self._changed:
            while not self.closing and not self.broken:
                try:
                    if time.monotonic() >= self._next_purge:
                        self._next_purge = time.monotonic() + PURGE_SECONDS
                        self._purge()
                    for id in self._store.queued()[:1]:
                        job = self._store.job(id)
                        self._files.ensure_folder()
                        self._files.remove_video(id)  # from a run that was interrupted
                        self.running = Running(id, event=self._store.start(id, self._clock()))
                        self._changed.notify_all()
                        return job, self.running
                    self._changed.wait(PURGE_SECONDS)
                except (sqlite3.Error, OSError, LightX2VError) as error:  # usually a full disk: try again
                    log.error("the queue waits: %s", error)
                    self._changed.wait(RETRY_SECONDS)
        return None

    def _on_progress(self, running: Running, progress: Progress) -> None:
        preview = self._preview(running, progress)
        with self._changed:
            new_stage = running.progress is None or running.progress.stage != progress.stage
            finished = progress.step == progress.total
            running.progress = replace(progress, preview=None)
            running.preview = preview or running.preview
            now = time.monotonic()
            if new_stage or finished or progress.stage == "denoise" or now >= running.next_event:
                running.next_event = now + EVENT_SECONDS
                running.event += 1
                running.steps += 1
                data = {f.name: getattr(progress, f.name) for f in fields(progress) if f.name != "preview"}
                event = JobEvent(id=running.event, time=self._clock(), kind="progress", data=data)
                self._steps.add(running.id, event)
                with contextlib.suppress(OSError):
                    self._files.ensure_folder()
            self._changed.notify_all()

    def _preview(self, running: Running, progress: Progress) -> bytes | None:
        """The preview as JPEG, at most twice a second; else None."""
        if progress.preview is None or time.monotonic() < running.next_preview:
            return None
        try:
            image = jpeg(progress.preview(), max_side=PREVIEW_SIDE)
        except Exception:  # a missing preview is no reason to lose the video
            log.warning("job %s continues without previews\n%s", running.id, traceback.format_exc())
            running.next_preview = math.inf
            return None
        running.next_preview = time.monotonic() + PREVIEW_SECONDS
        return image

    def _finish(self, running: Running, outcome: Outcome) -> None:
        """Record the end of the job, under the lock that `cancel` takes: a job that was cancelled never succeeds."""
        with self._changed:
            while not self.abandoned:
                state, error = self._end_of(running, outcome)
                result = outcome.report if state == "succeeded" else None
                id, now, skip = running.id, self._clock(), running.steps
                try:
                    if state != "succeeded":
                        self._files.remove_video(id)
                    if state == "queued":
                        self._store.resume_later(id, now, died=outcome.died, skip=skip)
                    else:
                        self._store.finish(id, state, now, result=result, error=error, skip=skip)
                    if state in ("succeeded", "cancelled"):
                        self._files.steps(id).remove()
                    break
                except (sqlite3.Error, OSError) as problem:  # without a record the job would stay running for ever
                    log.error("the end of job %s cannot be recorded yet: %s", running.id, problem)
                    with contextlib.suppress(OSError, LightX2VError):
                        self._purge()  # expired jobs may be what fills the disk
                    self._changed.wait(RETRY_SECONDS)
            self.running = None
            self._next_purge = 0.0
            self._changed.notify_all()

    def _end_of(self, running: Running, outcome: Outcome) -> tuple[State, dict[str, str] | None]:
        """The final state and the error; "queued" if the job is to go on after a restart of the program."""
        if running.cancel_requested:
            return "cancelled", None
        if outcome.report is not None:
            return "succeeded", None
        if outcome.died or (outcome.cancelled and self.closing):
            return "queued", None
        if outcome.cancelled:
            return "cancelled", None
        if outcome.error is not None and outcome.error["type"] == INTERRUPTED["type"]:
            return "interrupted", outcome.error
        return "failed", outcome.error
