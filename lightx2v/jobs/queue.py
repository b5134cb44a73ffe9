"""The queue: jobs outlive pages, requests and restarts; one of them runs at a time.

    manager = JobManager(open_engine, Path("outputs"))
    job = manager.submit(config, request, owner="alice")
    manager.wait(job.id).path

One worker thread owns the engine. It keeps it while the jobs' EngineConfig stays equal and closes it before it opens
another: there are never two models in memory. Whatever goes wrong in a job ends that job, with a message for people
in `Job.error` and the traceback in the log, and the next job runs. A cancelled job never becomes succeeded.

Everything lives in one folder: jobs.sqlite, and per job files named by its id (`<id>.mp4`, input pictures). After a
restart queued jobs run, and the one that was running is `interrupted` and can be requeued.
"""

from __future__ import annotations

import re
import secrets
import sqlite3
import threading
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Self

from ..config.engine_config import EngineConfig
from ..config.request import Request
from ..errors import BadRequest, Busy, OutputError
from .engine_slot import Engine, OpenEngine
from .files import JobFiles
from .store import STATES, Job, JobEvent, JobStore, State, UnknownJob
from .worker import JobWorker

__all__ = ["Engine", "Job", "JobEvent", "JobManager", "OpenEngine", "UnknownJob"]


