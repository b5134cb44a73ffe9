"""JobManager: the job queue. Jobs survive closed pages, finished requests and restarts; one of them runs at a time.

    manager = JobManager(open_engine, Path("outputs"))
    job = manager.submit(config, request, owner="alice")
    manager.wait(job.id).path

One worker thread owns the engine. It keeps the engine while the jobs' EngineConfig stays equal and closes it before it
opens another: there are never two models in memory. An error in a job ends only that job, with a message for the user
in `Job.error` and the traceback in the log, and the next job runs. A cancelled job never becomes succeeded.

Everything is in one folder: jobs.sqlite, and for each job the files named after its id (`<id>.mp4`, input images).
After a restart the job that was running goes on at its last saved step; after two in a row it is `interrupted`.
"""

from __future__ import annotations

import logging
import re
import secrets
import sqlite3
import threading
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Self

from ..config.engine_config import EngineConfig
from ..config.request import Request, draw_seed
from ..errors import BadRequest, Busy, ConfigError, LightX2VError, OutputError
from ..progress import CancelToken, OnProgress
from ..step_file import SAVE_EVERY
from .engine_slot import Engine, EngineSlot, LoadedModel, OnFinished, OpenEngine
from .files import JobFiles
from .recovery import recover_jobs, remove_useless_steps
from .store import STATES, Job, JobEvent, JobStore, State, StepLog, UnknownJob
from .worker import JobWorker

log = logging.getLogger("lightx2v.jobs")

FOLDER_SECONDS = 0.5
"""Seconds between two looks whether the folder is still there."""
TAKEN = "The output folder was removed, and another program uses it now. Stop that one, then start this one again."
CLOSING = "The server is shutting down. Retry once it has restarted."


class Changes(threading.Condition):
    """Wakes threads, as any condition does, and calls listeners: event loops, which must not block."""

    def __init__(self, lock: threading.RLock) -> None:
        super().__init__(lock)
        self.listeners: list[Callable[[], None]] = []

    def notify_all(self) -> None:
        super().notify_all()
        for listener in tuple(self.listeners):
            listener()


