"""Which job an idle worker takes: its own model first, nobody overtaken without end, a wait where that is shorter."""

from __future__ import annotations

import random
from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace
from itertools import pairwise
from statistics import fmean

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.scheduling import LOAD, Arrival, arrivals, bursts, evening, in_turn, simulate
from lightx2v.jobs.scheduling import MOST_OVERTAKEN, Costs, Lines, Seat, Waiting, assign, plan


def costs(load: float = 60.0, run: float = 30.0, unfit: Sequence[tuple[Hashable, str]] = ()) -> Costs:
    return Costs(
        load=lambda job, seat: load, run=lambda job, seat: run, fits=lambda model, seat: (model, seat.name) not in unfit
    )


def queue(*models: str, **overtaken: int) -> list[Waiting]:
    """Jobs "0", "1" … of these models."""
    return [Waiting(str(n), model, overtaken.get(f"job{n}", 0)) for n, model in enumerate(models)]


def chosen(jobs: Sequence[Waiting], *seats: Seat, **options: object) -> dict[str, str]:
    found = assign(Lines(jobs), seats, costs(**options))  # type: ignore[arg-type]
    return {name: job.id for name, job in found.items()}


def test_a_worker_takes_the_oldest_job_of_its_model_else_the_oldest() -> None:
    jobs = queue("a", "b", "b", "a")
    assert chosen(jobs, Seat("x", "b")) == {"x": "1"}
    assert chosen(jobs, Seat("x", "c")) == chosen(jobs, Seat("x")) == {"x": "0"}
    assert chosen(jobs, Seat("x", "b"), Seat("y", "b"), Seat("z", "a")) == {"x": "1", "y": "2", "z": "0"}
    assert chosen([], Seat("x")) == chosen(jobs) == {}


def test_a_job_that_was_overtaken_often_enough_comes_first_everywhere() -> None:
    jobs = queue("a", "b", "b", job0=MOST_OVERTAKEN)
    assert chosen(jobs, Seat("x", "b")) == {"x": "0"}
    assert chosen(jobs, Seat("x", "b"), Seat("y", "a")) == {"x": "1", "y": "0"}, "where it ends first"
    assert chosen(queue("a", "b", job0=MOST_OVERTAKEN - 1), Seat("x", "b")) == {"x": "1"}


def test_a_job_waits_for_a_busy_worker_with_its_model_where_that_ends_it_sooner() -> None:
    one, idle = queue("a"), Seat("idle")
    assert chosen(one, Seat("warm", "a", free_in=59), idle, load=60) == {}
    assert chosen(one, Seat("warm", "a", free_in=61), idle, load=60) == {"idle": "0"}
    assert chosen(one, Seat("other", "b", free_in=1), idle, load=60) == {"idle": "0"}, "that one would load, too"
    # Each job that is left to the warm worker makes the next one wait longer: 10, 40, 70 seconds.
    assert chosen(queue("a", "a", "a"), Seat("warm", "a", free_in=10), idle, load=60, run=30) == {"idle": "2"}


def test_what_a_worker_cannot_hold_goes_to_others_and_is_overtaken_without_counting() -> None:
    unfit = [("big", "small")]
    jobs = queue("big", "little")
    assert chosen(jobs, Seat("small"), unfit=unfit) == {"small": "1"}
    assert chosen(jobs, Seat("small"), Seat("large"), unfit=unfit) == {"large": "0", "small": "1"}
    lines = Lines(jobs)
    assert lines.take(jobs[1], Seat("small"), costs(unfit=unfit)) == []
    assert Lines(jobs).take(jobs[1], Seat("large"), costs(unfit=unfit)) == ["0"]
    stuck = queue("big", job0=MOST_OVERTAKEN)
    assert chosen(stuck, Seat("small", "big"), unfit=unfit) == {}


def test_a_new_model_goes_where_the_loss_is_least() -> None:
    job = queue("new")
    assert chosen(job, Seat("x", "a"), Seat("empty")) == {"empty": "0"}
    assert chosen(job, Seat("x", "a"), Seat("y", "b"), Seat("z", "b", since=9)) == {"y": "0"}, "b is loaded twice"
    assert chosen(job, Seat("x", "a", since=2), Seat("y", "b", since=1)) == {"y": "0"}, "longest without work"


