"""JobWorker: the thread that runs jobs on one replica, one after the other, and publishes their progress.

It shares the store with JobManager and the other workers under one lock.
"""

import contextlib
import logging
import math
import sqlite3
import threading
import time
import traceback
from dataclasses import dataclass, field, fields, replace
from functools import partial
from typing import Protocol

from ..errors import LightX2VError
from ..media.images import jpeg
from ..progress import CancelToken, Progress
from .replica import OnFinished, Outcome, Replica
from .state import QueueState
from .store import GOES_ON, INTERRUPTED, MOVED, WORKER_ENDED, Job, JobEvent, State

log = logging.getLogger("lightx2v.jobs")

PREVIEW_SECONDS = 0.5
PREVIEW_SIDE = 512
EVENT_SECONDS = 0.5
"""Least time between two logged events that are not denoising steps. `Running.progress` is always the newest."""
PURGE_SECONDS = 60.0
RETRY_SECONDS = 1.0
LOOK_SECONDS = 1.0
"""Seconds between two looks of an idle worker at jobs that wait for another one."""
STOPPED = "The worker has stopped. See the program's log, then restart it."
LOST = "The GPU needs a restart of the program."
ENDED = "The worker {name} has ended. See the program's log, then restart it."


@dataclass(slots=True)
class Running:
    """A job that is running. `event` is the id of its latest event, `steps` counts the progress events among them.
    `loaded`: its model was in memory already. `heard` is when `progress` came."""

    job: Job
    event: int
    loaded: bool
    steps: int = 0
    cancel: CancelToken = field(default_factory=CancelToken)
    cancel_requested: bool = False
    progress: Progress | None = None
    preview: bytes | None = None
    heard: float = 0.0
    next_preview: float = 0.0
    next_event: float = 0.0


class Dispatch(Protocol):
    """What a worker asks of the pool that it belongs to. All of it under the lock."""

    closing: bool
    broken: str

    def next_job(self, worker: "JobWorker") -> str | None:
        """The id of the job that this worker is to run now; None to wait."""
        ...

    def left(self, worker: "JobWorker", reason: str) -> None:
        """The worker runs nothing more; `reason` is "" where it was asked to stop."""
        ...

    def goes_on_without(self, worker: "JobWorker") -> bool:
        """Whether another worker can take the job of this one, now or later."""
        ...

    def purge(self) -> object:
        """Remove expired jobs."""
        ...


