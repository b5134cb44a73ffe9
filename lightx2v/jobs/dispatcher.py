"""Dispatcher: what scheduling.py needs to know of the queue and its workers, and what follows from it for the jobs.

Seconds come from the prediction. Where nothing was measured yet they are assumed, for the decision only.
"""

import time
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import Protocol

from ..config.engine_config import EngineConfig
from ..config.request import Request
from .scheduling import MOST_OVERTAKEN, Costs, Lines, Seat, Waiting, assign, plan
from .state import QueueState
from .store import Job
from .worker import JobWorker

ASSUMED_LOAD, ASSUMED_RUN = 30.0, 60.0
PLANNED = 200
"""The jobs whose start is planned one by one. Those behind them start after an even share of the work before."""
SHORT, FRESH_SECONDS, OLD_SECONDS = 20, 0.25, 1.0
"""The plan of more jobs than SHORT is made again after FRESH_SECONDS at the earliest, any plan after OLD_SECONDS."""
KEPT_SECONDS = 5.0
"""Predictions are made again after this time: every run corrects the next ones."""
LATE = 3.0
LEAST_LEFT = 1e-3
"""Seconds that a busy worker still needs at least."""


class Predict(Protocol):
    """The seconds that a run takes on a device, with loading unless the model is `loaded`; None if not known."""

    def __call__(self, config: EngineConfig, request: Request, /, *, device: str, loaded: bool) -> float | None: ...


@dataclass(frozen=True, slots=True)
class Schedule:
    """The seconds until each queued job starts, as far as they are `known`, and until the `last` one does with assumed
    seconds for the others; infinite if one cannot start."""

    known: dict[str, float]
    last: float