def test_the_plan_says_when_each_job_starts() -> None:
    jobs = queue("a", "b", "a")
    starts = {job.id: start for job, start in plan(Lines(jobs), [Seat("x", "a", free_in=10)], costs(load=60, run=30))}
    assert starts == {"0": 10, "2": 40, "1": 70}
    starts = {job.id: start for job, start in plan(Lines(jobs), [Seat("x", "a", free_in=10)], costs(), most=0)}
    assert starts == {"0": 10, "1": 40, "2": 130}, "in their order, after b was loaded for the second"
    two = [Seat("x", "a"), Seat("y", "b", free_in=5)]
    assert {job.id: start for job, start in plan(Lines(jobs), two, costs())} == {"0": 0, "1": 5, "2": 30}
    assert list(plan(Lines(jobs), [], costs())) == []
    # The second one does not wait for the first, which waits for the worker that has their model.
    warm = [Seat("warm", "a", free_in=10), Seat("idle")]
    order = [(job.id, start) for job, start in plan(Lines(queue("a", "a", "a")), warm, costs(load=35, run=30))]
    assert order == [("1", 0), ("0", 10), ("2", 40)]
    assert [job.id for job, _ in plan(Lines(jobs), [Seat("x")], costs(unfit=[("b", "x")]))] == ["0", "2"]


MODELS = list(LOAD)
DAYS = st.lists(
    st.tuples(st.floats(0, 4000), st.sampled_from(MODELS), st.floats(1, 300), st.floats(0.2, 5)),
    min_size=1,
    max_size=40,
)


@settings(deadline=None)
@given(DAYS, st.integers(1, 5), st.sets(st.tuples(st.sampled_from(MODELS), st.sampled_from(["gpu-0", "gpu-1"]))))
def test_every_job_runs_once_and_none_is_overtaken_more_often_than_that(
    jobs: list[tuple[float, str, float, float]], workers: int, unfit: set[tuple[str, str]]
) -> None:
    day = [
        Arrival(at, Waiting(str(n), model), seconds, seconds * error)
        for n, (at, model, seconds, error) in enumerate(sorted(jobs))
    ]
    names = [f"gpu-{n}" for n in range(workers)]
    day = [it for it in day if any((it.job.model, name) not in unfit for name in names)]
    waited = simulate(day, workers, fits=lambda model, name: (model, name) not in unfit)
    assert sorted(waited.started) == sorted(it.job.id for it in day)
    assert waited.overtaken <= MOST_OVERTAKEN + workers - 1
    if workers == 1 and len({it.job.model for it in day}) <= 1:
        assert waited.overtaken == 0


@settings(deadline=None)
@given(st.lists(st.tuples(st.floats(0, 4000), st.floats(1, 300)), min_size=1, max_size=40), st.integers(1, 5))
def test_runs_of_one_model_begin_in_order_where_predictions_are_right(
    jobs: list[tuple[float, float]], workers: int
) -> None:
    """A cold worker may take a later job while an earlier one is left to a warm worker, which begins it no later."""
    day = [Arrival(at, Waiting(str(n), "base"), seconds, seconds) for n, (at, seconds) in enumerate(sorted(jobs))]
    waited = simulate(day, workers)
    begins = {id: day[int(id)].at + wait for id, wait in zip(waited.started, waited.seconds, strict=True)}
    ordered = [begins[it.job.id] for it in day]
    assert all(later >= earlier - 1e-6 for earlier, later in pairwise(ordered))


@pytest.mark.parametrize("traffic", [bursts, evening])
def test_on_days_of_mixed_traffic_jobs_wait_less_than_in_turn_in_the_mean_and_at_worst(
    traffic: Callable[[random.Random, int], list[float]],
) -> None:
    dice = random.Random(1)
    day = arrivals(traffic(dice, 400), dice, error=2.0)
    day = [replace(it, at=it.at / 4) for it in day]
    ours, theirs = simulate(day, 3), simulate(day, 3, in_turn)
    assert fmean(ours.seconds) < 0.8 * fmean(theirs.seconds)
    assert max(ours.seconds) < max(theirs.seconds) and ours.loads < theirs.loads / 2