class JobManager:
    """Submit, watch, cancel. Every method may be called from any thread and returns at once, `wait` apart.

    `max_queue` jobs may wait besides the one that runs. `ttl` (seconds) and `size_cap` (bytes) bound what finished jobs
    leave in the folder; the oldest go first, queued and running ones and the newest result never. `predict` tells how
    many seconds a job takes, for `Job.starts_in`.
    """

    def __init__(
        self,
        open_engine: OpenEngine,
        folder: str | Path,
        *,
        max_queue: int = 10,
        ttl: float | None = None,
        size_cap: int | None = None,
        predict: Callable[[EngineConfig, Request], float | None] | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.folder = Path(folder).absolute()
        self.max_queue = max_queue
        self._ttl, self._size_cap = ttl, size_cap
        self._predict, self._clock = predict, clock
        self._lock = threading.RLock()
        self._changed = threading.Condition(self._lock)
        self._files = JobFiles(self.folder)
        self._store = JobStore(self.folder / "jobs.sqlite")
        self._closed = False
        self._worker = JobWorker(open_engine, self._store, self._files, self._changed, clock=clock, purge=self.purge)
        try:
            self._store.recover(clock())
            self._files.remove_leftovers()
        except BaseException:
            self._store.close()
            raise
        self._worker.start()

    # ---- asking -------------------------------------------------------------------------------------------------

    @property
    def alive(self) -> bool:
        """Whether jobs are being worked on. False is for a health check to show: only a restart helps."""
        return self._worker.alive

    @property
    def waiting(self) -> int:
        """How many jobs are queued."""
        with self._session() as store:
            return len(store.queued())

    def counts(self) -> dict[State, int]:
        """How many jobs there are in each state."""
        with self._session() as store:
            return store.counts()

    def check_room(self) -> None:
        """Busy if no job can be queued now. `submit` looks by itself; this is for whoever has work to do before it."""
        with self._session() as store:
            self._check_room(store)

    def get(self, id: str) -> Job:
        """The job as it stands; UnknownJob if there is none of this id."""
        with self._session() as store:
            return self._complete(self._row(store, id))

    def find(self, client_id: str, *, owner: str = "") -> Job:
        """The owner's job that was submitted under this client_id."""
        with self._session() as store:
            job = store.find(_label("owner", owner), _label("client_id", client_id))
            if job is None:
                raise UnknownJob(f"There is no job {client_id[:40]!r}. It may have been deleted.")
            return self._complete(job)

    def list(self, owner: str | None = None, *, limit: int = 100, states: Collection[State] = STATES) -> list[Job]:
        """Jobs, the newest first; of one owner, or of all."""
        with self._session() as store:
            queue = self._queue(store)
            return [self._complete(job, queue) for job in store.jobs(owner, states, min(max(limit, 0), 10_000))]

    def events(self, id: str, after: int = 0) -> list[JobEvent]:
        """The job's log, from the entry after number `after` on."""
        with self._session() as store:
            self._row(store, id)
            return store.events(id, min(max(after, 0), 2**62))

    def wait(self, id: str, timeout: float | None = None) -> Job:
        """Blocks until the job is over or `timeout` seconds have passed; returns it as it then stands."""
        with self._session() as store:
            self._changed.wait_for(lambda: self._worker.closing or self._row(store, id).over, timeout)
            return self.get(id)

    # ---- changing -----------------------------------------------------------------------------------------------

    def submit(
        self,
        config: EngineConfig,
        request: Request,
        *,
        owner: str = "",
        preset: str = "",
        client_id: str | None = None,
    ) -> Job:
        """Queues a job; Busy when the queue is full. Input pictures are checked and copied, the originals may go.

        The same `client_id` again from the same owner gives the same job: a client may repeat what got no answer.
        """
        owner, preset = _label("owner", owner), _label("preset", preset)
        client_id = None if client_id is None else _label("client_id", client_id)
        config.check_request(request)
        with self._session() as store:  # before pictures are read: a full queue answers at once
            if (known := self._known(store, owner, client_id, config, request)) is not None:
                return known
            self._check_room(store)
        id = secrets.token_hex(16)
        try:
            own = self._files.with_own_images(id, request)
            with self._session() as store, store.transaction():
                if (known := self._known(store, owner, client_id, config, request)) is not None:
                    self._files.remove(id)  # it came twice at the same time
                    return known
                self._check_room(store)
                store.add(
                    id, config=config, request=own, owner=owner, preset=preset, client_id=client_id, time=self._clock()
                )
                self._changed.notify_all()
                return self.get(id)
        except BaseException:
            self._files.remove(id)
            raise

    def cancel(self, id: str) -> Job:
        """A queued job is cancelled at once, a running one within a step; one that is over stays as it is."""
        with self._session() as store:
            state = self._row(store, id).state
            if state == "queued":
                store.finish(id, "cancelled", self._clock())
            elif self._worker.running is not None and self._worker.running.id == id:
                self._worker.running.asked = True
                self._worker.running.cancel.cancel()
            self._changed.notify_all()
            return self.get(id)

    def requeue(self, id: str) -> Job:
        """Runs a job again that failed, was cancelled or interrupted. One that waits or runs already stays as it is."""
        with self._session() as store:
            job = self._row(store, id)
            if job.state == "succeeded":
                raise BadRequest("This job has succeeded; running it again would replace its video. Submit it anew.")
            if job.over:
                self._check_room(store)
                store.requeue(id, self._clock())
                self._changed.notify_all()
            return self.get(id)

    def move(self, id: str, position: int) -> Job:
        """Gives a queued job another place in the queue, 1 being the next to run."""
        with self._session() as store:
            self._queued(store, id, "moved")
            order = [other for other in store.queued() if other != id]
            order.insert(min(max(position, 1) - 1, len(order)), id)
            store.order(order)
            self._changed.notify_all()
            return self.get(id)

    def edit(self, id: str, request: Request, *, config: EngineConfig | None = None, preset: str | None = None) -> Job:
        """Replaces the request of a job that still waits, and its engine where one is given; it keeps its place."""
        with self._session() as store:
            job = self._queued(store, id, "changed")
        config = config or job.config
        preset = job.preset if preset is None else _label("preset", preset)
        config.check_request(request)
        own = self._files.with_own_images(id, request)
        with self._session() as store:
            self._queued(store, id, "changed")
            store.change(id, config=config, request=own, preset=preset)
            self._changed.notify_all()
            return self.get(id)

    def delete(self, id: str) -> None:
        """Removes a job and its files. A running one has to be cancelled first."""
        with self._session() as store:
            if self._row(store, id).state == "running":
                raise BadRequest("This job is running. Cancel it first, and delete it when it has stopped.")
            self._remove(store, id)
            self._changed.notify_all()

    def purge(self) -> list[str]:
        """Deletes what `ttl` and `size_cap` say, the oldest first; returns the ids. The worker calls it by itself."""
        if self._ttl is None and self._size_cap is None:
            return []
        with self._session() as store:
            over = store.over()
            doomed = [id for id, ended in over if self._ttl is not None and ended < self._clock() - self._ttl]
            if self._size_cap is not None:
                sizes = self._files.sizes()
                gone = set(doomed)  # not the list's beginning, if the clock was put back
                kept = [id for id, _ in over if id not in gone]
                total = sum(sizes.get(id, 0) for id in kept)
                for id in kept[:-1]:
                    if total <= self._size_cap:
                        break
                    total -= sizes.get(id, 0)
                    doomed.append(id)
            for id in doomed:
                self._remove(store, id)
            self._changed.notify_all()
        return doomed

    def close(self, timeout: float = 5.0) -> bool:
        """The running job becomes interrupted, queued ones wait for the next start. False if the engine hangs on."""
        stopped = self._worker.stop(timeout)
        with self._lock:
            self._closed = self._worker.abandoned = True
            self._store.close()
        return stopped

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    # ---- inside -------------------------------------------------------------------------------------------------

    @contextmanager
    def _session(self) -> Iterator[JobStore]:
        """The store under the lock; its errors as ours."""
        with self._lock:
            if self._closed:
                raise Busy("The program is stopping. Ask again after its restart.")
            try:
                yield self._store
            except sqlite3.Error as error:
                raise OutputError(f"The list of jobs cannot be read or written: {error}. Is the disk full?") from None

    def _row(self, store: JobStore, id: str) -> Job:
        if not isinstance(id, str) or re.fullmatch("[0-9a-f]{32}", id) is None:
            raise UnknownJob("There is no job of this id.")
        return store.job(id)

    def _remove(self, store: JobStore, id: str) -> None:
        """The files first: on a full disk nothing can be taken off the list before they are gone."""
        self._files.remove(id)
        store.remove(id)

    def _queued(self, store: JobStore, id: str, verb: str) -> Job:
        job = self._row(store, id)
        if job.state != "queued":
            raise BadRequest(f"This job is {job.state}; only a job that waits can be {verb}.")
        return job

    def _check_room(self, store: JobStore) -> None:
        if self._worker.broken or self._worker.closing:
            raise Busy(self._worker.broken or "The program is stopping. Ask again after its restart.")
        waiting = len(store.queued())
        if waiting >= self.max_queue:
            raise Busy(f"The queue is full: {waiting} jobs are waiting, no more than {self.max_queue} may. Try later.")

    def _known(
        self, store: JobStore, owner: str, client_id: str | None, config: EngineConfig, request: Request
    ) -> Job | None:
        """The job already made from this very submission, if there is one."""
        job = None if client_id is None else store.find(owner, client_id)
        if job is None:
            return None
        own = {"image_path": job.request.image_path, "last_frame_path": job.request.last_frame_path}
        if job.config != config or job.request.task != request.task or replace(request, **own) != job.request:
            raise BadRequest("This id was used for another job already. Choose a new one, or none.")
        return self._complete(job)

    def _queue(self, store: JobStore) -> dict[str, tuple[int, float | None]]:
        """Of each queued job: its position, and the seconds until it starts as far as they can be predicted."""
        queue: dict[str, tuple[int, float | None]] = {}
        ahead = self._remaining(store)
        for position, id in enumerate(store.queued(), 1):
            queue[id] = (position, ahead)
            if ahead is not None and self._predict is not None:
                job = store.job(id)
                seconds = self._predict(job.config, job.request)
                ahead = None if seconds is None else ahead + seconds
        return queue

    def _remaining(self, store: JobStore) -> float | None:
        if self._predict is None:
            return None
        if self._worker.running is None:
            return 0.0
        progress = self._worker.running.progress
        if progress is not None and progress.eta is not None and progress.stage in ("denoise", "decode", "write"):
            return progress.eta
        job = store.job(self._worker.running.id)
        whole = self._predict(job.config, job.request)
        return None if whole is None else max(0.0, whole - (self._clock() - (job.started or 0.0)))

    def _complete(self, job: Job, queue: dict[str, tuple[int, float | None]] | None = None) -> Job:
        """Adds what is not in the store: place in the queue, progress, the video's path."""
        if job.state == "queued":
            position, starts_in = (self._queue(self._store) if queue is None else queue)[job.id]
            return replace(job, position=position, starts_in=starts_in)
        if job.state == "succeeded":
            return replace(job, path=self._files.video(job.id))
        running = self._worker.running
        if running is None or running.id != job.id:
            return job
        return replace(job, cancelling=running.asked, progress=running.progress, preview=running.preview)


def _label(name: str, text: str) -> str:
    """A short text that is safe to store and to log."""
    if not isinstance(text, str) or len(text) > 200 or not (text.isprintable() and text.isascii() or not text):
        raise BadRequest(f"{name} must be at most 200 printable ASCII characters.")
    return text