class JobManager:
    """Submit, watch and cancel jobs. Call any method from any thread; only `wait` and `load` block.

    `max_queue` jobs may wait besides the running one. `ttl` (seconds) and `size_cap` (bytes) limit what finished jobs
    leave in the folder: the oldest go first; queued and running jobs and the newest result always stay. `predict`
    estimates the seconds that a job takes, for `Job.starts_in`. `on_finished` is called after every run. A run
    saves its step at most once in `save_every` seconds. With `start=False` no job runs before `start()`.
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
        on_finished: OnFinished | None = None,
        clock: Callable[[], float] = time.time,
        save_every: float = SAVE_EVERY,
        start: bool = True,
    ) -> None:
        self.folder = Path(folder).absolute()
        self.max_queue = max_queue
        self._ttl, self._size_cap = ttl, size_cap
        self._predict, self._clock = predict, clock
        self._lock = threading.RLock()
        self._changed = Changes(self._lock)
        self._files, self._steps = JobFiles(self.folder), StepLog()
        self._store = JobStore(self.folder / "jobs.sqlite")
        self._closed, self._closing = False, threading.Event()
        self._slot = EngineSlot(open_engine, on_finished)
        shared = self._slot, self._store, self._files, self._steps, self._changed
        self._worker = JobWorker(*shared, clock=clock, purge=self.purge, save_every=save_every)
        try:
            self._store.recover(clock())
            recover_jobs(self._store, self._files)
            self._files.remove_leftovers(self._store.ids())
            remove_useless_steps(self._store, self._files)
        except BaseException:
            self._store.close()
            raise
        threading.Thread(target=self._keep_folder, daemon=True, name="lightx2v-folder").start()
        if start:
            self.start()

    def load(self, config: EngineConfig, *, preset: str, on_progress: OnProgress, cancel: CancelToken) -> Engine:
        """Load an engine before `start`, in this thread; its errors pass to the caller. The first job then uses it."""
        return self._slot.load(config, preset=preset, on_progress=on_progress, cancel=cancel)

    def start(self) -> None:
        """Let the jobs run."""
        self._worker.start()

    # ---- queries ------------------------------------------------------------------------------------------------

    @property
    def alive(self) -> bool:
        """False once the worker has ended: a health check should show this, because only a restart helps."""
        return self._worker.alive

    @property
    def loaded(self) -> LoadedModel | None:
        return self._slot.loaded

    @property
    def waiting(self) -> int:
        """The number of queued jobs."""
        with self._session() as store:
            return len(store.queued())

    def counts(self) -> dict[State, int]:
        with self._session() as store:
            return store.counts()

    def check_room(self, owner: str = "", client_id: str | None = None) -> None:
        """Raise Busy if no job can be queued now, unless the owner has one with this client_id already. `submit` checks
        too; call this before expensive work."""
        with self._session() as store:
            if client_id is None or store.find(_label("owner", owner), _label("client_id", client_id)) is None:
                self._check_room()

    def get(self, id: str) -> Job:
        """A snapshot of the job; UnknownJob if there is none with this id."""
        with self._session():
            return self._complete(self._row(id))

    def find(self, client_id: str, *, owner: str = "") -> Job:
        """The owner's job with this client_id."""
        with self._session() as store:
            job = store.find(_label("owner", owner), _label("client_id", client_id))
            if job is None:
                raise UnknownJob(f"There is no job {client_id[:40]!r}. It may have been deleted.")
            return self._complete(job)

    def list(
        self,
        owner: str | None = None,
        *,
        limit: int = 100,
        states: Collection[State] = STATES,
        after: str | None = None,
        oldest_first: bool = False,
    ) -> list[Job]:
        """The jobs of one owner, or of all for None, the newest first unless `oldest_first`; those that follow the job
        `after` in this order, also if it was removed; UnknownJob if it is not known."""
        limit = min(max(limit, 0), 10_000)
        with self._session() as store:
            queue = self._queue()
            found = store.jobs(owner, states, limit, after=after, oldest_first=oldest_first)
            return [self._complete(job, queue) for job in found]

    def events(self, id: str, after: int = 0) -> list[JobEvent]:
        """The job's events with larger ids than `after`, in order. Those of its progress do not survive a restart."""
        with self._session() as store:
            self._row(id)
            after = min(max(after, 0), 2**62)
            return sorted(store.events(id, after) + self._steps.events(id, after), key=lambda event: event.id)

    @contextmanager
    def listening(self, listener: Callable[[], None]) -> Iterator[None]:
        """Call `listener` after every change, from the thread that made it. It must return at once."""
        self._changed.listeners.append(listener)
        try:
            yield
        finally:
            self._changed.listeners.remove(listener)

    def wait(self, id: str, timeout: float | None = None) -> Job:
        """Block until the job is over or `timeout` seconds have passed; return a snapshot of it."""
        with self._session():
            self._changed.wait_for(lambda: self._worker.closing or self._row(id).over, timeout)
            return self.get(id)

    # ---- commands -----------------------------------------------------------------------------------------------

    def submit(
        self,
        config: EngineConfig,
        request: Request,
        *,
        owner: str = "",
        preset: str = "",
        client_id: str | None = None,
        source: str | None = None,
    ) -> Job:
        """Queue a job; Busy when the queue is full. The job keeps checked copies of its input images, and draws its
        seed if that is -1. `source` is the job whose settings it has.

        The same submission with the same `client_id` from the same owner returns the same job, so that a client may
        repeat a request that got no response.
        """
        owner, preset = _label("owner", owner), _label("preset", preset)
        client_id = None if client_id is None else _label("client_id", client_id)
        config.check_request(request)
        with self._session():  # before reading images, so that a full queue refuses at once
            if (known := self._known(owner, client_id, config, request)) is not None:
                return known
        id = secrets.token_hex(16)
        try:
            own = self._files.with_own_images(id, request)
            with self._session() as store, store.transaction():
                if (known := self._known(owner, client_id, config, request)) is not None:
                    self._files.remove(id)  # the same submission arrived twice at the same time
                    return known
                if own.seed == -1:  # not before the comparison, of which a drawn one is no part
                    own = replace(own, seed=draw_seed())
                labels = {"owner": owner, "preset": preset, "client_id": client_id, "source": source}
                store.add(id, config, own, **labels, time=self._clock())
                self._changed.notify_all()
                return self.get(id)
        except BaseException:
            self._files.remove(id)
            raise

    def cancel(self, id: str) -> Job:
        """Cancel a queued job at once, a running one within a step. A job that is over stays unchanged."""
        with self._session() as store:
            state = self._row(id).state
            if state == "queued":
                store.finish(id, "cancelled", self._clock())
                self._files.steps(id).remove()
            elif self._worker.running is not None and self._worker.running.id == id:
                store.request_cancel(id)
                self._worker.running.cancel_requested = True
                self._worker.running.cancel.cancel()
            self._changed.notify_all()
            return self.get(id)

    def requeue(self, id: str) -> Job:
        """Run a job again that failed, was cancelled or interrupted. A queued or running one stays unchanged."""
        with self._session() as store:
            job = self._row(id)
            if job.state == "succeeded":
                raise BadRequest("This job has succeeded. A second run would replace its video. Submit a new job.")
            if job.over:
                self._check_room()
                store.requeue(id, self._clock())
                self._changed.notify_all()
            return self.get(id)

    def move(self, id: str, position: int) -> Job:
        """Move a queued job to another place in the queue; 1 is the next to run."""
        with self._session() as store:
            self._queued(id, "moved")
            order = [other for other in store.queued() if other != id]
            order.insert(min(max(position, 1) - 1, len(order)), id)
            store.order(order)
            self._changed.notify_all()
            return self.get(id)

    def edit(self, id: str, request: Request, *, config: EngineConfig | None = None, preset: str | None = None) -> Job:
        """Replace the request of a queued job, and its engine if `config` is given. The job keeps its place."""
        with self._session() as store:
            job = self._queued(id, "changed")
        config = config or job.config
        preset = job.preset if preset is None else _label("preset", preset)
        config.check_request(request)
        own = self._files.with_own_images(id, request)
        with self._session() as store:
            self._queued(id, "changed")
            if (config, own) != (job.config, job.request):
                self._files.steps(id).remove()  # that of a run before a restart
            store.change(id, config=config, request=own, preset=preset)
            self._changed.notify_all()
            return self.get(id)

    def delete(self, id: str) -> None:
        """Remove a job and its files. Cancel a running one first."""
        with self._session():
            if self._row(id).state == "running":
                raise BadRequest("This job is running. Cancel it first, and delete it once it has stopped.")
            self._remove(id)
            self._changed.notify_all()

    def purge(self) -> list[str]:
        """Delete finished jobs beyond `ttl` and `size_cap`, oldest first; return their ids. The worker calls this."""
        if self._ttl is None and self._size_cap is None:
            return []
        with self._session() as store:
            over = store.over()
            expired = [id for id, ended in over if self._ttl is not None and ended < self._clock() - self._ttl]
            if self._size_cap is not None:
                sizes = self._files.sizes()
                gone = set(expired)  # not always the first ones: the clock may have been put back
                kept = [id for id, _ in over if id not in gone]
                total = sum(sizes.get(id, 0) for id in kept)
                for id in kept[:-1]:
                    if total <= self._size_cap:
                        break
                    total -= sizes.get(id, 0)
                    expired.append(id)
            for id in expired:
                self._remove(id)
            self._changed.notify_all()
        return expired

    def interrupt(self) -> None:
        """Begin to close: the running job stops within a block, and no other job is accepted or started."""
        self._worker.interrupt()

    def close(self, timeout: float = 5.0) -> bool:
        """Suspend the running job, which goes on at the next start. False if the engine does not stop."""
        self._closing.set()
        stopped = self._worker.stop(timeout)
        with self._lock:
            self._closed = self._worker.abandoned = True
            self._store.close()
            self._changed.notify_all()
        return stopped

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _keep_folder(self) -> None:
        """A thread: put the store back where its folder was removed, before another process takes the folder."""
        told = ""
        while not self._closing.wait(FOLDER_SECONDS):
            with self._lock:
                if self._closed or self._store.in_place:
                    continue
                try:
                    self._store.put_back()
                    log.warning("The list of jobs was removed while this program used it. It is back.")
                except ConfigError:
                    self._worker.broken = TAKEN
                    self._changed.notify_all()
                    log.critical(TAKEN)
                    return
                except (OSError, sqlite3.Error, LightX2VError) as error:  # a full disk: try again
                    if told != (told := str(error)):
                        log.error("the list of jobs was removed and cannot be written again yet: %s", error)

    @contextmanager
    def _session(self) -> Iterator[JobStore]:
        """The store, under the lock; its errors become OutputError."""
        with self._lock:
            if self._closed:
                raise Busy(CLOSING)
            try:
                yield self._store
            except sqlite3.Error as error:
                raise OutputError(f"Cannot access the list of jobs: {error}. Is the disk full?") from None

    def _row(self, id: str) -> Job:
        if not isinstance(id, str) or re.fullmatch("[0-9a-f]{32}", id) is None:
            raise UnknownJob("There is no job with this id.")
        return self._store.job(id)

    def _remove(self, id: str) -> None:
        """Remove the files first: on a full disk SQLite needs their space to delete the row."""
        self._files.remove(id)
        self._steps.remove(id)
        self._store.remove(id)

    def _queued(self, id: str, verb: str) -> Job:
        job = self._row(id)
        if job.state != "queued":
            raise BadRequest(f"This job is {job.state}; only a queued job can be {verb}.")
        return job

    def _check_room(self) -> None:
        if self._worker.broken or self._worker.closing:
            raise Busy(self._worker.broken or CLOSING)
        waiting = len(self._store.queued())
        if waiting >= self.max_queue:
            raise Busy(
                f"The queue is full: {waiting} jobs are waiting, and the limit is {self.max_queue}. Try again later."
            )

    def _known(self, owner: str, client_id: str | None, config: EngineConfig, request: Request) -> Job | None:
        """The job of an earlier, equal submission, if there is one. Without one, Busy if no job can be queued now."""
        job = None if client_id is None else self._store.find(owner, client_id)
        if job is None:
            self._check_room()
            return None
        kept = job.request
        seed = kept.seed if request.seed == -1 else request.seed
        as_kept = replace(request, seed=seed, image_path=kept.image_path, last_frame_path=kept.last_frame_path)
        if job.config != config or as_kept != kept or not self._files.same_images(request, kept):
            raise BadRequest("This client_id was already used for another job. Choose a new one, or leave it out.")
        return self._complete(job)

    def _queue(self) -> dict[str, tuple[int, float | None]]:
        """For each queued job its position, and the predicted seconds until it starts, if known."""
        queue: dict[str, tuple[int, float | None]] = {}
        ahead = self._remaining()
        for position, id in enumerate(self._store.queued(), 1):
            queue[id] = (position, ahead)
            if ahead is not None and self._predict is not None:
                job = self._store.job(id)
                seconds = self._predict(job.config, job.request)
                ahead = None if seconds is None else ahead + seconds
        return queue

    def _remaining(self) -> float | None:
        """The predicted seconds until the running job ends."""
        if self._predict is None:
            return None
        if self._worker.running is None:
            return 0.0
        progress = self._worker.running.progress
        if progress is not None and progress.eta is not None and progress.stage in ("denoise", "decode", "write"):
            return progress.eta
        job = self._store.job(self._worker.running.id)
        whole = self._predict(job.config, job.request)
        return None if whole is None else max(0.0, whole - (self._clock() - (job.started or 0.0)))

    def _complete(self, job: Job, queue: dict[str, tuple[int, float | None]] | None = None) -> Job:
        """Add what the store does not hold: place in the queue, progress, the video's path."""
        if job.state == "queued":
            position, starts_in = (self._queue() if queue is None else queue)[job.id]
            return replace(job, position=position, starts_in=starts_in)
        if job.state == "succeeded":
            return replace(job, path=self._files.video(job.id))
        running = self._worker.running
        if running is None or running.id != job.id:
            return job
        return replace(job, cancelling=running.cancel_requested, progress=running.progress, preview=running.preview)


def _label(name: str, text: str) -> str:
    """Check that a text is short and safe to store and to log."""
    if not isinstance(text, str) or len(text) > 200 or not (text.isprintable() and text.isascii() or not text):
        raise BadRequest(f"{name} must be at most 200 printable ASCII characters.")
    return text
