"""JobQueries: what the job manager knows of its jobs, its workers and their progress."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace

from ..errors import BadRequest, Busy
from .pool import WorkerPool, WorkerState, state_of
from .replica import LoadedModel
from .state import QueueState
from .store import STATES, Job, JobEvent, State, UnknownJob

ALL = 10_000
"""More jobs than that are in no list."""
RATE_SECONDS = 600.0


class JobQueries:
    """The reading half of JobManager. `max_queue` jobs may wait besides the running ones."""

    def __init__(self, state: QueueState, pool: WorkerPool, max_queue: int) -> None:
        self.folder, self.max_queue = state.folder, max_queue
        self._state, self._pool = state, pool
        self._session, self._changed = state.session, state.changed

    @property
    def alive(self) -> bool:
        """False once no worker is left: a health check should show this, because only a restart helps."""
        return self._pool.alive

    @property
    def loaded(self) -> LoadedModel | None:
        """The model in memory; with several workers that of the first one that has any."""
        with self._changed:
            workers = sorted(self._pool.workers.items())
        return next((model for _, worker in workers if (model := worker.replica.loaded) is not None), None)

    def places(self) -> list[tuple[str, LoadedModel | None]]:
        """The device and the loaded model of each worker. Quick, unlike `workers`, which reads the machine's memory."""
        with self._changed:
            replicas = [worker.replica for _, worker in sorted(self._pool.workers.items())]
        return [(replica.device, replica.loaded) for replica in replicas]

    def workers(self) -> list[WorkerState]:
        """The workers by name: what each has loaded, does and uses."""
        with self._changed:
            workers = sorted(self._pool.workers.items())
        return [state_of(name, worker) for name, worker in workers]

    @property
    def waiting(self) -> int:
        """The number of queued jobs."""
        with self._session() as store:
            return len(store.queued())

    def backlog(self) -> float:
        """The predicted seconds until the last queued job starts on the workers that there are now; infinite if one of
        the jobs has no worker that could run it, 0.0 without queued jobs."""
        with self._session():
            return self._pool.dispatcher.backlog()

    def per_minute(self) -> float:
        """The jobs that have succeeded in the last RATE_SECONDS, in jobs a minute."""
        with self._session() as store:
            return store.succeeded_since(self._state.clock() - RATE_SECONDS) * 60 / RATE_SECONDS

    def counts(self) -> dict[State, int]:
        with self._session() as store:
            return store.counts()

    def check_room(self, owner: str = "", client_id: str | None = None) -> None:
        """Raise Busy if no job can be queued now, unless the owner has one with this client_id already. `submit` checks
        too; call this before expensive work."""
        with self._session() as store:
            if client_id is None or store.find(label("owner", owner), label("client_id", client_id)) is None:
                self._check_room()

    def get(self, id: str) -> Job:
        """A snapshot of the job; UnknownJob if there is none with this id."""
        with self._session():
            return self._complete(self._state.job(id))

    def find(self, client_id: str, *, owner: str = "") -> Job:
        """The owner's job with this client_id."""
        with self._session() as store:
            job = store.find(label("owner", owner), label("client_id", client_id))
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
        limit = min(max(limit, 0), ALL)
        with self._session() as store:
            places, starts = {id: place for place, id in enumerate(store.queued(), 1)}, self._pool.dispatcher.starts()
            found = store.jobs(owner, states, limit, after=after, oldest_first=oldest_first)
            return [self._complete(job, places, starts) for job in found]

    def events(self, id: str, after: int = 0) -> list[JobEvent]:
        """The job's events with larger ids than `after`, in order. Those of its progress do not survive a restart."""
        with self._session() as store:
            self._state.job(id)
            after = min(max(after, 0), 2**62)
            return sorted(store.events(id, after) + self._state.steps.events(id, after), key=lambda event: event.id)

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
            self._changed.wait_for(lambda: self._pool.closing or self._state.job(id).over, timeout)
            return self.get(id)

    def _check_room(self) -> None:
        if self._pool.problem:
            raise Busy(self._pool.problem)
        waiting = len(self._state.store.queued())
        if waiting >= self.max_queue:
            raise Busy(
                f"The queue is full: {waiting} jobs are waiting, and the limit is {self.max_queue}. Try again later."
            )

    def _complete(
        self, job: Job, places: Mapping[str, int] | None = None, starts: Mapping[str, float] | None = None
    ) -> Job:
        """Add what the store does not hold: place in the queue, progress, the video's path."""
        if job.state == "queued":
            position = self._state.store.queued().index(job.id) + 1 if places is None else places[job.id]
            starts = self._pool.dispatcher.starts() if starts is None else starts
            note = self._pool.unfit.get(job.id, "")
            return replace(job, position=position, starts_in=starts.get(job.id), note=note)
        if job.state == "succeeded":
            return replace(job, path=self._state.files.video(job.id))
        if (running := self._pool.running_job(job.id)) is None:
            return job
        return replace(job, cancelling=running.cancel_requested, progress=running.progress, preview=running.preview)


def label(name: str, text: str) -> str:
    """Check that a text is short and safe to store and to log."""
    if not isinstance(text, str) or len(text) > 200 or not (text.isprintable() and text.isascii() or not text):
        raise BadRequest(f"{name} must be at most 200 printable ASCII characters.")
    return text
