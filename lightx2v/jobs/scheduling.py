"""Scheduling: which job each idle worker takes now, and when each queued job will start. Pure functions: no clock, no
threads, no store.

A worker takes the oldest job whose model it has loaded, else the oldest. It leaves a job to a busy worker that has the
model where that one would finish it sooner. A job that `most` later ones have overtaken comes first everywhere; of
workers that become idle at the same moment, each may still overtake it once. One that cannot hold a job's model
overtakes it without limit, because the job does not wait for that one.
"""

from collections import deque
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

MOST_OVERTAKEN = 16
"""So many later jobs may start before a job, on workers that could have run it."""


@dataclass(frozen=True, slots=True)
class Waiting:
    """A queued job: its model, and how many later ones have started before it."""

    id: str
    model: Hashable
    overtaken: int = 0


@dataclass(frozen=True, slots=True)
class Seat:
    """A worker that takes jobs: the model that it has loaded or is loading, and the seconds until it is idle, 0 if it
    is. `since` orders idle workers: the one that ran last has the largest. Those on one device are equally fast."""

    name: str
    model: Hashable | None = None
    free_in: float = 0.0
    since: float = 0.0
    device: str = ""

    @property
    def idle(self) -> bool:
        return self.free_in <= 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Costs:
    """What a job costs on a worker: the seconds to load its model and those of its run, and whether the model fits."""

    load: Callable[[Waiting, Seat], float]
    run: Callable[[Waiting, Seat], float]
    fits: Callable[[Hashable, Seat], bool]

    def start(self, job: Waiting, seat: Seat) -> float:
        """The seconds until the job would run there, if it came next."""
        return seat.free_in + (0.0 if seat.model == job.model else self.load(job, seat))

    def end(self, job: Waiting, seat: Seat) -> float:
        return self.start(job, seat) + self.run(job, seat)


class Lines:
    """The queue as one line for each model: whatever a job of a model needs, the oldest one of it needs first."""

    def __init__(self, jobs: Iterable[Waiting]) -> None:
        self._lines: dict[Hashable, deque[tuple[int, Waiting]]] = {}
        for place, job in enumerate(jobs):
            self._lines.setdefault(job.model, deque()).append((place, job))

    def __bool__(self) -> bool:
        return any(self._lines.values())

    def heads(self, taken: dict[Hashable, int]) -> list[Waiting]:
        """The oldest job of each model, in their order, after the first `taken` of each."""
        heads = [line[skip] for model, line in self._lines.items() if (skip := taken.get(model, 0)) < len(line)]
        return [job for _, job in sorted(heads, key=lambda head: head[0])]

    def take(self, job: Waiting, seat: Seat, costs: Costs) -> list[str]:
        """Remove a job, which starts on `seat`. Returns the ids of those that it overtakes."""
        own = self._lines[job.model]
        index = next(index for index, (_, waiting) in enumerate(own) if waiting.id == job.id)
        place, _ = own[index]
        del own[index]
        overtaken: list[str] = []
        for model, line in self._lines.items():
            if not costs.fits(model, seat):
                continue
            for index, (other, waiting) in enumerate(line):
                if other > place:
                    break
                line[index] = (other, replace(waiting, overtaken=waiting.overtaken + 1))
                overtaken.append(waiting.id)
        return overtaken


def assign(lines: Lines, seats: Sequence[Seat], costs: Costs, most: int = MOST_OVERTAKEN) -> dict[str, Waiting]:
    """The job that each idle worker is to start now, by the worker's name. A worker without one waits."""
    table = {seat.name: seat for seat in seats}
    found: dict[str, Waiting] = {}
    taken: dict[Hashable, int] = {}

    def give(job: Waiting, seat: Seat) -> None:
        taken[job.model] = taken.get(job.model, 0) + 1
        if seat.idle:
            found[seat.name] = job
        table[seat.name] = replace(seat, model=job.model, free_in=max(costs.end(job, seat), 1e-9))

    def idle(model: Hashable) -> list[Seat]:
        return [seat for seat in table.values() if seat.idle and costs.fits(model, seat)]

    def best(job: Waiting, seats: Iterable[Seat]) -> Seat | None:
        """Where the job ends first; of equal ones where the loss of the loaded model matters least."""
        models = [seat.model for seat in table.values()]
        loss = lambda seat: (seat.model is not None, models.count(seat.model) < 2, seat.since)  # noqa: E731
        return min(seats, key=lambda seat: (costs.end(job, seat), not seat.idle, *loss(seat)), default=None)

    def turn(job: Waiting) -> Seat | None:
        return best(job, idle(job.model)) if job.overtaken >= most else None

    def warm(job: Waiting) -> Seat | None:
        return best(job, (seat for seat in idle(job.model) if seat.model == job.model))

    def anywhere(job: Waiting) -> Seat | None:
        if not (cold := idle(job.model)):
            return None
        return best(job, [*cold, *(seat for seat in table.values() if not seat.idle and seat.model == job.model)])

    for choose in (turn, warm, anywhere):
        while any(seat.idle for seat in table.values()):
            pairs = ((job, seat) for job in lines.heads(taken) if (seat := choose(job)) is not None)
            if (pair := next(pairs, None)) is None:
                break
            give(*pair)
    return found


def plan(
    lines: Lines, seats: Sequence[Seat], costs: Costs, most: int = MOST_OVERTAKEN
) -> Iterator[tuple[Waiting, float]]:
    """The jobs in the order in which workers will take them, if no other comes, each with the seconds until then. Those
    that fit nowhere are left out. Uses up `lines`."""
    table, now = {seat.name: seat for seat in seats}, 0.0
    while lines:
        for name, job in assign(lines, list(table.values()), costs, most).items():
            seat = table[name]
            lines.take(job, seat, costs)
            yield job, now
            table[name] = replace(seat, model=job.model, free_in=max(costs.end(job, seat), 1e-9), since=now)
        if not (busy := [seat.free_in for seat in table.values() if not seat.idle]):
            return
        step = min(busy)
        now += step
        table = {name: replace(seat, free_in=max(seat.free_in - step, 0.0)) for name, seat in table.items()}
