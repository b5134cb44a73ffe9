"""WorkerPool: the workers of the queue, one for each replica; they come and go while jobs wait and run."""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

from ..errors import ConfigError, quoted
from .dispatcher import Dispatcher, Predict
from .replica import LoadedModel, OnFinished, Replica, ReplicaStatus
from .state import CLOSING, QueueState
from .store import Job
from .worker import JobWorker, Running

log = logging.getLogger("lightx2v.jobs")

NO_WORKER = "No worker is left. Restart the program."

UNFIT = ConfigError.__name__


Activity = Literal["running", "idle", "drained"]
WORKER_STATES: tuple[Activity, ...] = ("running", "idle", "drained")


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerState:
    """A snapshot of a worker for people. `job` is the one that it runs; a paused worker takes none."""

    name: str
    device: str
    status: ReplicaStatus
    loaded: LoadedModel | None
    paused: bool
    job: Job | None

    @property
    def state(self) -> Activity:
        if self.job is not None:
            return "running"
        return "drained" if self.paused else "idle"


class WorkerPool:
    """Use every member under the lock of `state`, but `add`, `remove`, `drain` and `stop`, which take it.

    `broken` is the reason why no job will run in this process any more. With `more_may_come`, jobs wait for a replica
    where there is none for them; `unfit` says why, by their ids.
    """

    def __init__(
        self,
        state: QueueState,
        *,
        predict: Predict | None = None,
        on_finished: OnFinished | None = None,
        purge: Callable[[], object],
    ) -> None:
        self.purge = purge
        self.workers: dict[str, JobWorker] = {}
        self._members: list[JobWorker] = []
        """Those whose thread has not ended: also a dead one, whose name another has taken meanwhile."""
        self.closing = self.more_may_come = False
        self.broken = ""
        self._started = False
        self.unfit: dict[str, str] = {}
        self._drained: set[str] = set()
        self._state, self._on_finished = state, on_finished
        self.dispatcher = Dispatcher(state, self.workers, predict)

    # ---- workers ------------------------------------------------------------------------------------------------

    def add(self, replica: Replica) -> None:
        """Let jobs run on this replica too. ConfigError if there is a live one of that name."""
        with self._state.changed:
            known = self.workers.get(replica.name)
            if known is not None and known.replica.alive and not known.leaving:
                raise ConfigError(f"There is already a worker {quoted(replica.name)}. Remove it first.")
            worker = JobWorker(replica, self._state, self, self._on_finished)
            if self.closing:
                worker.join(0.0)
                return
            worker.paused = replica.name in self._drained
            self.workers[replica.name] = worker
            self._members.append(worker)
            self._state.steps.grow(len(self.workers))
            if self._started:
                worker.start()
            self._state.changed.notify_all()

    def start(self) -> None:
        self._started = True
        for worker in self.workers.values():
            worker.start()

    def remove(self, name: str, timeout: float) -> bool:
        """Suspend the job of this replica, which another one then takes, and close it. A replica that does not stop in
        `timeout` seconds is closed all the same. False if there is none of that name."""
        with self._state.changed:
            if (worker := self.workers.get(name)) is None:
                return False
            worker.interrupt()
        if not worker.join(timeout):
            worker.replica.close()
            if not worker.join(timeout):
                with self._state.changed:
                    worker.abandon()
        with self._state.changed:
            self.left(worker, "")
        return True

    def drain(self, name: str, on: bool) -> bool:
        """Take a replica out of service, or put it back: its job goes on elsewhere, and its model stays loaded. One
        that comes later under the same name is out of service too. False if there is none of that name."""
        with self._state.changed:
            if (worker := self.workers.get(name)) is None:
                return False
            worker.pause(on)
            (self._drained.add if on else self._drained.discard)(name)
            return True

    def left(self, worker: JobWorker, reason: str) -> None:
        """The worker has ended; `reason` is "" where it was asked to."""
        if self.workers.get(worker.replica.name) is worker:
            del self.workers[worker.replica.name]
        if worker in self._members:
            self._members.remove(worker)
        if reason and not self.goes_on_without(worker):
            self.broken = self.broken or reason
            log.critical(self.broken)
        elif reason:
            log.error("%s runs no more jobs: %s", worker.replica.name, reason)
        self._state.changed.notify_all()

    def interrupt(self) -> None:
        """Suspend all running jobs, and start no other."""
        self.closing = True
        for worker in self._members:
            worker.interrupt()
        self._state.changed.notify_all()

    def stop(self, timeout: float) -> bool:
        """Interrupt, and wait for all threads. False if a replica does not stop within `timeout` seconds."""
        with self._state.changed:
            self.interrupt()
            workers = list(self._members)
        deadline = time.monotonic() + timeout
        stopped = [worker.join(deadline - time.monotonic()) for worker in workers]
        return all(stopped)

    def abandon(self) -> None:
        """No worker may use the store any more."""
        for worker in self._members:
            worker.abandoned = True

    @property
    def alive(self) -> bool:
        return self._started and not (self.broken or self.closing or self.problem)

    @property
    def problem(self) -> str:
        """Why no job can be accepted; "" if one can."""
        if self.broken or self.closing:
            return self.broken or CLOSING
        return "" if self.workers or self.more_may_come else NO_WORKER

    def goes_on_without(self, worker: JobWorker) -> bool:
        others = [other for other in self.workers.values() if other is not worker]
        return not (self.broken or self.closing) and bool(others or self.more_may_come)

    # ---- jobs ---------------------------------------------------------------------------------------------------

    @property
    def running(self) -> list[Running]:
        return [worker.running for worker in self._members if worker.running is not None]

    def running_job(self, id: str) -> Running | None:
        return next((running for running in self.running if running.job.id == id), None)

    def next_job(self, worker: JobWorker) -> str | None:
        """The job that an idle worker is to run now; None to wait."""
        self._settle_unfit()
        job = self.dispatcher.choose(worker)
        return None if job is None else job.id

    def _settle_unfit(self) -> None:
        """A job whose model no worker can hold fails, or waits for a machine that may come, and says why."""
        store, now, known = self._state.store, self._state.clock(), self.unfit
        self.unfit, failed = {}, False
        for job, reasons in self.dispatcher.unfit():
            text = "; ".join(f"{name}: {reason.rstrip('.')}" for name, reason in sorted(reasons.items()))
            if not self.more_may_come:
                message = f"No worker can hold the model of this job. {text}. Choose another model, or offload more."
                store.finish(job.id, "failed", now, error={"type": UNFIT, "message": message})
                failed = True
                continue
            note = f"No worker can hold the model of this job, so it waits for another one. {text}."
            self.unfit[job.id] = note
            if note != known.get(job.id):
                store.note(job.id, now, note)
        if failed or self.unfit != known:
            self._state.changed.notify_all()


def state_of(name: str, worker: JobWorker) -> WorkerState:
    """A snapshot. Call it without the lock, because reading the machine's memory may take seconds."""
    replica, running = worker.replica, worker.running
    job = replace(running.job, progress=running.progress) if running is not None else None
    status = replica.status()
    return WorkerState(
        name=name, device=replica.device, status=status, loaded=replica.loaded, paused=worker.paused, job=job
    )
