"""Waiting on simulated days of traffic, against first come, first served: python -m benchmarks.scheduling

A day is a list of arrivals: jobs of several models, short and long, at even or at crowded times. The workers of the
simulation load and run as predicted, or off by a factor that the scheduler does not know. Nothing is measured here: the
same seed gives the same table on every machine.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from statistics import fmean

from lightx2v.jobs.scheduling import MOST_OVERTAKEN, Costs, Lines, Seat, Waiting, assign

DAY = 24 * 3600.0
LOAD = {"base": 90.0, "distilled": 90.0, "image": 90.0, "fp8": 50.0}
"""Seconds to load each model: 28 GB in bf16 and 14 in FP8 from a fast disk, with the text encoder."""
RUN = {"base": 300.0, "distilled": 25.0, "image": 30.0, "fp8": 18.0}
"""Seconds of a usual run."""
MIX = {"base": 1, "distilled": 5, "image": 3, "fp8": 2}
"""How often each model is asked for."""


@dataclass(frozen=True, slots=True)
class Arrival:
    """A job of a simulated day. Its run takes `seconds`, and is predicted to take `predicted`."""

    at: float
    job: Waiting
    seconds: float
    predicted: float


@dataclass(frozen=True, slots=True)
class Waited:
    """What a day was like: the seconds that each job waited until its run began, and how many models were loaded."""

    seconds: list[float]
    started: list[str]
    loads: int
    overtaken: int


LOOK = 5.0
"""Seconds between two looks of idle workers at jobs that they left to others."""

Choose = Callable[[Lines, Sequence[Seat], Costs], dict[str, Waiting]]
"""The job for each idle worker, as scheduling.assign."""


def in_turn(lines: Lines, seats: Sequence[Seat], costs: Costs) -> dict[str, Waiting]:
    """First come, first served: every idle worker takes the oldest job that fits it, whatever it has loaded."""
    found: dict[str, Waiting] = {}
    taken: dict[object, int] = {}
    for seat in seats:
        job = next((job for job in lines.heads(taken) if seat.idle and costs.fits(job.model, seat)), None)
        if job is not None:
            found[seat.name] = job
            taken[job.model] = taken.get(job.model, 0) + 1
    return found


def simulate(
    day: Sequence[Arrival], workers: int, choose: Choose = assign, fits: Callable[[object, str], bool] | None = None
) -> Waited:
    """Run a day's jobs, sorted by arrival, on so many workers. `fits(model, worker)` says what a worker can hold."""
    jobs = {arrival.job.id: arrival for arrival in day}
    costs = Costs(
        load=lambda job, _: LOAD[str(job.model)],
        run=lambda job, _: jobs[job.id].predicted,
        fits=lambda model, seat: fits is None or fits(model, seat.name),
    )
    seats = {f"gpu-{n}": Seat(f"gpu-{n}") for n in range(workers)}
    ends, expected = dict.fromkeys(seats, 0.0), dict.fromkeys(seats, 0.0)
    queue: list[Waiting] = []
    coming, now = list(reversed(day)), 0.0
    seconds: list[float] = []
    order: list[str] = []
    loads = most = 0

    def seen(seat: Seat) -> Seat:
        busy = ends[seat.name] > now
        return replace(seat, free_in=max(abs(expected[seat.name] - now), 1e-3) if busy else 0.0)

    while coming or queue:
        times = [at for at in ends.values() if at > now] + [arrival.at for arrival in coming[-1:]]
        if not times:
            raise ValueError(f"{len(queue)} jobs fit no worker")
        looks = [now + LOOK] if queue and any(at <= now for at in ends.values()) else []
        now = min(times + looks)
        while coming and coming[-1].at <= now:
            queue.append(coming.pop().job)
        while given := choose(Lines(queue), [seen(seat) for seat in seats.values()], costs):
            name, job = next(iter(given.items()))  # one after the other, as real workers ask
            overtaken = set(Lines(queue).take(job, seats[name], costs))
            queue = [replace(w, overtaken=w.overtaken + (w.id in overtaken)) for w in queue if w.id != job.id]
            load = costs.start(job, seats[name])
            loads, most = loads + (load > 0), max(most, job.overtaken)
            seconds.append(now + load - jobs[job.id].at)
            order.append(job.id)
            ends[name], expected[name] = now + load + jobs[job.id].seconds, now + costs.end(job, seats[name])
            seats[name] = replace(seats[name], model=job.model, since=now)
    return Waited(seconds, order, loads, most)


def arrivals(
    times: Sequence[float], dice: random.Random, *, models: Sequence[str] = (), error: float = 1.0
) -> list[Arrival]:
    """Jobs at these times, of the given models or of a mix. Their seconds vary as sizes and lengths do."""
    names = models or dice.choices(list(MIX), list(MIX.values()), k=len(times))
    found = []
    for number, (at, model) in enumerate(zip(sorted(times), names, strict=True)):
        seconds = RUN[model] * dice.choice((0.4, 1.0, 1.0, 2.5))
        guess = seconds * dice.uniform(1 / error, error)
        found.append(Arrival(at, Waiting(f"{number}", model), seconds, guess))
    return found


def even(dice: random.Random, jobs: int) -> list[float]:
    return [dice.random() * DAY for _ in range(jobs)]


def bursts(dice: random.Random, jobs: int) -> list[float]:
    """Half of the jobs come evenly, half in groups of 20 within a minute."""
    starts = [dice.random() * DAY for _ in range(jobs // 40)]
    return [*even(dice, jobs // 2), *(start + 60 * dice.random() for start in starts for _ in range(20))]


def evening(dice: random.Random, jobs: int) -> list[float]:
    """Two thirds of the jobs come within four hours."""
    rush = [DAY * 0.75 + 4 * 3600 * dice.betavariate(2, 2) for _ in range(2 * jobs // 3)]
    return [*even(dice, jobs // 3), *rush]


def days(seed: int) -> Iterator[tuple[str, int, list[Arrival]]]:
    """(what the day is like, workers, arrivals)."""
    dice = random.Random(seed)
    yield "one model, even", 4, arrivals(times := even(dice, 6000), dice, models=["distilled"] * len(times))
    yield "four models, even", 4, arrivals(even(dice, 3600), dice)
    yield "four models, bursts", 4, arrivals(bursts(dice, 2400), dice)
    yield "four models, evening rush", 4, arrivals(evening(dice, 2000), dice)
    yield "the rush with predictions off by up to 3 times", 4, arrivals(evening(dice, 2000), dice, error=3.0)
    yield "four models, two workers, bursts", 2, arrivals(bursts(dice, 1000), dice)
    yield "four models, sixteen workers, rush", 16, arrivals(evening(dice, 9000), dice)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--most", type=int, default=MOST_OVERTAKEN, help="how often a job may be overtaken")
    options = parser.parse_args()
    print("| day | workers | jobs | | mean wait | worst wait | loads | overtaken at most |")
    print("|---|---|---|---|---|---|---|---|")
    for name, workers, day in days(options.seed):
        policies: dict[str, Choose] = {
            "in turn": in_turn,
            "scheduled": lambda lines, seats, costs: assign(lines, seats, costs, options.most),
        }
        for policy, choose in policies.items():
            waited = simulate(day, workers, choose)
            mean, worst = fmean(waited.seconds), max(waited.seconds)
            cells = f"{mean:,.0f} s | {worst:,.0f} s | {waited.loads:,} | {waited.overtaken}"
            print(f"| {name} | {workers} | {len(day):,} | {policy} | {cells} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