class Dispatcher:
    """Use it under the lock of `state`. `workers` is the table of the pool, by name."""

    def __init__(self, state: QueueState, workers: Mapping[str, JobWorker], predict: Predict | None) -> None:
        self._state, self._workers, self._predict = state, workers, predict
        self._jobs: dict[str, tuple[Job, int]] = {}
        self._models: dict[EngineConfig, int] = {}
        self._overtaken: dict[str, int] = {}
        self._runs: dict[tuple[str, str], float | None] = {}
        self._loads: dict[tuple[Hashable, str], float] = {}
        self._predicted_until = 0.0
        self._schedule, self._made_at = Schedule({}, 0.0), 0.0
        self._made_for: object = None

    def choose(self, worker: JobWorker) -> Job | None:
        """The job that an idle worker is to run now; None to wait. Those that it overtakes remember it."""
        if not (ids := self._state.store.queued()):
            return None
        lines, seats, costs = Lines(self._waiting(ids)), self._seats(), self._costs()
        job = assign(lines, seats, costs, self._most).get(worker.replica.name)
        if job is None:
            return None
        seat = next(seat for seat in seats if seat.name == worker.replica.name)
        for id in lines.take(job, seat, costs):
            self._overtaken[id] = self._overtaken.get(id, 0) + 1
        self._overtaken.pop(job.id, None)
        return self._jobs[job.id][0]

    def forget(self) -> None:
        """A queued job was changed."""
        self._jobs.clear()
        self._made_at = self._predicted_until = 0.0

    def unfit(self) -> list[tuple[Job, dict[str, str]]]:
        """The queued jobs whose model no worker can hold, with the reason of each."""
        found: list[tuple[Job, dict[str, str]]] = []
        reasons: dict[int, dict[str, str]] = {}
        for waiting in self._waiting(self._state.store.queued()):
            job, model = self._jobs[waiting.id]
            if model not in reasons:
                reasons[model] = {name: w.replica.refusal(job.config) for name, w in self._workers.items()}
            if reasons[model] and all(reasons[model].values()):
                found.append((job, reasons[model]))
        return found

    def starts(self) -> Mapping[str, float]:
        """The predicted seconds until each queued job starts, of those for which they are known."""
        return {} if self._predict is None else self._planned().known

    def backlog(self) -> float:
        """The predicted seconds until the last queued job starts on the workers that there are; infinite if one cannot
        start, 0.0 without queued jobs."""
        return self._planned().last

    def _planned(self) -> Schedule:
        ids, now = self._state.store.queued(), time.monotonic()
        made_for = ids, [(name, worker.paused, worker.running) for name, worker in self._workers.items()]
        age = now - self._made_at
        if age > OLD_SECONDS or made_for != self._made_for and (len(ids) <= SHORT or age > FRESH_SECONDS):
            self._schedule, self._made_for, self._made_at = self._plan(ids), made_for, now
        return self._schedule

    def _plan(self, ids: list[str]) -> Schedule:
        waiting, seats, costs = self._waiting(ids), self._seats(), self._costs()
        is_known = all(self._left(worker) is not None for worker in self._workers.values())
        known: dict[str, float] = {}
        last, left = 0.0, min(len(ids), PLANNED)
        for job, start in plan(Lines(waiting[:PLANNED]), seats, costs, self._most):
            last, left = max(last, start), left - 1
            if is_known:
                known[job.id] = start
            is_known = is_known and self._run_seconds(job, seats[0].device) is not None
        for job in waiting[PLANNED:] if seats else ():
            last += costs.run(job, seats[0]) / len(seats)
            if is_known:
                known[job.id] = last
        return Schedule(known, float("inf") if left else last)

    @property
    def _most(self) -> int:
        """One worker runs the jobs in their order: nobody waits longer so that it loads less often."""
        return MOST_OVERTAKEN if len(self._workers) > 1 else 0

    def _waiting(self, ids: list[str]) -> list[Waiting]:
        """These jobs for scheduling.py, with a number for each model, because comparing configurations is slow."""
        if len(self._jobs) > 2 * len(ids) + 100:  # most have started
            self._overtaken = {id: self._overtaken[id] for id in ids if id in self._overtaken}
            self._jobs, self._models = {}, {}
        for id in ids:
            if id not in self._jobs:
                job = self._state.store.job(id)
                self._jobs[id] = job, self._number(job.config)
        return [Waiting(id, self._jobs[id][1], self._overtaken.get(id, 0)) for id in ids]

    def _number(self, config: EngineConfig) -> int:
        return self._models.setdefault(config, len(self._models))

    def _seats(self) -> list[Seat]:
        workers = (worker for worker in self._workers.values() if not (worker.paused or worker.leaving))
        return [self._seat(worker) for worker in workers if worker.replica.alive]

    def _seat(self, worker: JobWorker) -> Seat:
        replica, running = worker.replica, worker.running
        config, left = replica.loaded.config if replica.loaded is not None else None, 0.0
        if running is not None:
            config, left = running.job.config, self._left(worker)
        model = None if config is None else self._number(config)
        return Seat(replica.name, model, ASSUMED_RUN if left is None else left, worker.last_run, replica.device)

    def _left(self, worker: JobWorker) -> float | None:
        """The predicted seconds until a worker is idle. One that is late is expected to need LATE times as long again,
        so that no job waits for a worker that hangs."""
        if (running := worker.running) is None:
            return 0.0
        job, progress, now = running.job, running.progress, self._state.clock()
        stage, eta = (progress.stage, progress.eta) if progress is not None else ("", None)
        if eta is not None and stage in ("denoise", "decode", "write"):
            end = running.heard + eta
        else:
            whole = self._predicted(job, worker.replica.device, loaded=running.loaded)
            if whole is None:
                return None
            end = (running.heard + (eta or 0.0) if stage == "download" else job.started or 0.0) + whole
        return max(end - now, LATE * (now - end), LEAST_LEFT)

    def _costs(self) -> Costs:
        fits: dict[tuple[Hashable, str], bool] = {}

        def fit(model: Hashable, seat: Seat) -> bool:
            if (known := fits.get((model, seat.name))) is None:
                config = next(config for config, number in self._models.items() if number == model)
                known = fits[model, seat.name] = not self._workers[seat.name].replica.refusal(config)
            return known

        return Costs(load=self._load, run=self._run, fits=fit)

    def _load(self, waiting: Waiting, seat: Seat) -> float:
        key = waiting.model, seat.device
        if key not in self._loads:
            job, whole = self._jobs[waiting.id][0], self._run_seconds(waiting, seat.device)
            with_load = self._predicted(job, seat.device, loaded=False)
            self._loads[key] = 0.0
            if whole is not None and with_load is not None:
                self._loads[key] = max(0.0, with_load - whole)
        return self._loads[key] or ASSUMED_LOAD

    def _run(self, waiting: Waiting, seat: Seat) -> float:
        seconds = self._run_seconds(waiting, seat.device)
        return ASSUMED_RUN if seconds is None else seconds

    def _run_seconds(self, waiting: Waiting, device: str) -> float | None:
        if time.monotonic() > self._predicted_until:
            self._runs, self._loads, self._predicted_until = {}, {}, time.monotonic() + KEPT_SECONDS
        key = waiting.id, device
        if key not in self._runs:
            self._runs[key] = self._predicted(self._jobs[waiting.id][0], device, loaded=True)
        return self._runs[key]

    def _predicted(self, job: Job, device: str, *, loaded: bool) -> float | None:
        return None if self._predict is None else self._predict(job.config, job.request, device=device, loaded=loaded)
