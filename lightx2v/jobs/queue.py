"""JobManager: the job queue. Jobs survive closed pages, finished requests and restarts; each worker runs one at a time.

    manager = JobManager(open_engine, Path("outputs"))
    job = manager.submit(config, request, owner="alice")
    manager.wait(job.id).path

With `open_engine` one worker runs the jobs in this process: it keeps the engine while the jobs' EngineConfig stays
equal and closes it before it opens another, so that there are never two models in memory. More workers, on other GPUs
or machines, come with `add_replica`. An error in a job ends only that job, with a message for the user in `Job.error`
and the traceback in the log, and the next job runs. A cancelled job never becomes succeeded.

Everything is in one folder: jobs.sqlite, and for each job the files named after its id (`<id>.mp4`, input images).
After a restart, or after the end of a worker, the job that was running goes on at its last saved step; after two in a
row it is `interrupted`.
"""

from __future__ import annotations

import logging
import secrets
import sqlite3
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Self

from ..config.engine_config import EngineConfig
from ..config.request import Request, draw_seed
from ..errors import BadRequest, ConfigError, LightX2VError
from ..progress import CancelToken, OnProgress
from ..step_file import SAVE_EVERY
from .dispatcher import Predict
from .engine_slot import Engine, EngineSlot, OpenEngine
from .pool import WorkerPool
from .queries import JobQueries, label
from .recovery import recover_jobs, remove_useless_steps
from .replica import OnFinished, Replica
from .state import QueueState
from .store import Job

log = logging.getLogger("lightx2v.jobs")

FOLDER_SECONDS = 0.5
"""Seconds between two looks whether the folder is still there."""
STOP_SECONDS = 30.0
"""Seconds that a replica has to stop when it is removed."""
TAKEN = "The output folder was removed, and another program uses it now. Stop that one, then start this one again."