class JobWorker:
    """`running` is the current job. With `paused` it takes no job. Use everything under the lock.

    `leaving`: it is to end. `abandoned`: its replica did not stop in time, so whatever it still does has no effect.
    """

    def __init__(
        self, replica: Replica, state: QueueState, pool: Dispatch, on_finished: OnFinished | None = None
    ) -> None:
        self.replica = replica
        self.running: Running | None = None
        self.last_run = 0.0
        self.paused = self.leaving = self.abandoned = False
        self._state, self._pool, self._on_finished = state, pool, on_finished
        self._store, self._files, self._changed = state.store, state.files, state.changed
        self._next_purge = 0.0
        self._thread = threading.Thread(target=self._work, daemon=True, name="lightx2v-jobs")

    def start(self) -> None:
        self._thread.start()

    def pause(self, paused: bool) -> None:
        """Take no job and suspend the running one, or take jobs again."""
        self.paused = paused
        self._suspend_if(paused)

    def interrupt(self) -> None:
        """Suspend the running job, and start no other."""
        self.leaving = True
        self._suspend_if(True)

    def join(self, timeout: float) -> bool:
        """Wait for the end of an interrupted worker, without the lock. False if its replica does not stop in time."""
        if self._thread.ident is None:  # never started
            self.replica.close()
            return True
        self._thread.join(max(timeout, 0.0))
        return not self._thread.is_alive()

    def abandon(self) -> None:
        """Go on without this worker, whose replica does not stop: its job goes back to the queue."""
        if self.running is not None:
            self._finish(self.running, Outcome(died=True))
        self.abandoned = True

    def _suspend_if(self, wanted: bool) -> None:
        if wanted and self.running is not None:
            self.running.cancel.suspend()
        self._changed.notify_all()

    def _work(self) -> None:
        """The thread: take the next job, run it, record its end, until the pool closes or the replica ends."""
        reason = STOPPED
        try:
            while (running := self._take()) is not None:
                outcome = self._run(running)
                self._finish(running, outcome)
                if outcome.fatal or not self.replica.alive:
                    reason = LOST if outcome.fatal else ENDED.format(name=self.replica.name)
                    break
            else:
                reason = "" if self.replica.alive else ENDED.format(name=self.replica.name)
        finally:  # also when a job ends the thread, with SystemExit for example
            with self._changed:
                reason = "" if self.leaving else self._pool.broken or reason
                if self.running is not None and not self.abandoned:
                    error = {"type": INTERRUPTED["type"], "message": STOPPED}
                    died = self._pool.goes_on_without(self)
                    self._finish(self.running, Outcome(died=True) if died else Outcome(error=error))
                self._pool.left(self, reason)
            self.replica.close()

    def _run(self, running: Running) -> Outcome:
        job = running.job
        path, steps = self._files.video(job.id), self._files.steps(job.id, self._state.save_every)
        on_progress = partial(self._on_progress, running)
        outcome = self.replica.run(job, path, on_progress=on_progress, cancel=running.cancel, steps=steps)
        if self.abandoned:
            self._discard(job.id)
            return outcome
        try:
            if self._on_finished is not None:
                self._on_finished(job.config, job.request, replace(outcome, device=self.replica.device))
        except Exception:  # statistics are no reason to lose the video
            log.error("on_finished failed for job %s\n%s", job.id, traceback.format_exc())
        return outcome

    def _discard(self, id: str) -> None:
        """Remove what an abandoned run has written for a job that was deleted meanwhile."""
        with self._changed:
            if not self._state.closed and id not in self._store.ids():
                self._files.remove(id)

    def _take(self) -> Running | None:
        """Wait for the next job and mark it as running. None when there will be none."""
        with self._changed:
            while not (self.leaving or self._pool.closing or self._pool.broken) and self.replica.alive:
                try:
                    if time.monotonic() >= self._next_purge:
                        self._next_purge = time.monotonic() + PURGE_SECONDS
                        self._pool.purge()
                    id = None if self.paused else self._pool.next_job(self)
                    if id is not None:
                        self._files.ensure_folder()
                        self._files.remove_video(id)  # from a run that was interrupted
                        event = self._store.start(id, self._state.clock())
                        job, model = self._store.job(id), self.replica.loaded
                        self.running = Running(job, event, loaded=model is not None and model.config == job.config)
                        self._changed.notify_all()
                        return self.running
                    self._changed.wait(LOOK_SECONDS if self._store.queued() else PURGE_SECONDS)
                except (sqlite3.Error, OSError, LightX2VError) as error:  # usually a full disk: try again
                    log.error("the queue waits: %s", error)
                    self._changed.wait(RETRY_SECONDS)
        return None

    def _on_progress(self, running: Running, progress: Progress) -> None:
        preview = self._preview(running, progress)
        with self._changed:
            if self.abandoned:
                return
            new_stage = running.progress is None or running.progress.stage != progress.stage
            finished = progress.step == progress.total
            running.progress, running.heard = replace(progress, preview=None), self._state.clock()
            running.preview = preview or running.preview
            now = time.monotonic()
            if new_stage or finished or progress.stage == "denoise" or now >= running.next_event:
                running.next_event = now + EVENT_SECONDS
                running.event += 1
                running.steps += 1
                data = {f.name: getattr(progress, f.name) for f in fields(progress) if f.name != "preview"}
                event = JobEvent(id=running.event, time=running.heard, kind="progress", data=data)
                self._state.steps.add(running.job.id, event)
                with contextlib.suppress(OSError):
                    self._files.ensure_folder()
            self._changed.notify_all()

    def _preview(self, running: Running, progress: Progress) -> bytes | None:
        """The preview as JPEG, at most twice a second; else None."""
        if progress.preview is None or time.monotonic() < running.next_preview:
            return None
        try:
            image = progress.preview()
            if not isinstance(image, bytes):  # another process has made it one
                image = jpeg(image, max_side=PREVIEW_SIDE)
        except Exception:  # a missing preview is no reason to lose the video
            log.warning("job %s continues without previews\n%s", running.job.id, traceback.format_exc())
            running.next_preview = math.inf
            return None
        running.next_preview = time.monotonic() + PREVIEW_SECONDS
        return image

    def _finish(self, running: Running, outcome: Outcome) -> None:
        """Record the end of the job, under the lock that `cancel` takes: a job that was cancelled never succeeds."""
        with self._changed:
            while self.running is running and not self.abandoned:
                state, error = self._end_of(running, outcome)
                result = outcome.report if state == "succeeded" else None
                id, now, skip = running.job.id, self._state.clock(), running.steps
                try:
                    if state != "succeeded":
                        self._files.remove_video(id)
                    if state == "queued":
                        note = self._note(outcome)
                        self._store.resume_later(id, now, died=outcome.died, note=note, skip=skip)
                    else:
                        self._store.finish(id, state, now, result=result, error=error, skip=skip)
                    if state in ("succeeded", "cancelled"):
                        self._files.steps(id).remove()
                    break
                except (sqlite3.Error, OSError) as problem:  # without a record the job would stay running for ever
                    log.error("the end of job %s cannot be recorded yet: %s", running.job.id, problem)
                    with contextlib.suppress(OSError, LightX2VError):
                        self._pool.purge()  # expired jobs may be what fills the disk
                    self._changed.wait(RETRY_SECONDS)
            self.running, self.last_run = None, time.monotonic()
            self._next_purge = 0.0
            self._changed.notify_all()

    def _end_of(self, running: Running, outcome: Outcome) -> tuple[State, dict[str, str] | None]:
        """The final state and the error; "queued" if the job is to go on later, or on another replica."""
        if running.cancel_requested:
            return "cancelled", None
        if outcome.report is not None:
            return "succeeded", None
        if outcome.died or outcome.refused or (outcome.cancelled and running.cancel.suspended):
            return "queued", None
        if outcome.cancelled:
            return "cancelled", None
        if outcome.error is not None and outcome.error["type"] == INTERRUPTED["type"]:
            return "interrupted", outcome.error
        return "failed", outcome.error

    def _note(self, outcome: Outcome) -> str:
        """Why a job went back to the queue."""
        if self._pool.closing:
            return GOES_ON
        return outcome.refused or (WORKER_ENDED if outcome.died else MOVED)