class JobManager(JobQueries):
    """Submit, watch and cancel jobs. Call any method from any thread; `wait`, `load` and `remove_replica` block.

    Without `open_engine` all replicas come with `add_replica`. `max_queue` jobs may wait besides the running ones.
    `ttl` (seconds) and `size_cap` (bytes) limit what finished jobs leave in the folder: the oldest go first; queued and
    running jobs and the newest result always stay. `predict` estimates the seconds that a job takes, for
    `Job.starts_in`. `on_finished` is called after every run. A run saves its step at most once in `save_every` seconds.
    With `start=False` no job runs before `start()`.
    """

    def __init__(
        self,
        open_engine: OpenEngine | None,
        folder: str | Path,
        *,
        max_queue: int = 10,
        ttl: float | None = None,
        size_cap: int | None = None,
        predict: Predict | None = None,
        on_finished: OnFinished | None = None,
        clock: Callable[[], float] = time.time,
        save_every: float = SAVE_EVERY,
        start: bool = True,
    ) -> None:
        state = QueueState(folder=Path(folder).absolute(), clock=clock, save_every=save_every)
        pool = WorkerPool(state, predict=predict, on_finished=on_finished, purge=self.purge)
        super().__init__(state, pool, max_queue)
        self._ttl, self._size_cap, self._clock = ttl, size_cap, clock
        self._files, self._store = state.files, state.store
        self._closing = threading.Event()
        self._slot = None if open_engine is None else EngineSlot(open_engine)
        if self._slot is not None:
            pool.add(self._slot)
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
        """Load an engine in this process before `start`, in this thread; its errors pass to the caller. The first job
        then uses it."""
        assert self._slot is not None, "this queue has no engine of its own"
        return self._slot.load(config, preset=preset, on_progress=on_progress, cancel=cancel)

    def start(self) -> None:
        """Let the jobs run."""
        with self._changed:
            self._pool.start()

    # ---- workers ------------------------------------------------------------------------------------------------

    def add_replica(self, replica: Replica) -> None:
        """Let jobs run there too, from now on. ConfigError if there is a live replica of that name."""
        self._pool.add(replica)

    def remove_replica(self, name: str, timeout: float = STOP_SECONDS) -> bool:
        """Suspend the job of this replica, which another one takes, and close the replica, also if it does not stop in
        `timeout` seconds. False if there is none of that name."""
        return self._pool.remove(name, timeout)

    def drain(self, name: str, on: bool = True) -> bool:
        """Put a replica out of service: it takes no job, and the one that it runs goes on elsewhere. Or put it back,
        with `on` False. False if there is none of that name."""
        return self._pool.drain(name, on)

    @property
    def is_farm(self) -> bool:
        """Whether jobs run on several workers, or elsewhere than in this process."""
        return self._slot is None or len(self._pool.workers) > 1

    @property
    def more_may_come(self) -> bool:
        """Whether other replicas may come: then a job that none can run now waits for them, and an empty queue of
        workers is no failure."""
        return self._pool.more_may_come

    @more_may_come.setter
    def more_may_come(self, value: bool) -> None:
        with self._changed:
            self._pool.more_may_come = value
            self._changed.notify_all()

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
        owner, preset = label("owner", owner), label("preset", preset)
        client_id = None if client_id is None else label("client_id", client_id)
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
            state = self._state.job(id).state
            if state == "queued":
                store.finish(id, "cancelled", self._clock())
                self._files.steps(id).remove()
            elif (running := self._pool.running_job(id)) is not None:
                store.request_cancel(id)
                running.cancel_requested = True
                running.cancel.cancel()
            self._changed.notify_all()
            return self.get(id)

    def requeue(self, id: str) -> Job:
        """Run a job again that failed, was cancelled or interrupted. A queued or running one stays unchanged."""
        with self._session() as store:
            job = self._state.job(id)
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
        preset = job.preset if preset is None else label("preset", preset)
        config.check_request(request)
        own = self._files.with_own_images(id, request)
        with self._session() as store:
            self._queued(id, "changed")
            if (config, own) != (job.config, job.request):
                self._files.steps(id).remove()  # that of a run before a restart
            store.change(id, config=config, request=own, preset=preset)
            self._pool.dispatcher.forget()
            self._changed.notify_all()
            return self.get(id)

    def delete(self, id: str) -> None:
        """Remove a job and its files. Cancel a running one first."""
        with self._session():
            if self._state.job(id).state == "running":
                raise BadRequest("This job is running. Cancel it first, and delete it once it has stopped.")
            self._state.remove(id)
            self._changed.notify_all()

    def purge(self) -> list[str]:
        """Delete finished jobs beyond `ttl` and `size_cap`, oldest first; return their ids. The workers call this."""
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
                self._state.remove(id)
            self._changed.notify_all()
        return expired

    def interrupt(self) -> None:
        """Begin to close: running jobs stop within a block, and no other job is accepted or started."""
        with self._changed:
            self._pool.interrupt()

    def close(self, timeout: float = 5.0) -> bool:
        """Suspend the running jobs, which go on at the next start. False if a replica does not stop."""
        self._closing.set()
        stopped = self._pool.stop(timeout)
        with self._changed:
            self._state.closed = True
            self._pool.abandon()
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
            with self._changed:
                if self._state.closed or self._store.in_place:
                    continue
                try:
                    self._store.put_back()
                    log.warning("The list of jobs was removed while this program used it. It is back.")
                except ConfigError:
                    self._pool.broken = TAKEN
                    self._changed.notify_all()
                    log.critical(TAKEN)
                    return
                except (OSError, sqlite3.Error, LightX2VError) as error:  # a full disk: try again
                    if told != (told := str(error)):
                        log.error("the list of jobs was removed and cannot be written again yet: %s", error)

    def _queued(self, id: str, verb: str) -> Job:
        job = self._state.job(id)
        if job.state != "queued":
            raise BadRequest(f"This job is {job.state}; only a queued job can be {verb}.")
        return job

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
