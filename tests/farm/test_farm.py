"""The farm over a cluster without Ray: workers start, are replaced, and follow the machines; no job is lost."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fake_engine import Garage, Script
from farm_fakes import FakeCluster
from job_runs import CONFIG, OTHER, ask, done, hold
from patience import eventually

from lightx2v.errors import CheckpointError, LightX2VError
from lightx2v.farm import farm as farms
from lightx2v.farm import refusal
from lightx2v.farm.farm import Farm, Preload
from lightx2v.farm.options import MOST, FarmOptions
from lightx2v.farm.places import Node
from lightx2v.jobs.queue import JobManager
from lightx2v.progress import CancelToken

ONE, TWO = Node(id="1", name="alpha", slots=1), Node(id="2", name="beta", slots=1)
Open = Callable[..., tuple[Farm, JobManager]]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(farms, "TICK", 0.01)
    monkeypatch.setattr(farms, "RETRY_SECONDS", 0.01)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(refusal, "refusal_of", lambda config, machine: "")  # there are no models here


@pytest.fixture
def open_farm(open_manager: Callable[..., JobManager], garage: Garage) -> Iterator[Open]:
    made: list[Farm] = []

    def make(cluster: FakeCluster, low: int | None = 2, high: int = 2, **options: Any) -> tuple[Farm, JobManager]:
        manager = open_manager(garage=None, max_queue=100)
        asked = FarmOptions(low=low, high=high, address="somewhere")
        made.append(Farm(manager, asked, garage, cluster=cluster, **options))
        made[-1].start()
        return made[-1], manager

    yield make
    for farm in made:
        farm.close()


def names(manager: JobManager) -> list[str]:
    return sorted(worker.name for worker in manager.workers())


def test_jobs_run_on_every_machine_and_machines_that_come_are_used(open_farm: Open, garage: Garage) -> None:
    cluster = FakeCluster(ONE)
    farm, manager = open_farm(cluster, None, MOST)
    farm.wait_for_first(CancelToken())
    assert names(manager) == ["alpha/cpu-0"]
    cluster.machines.append(TWO)
    eventually(lambda: names(manager) == ["alpha/cpu-0", "beta/cpu-0"])
    jobs = [manager.submit(CONFIG, ask(str(index))) for index in range(6)]
    assert {done(manager, job).state for job in jobs} == {"succeeded"} and len(garage.ran) == 6
    assert not cluster.asked, "more machines are not this program's business"


def test_a_killed_worker_is_replaced_and_its_job_goes_on_at_its_step(open_farm: Open, garage: Garage) -> None:
    cluster = FakeCluster(ONE)
    farm, manager = open_farm(cluster, 1, 1)
    farm.wait_for_first(CancelToken())
    event = hold(garage, "held", saves=b"step 2")
    job = manager.submit(CONFIG, ask("held"))
    eventually(lambda: manager.get(job.id).progress and garage.started.is_set())
    first = cluster.workers[0][1]
    eventually(lambda: (manager.folder / f"{job.id}.mp4.step.safetensors").exists())
    first.dead = True
    eventually(lambda: len(cluster.living()) == 1)
    event.set()
    assert done(manager, job).state == "succeeded"
    assert first.killed and garage.went_on_from[-1] == b"step 2" and names(manager) == ["alpha/cpu-0"]
    notes = [event.data["note"] for event in manager.events(job.id) if event.data.get("note")]
    assert len(notes) == 1 and "worker" in notes[0]


def test_a_hanging_worker_is_replaced(open_farm: Open) -> None:
    cluster = FakeCluster(ONE)
    farm, manager = open_farm(cluster, 1, 1, silence=0.2)
    farm.wait_for_first(CancelToken())
    first = cluster.workers[0][1]
    first.hangs = True
    eventually(lambda: first.killed and len(cluster.living()) == 1)
    eventually(lambda: manager.workers())
    assert done(manager, manager.submit(CONFIG, ask())).state == "succeeded"


def test_a_machine_that_goes_takes_no_job_with_it_and_counts_as_nobodys_death(open_farm: Open, garage: Garage) -> None:
    cluster = FakeCluster(ONE)
    _, manager = open_farm(cluster, 1, 1)
    event = hold(garage, "held")
    job = manager.submit(CONFIG, ask("held"))
    for count, place in enumerate((ONE, TWO, ONE, TWO), 1):  # more often than a job may die
        cluster.machines = [place]
        eventually(lambda count=count: len(garage.ran) == count and garage.running == 1)
        assert names(manager) == [f"{place.name}/cpu-0"]
    event.set()
    assert done(manager, job).state == "succeeded"


def test_the_head_may_end_any_number_of_times(open_farm: Open, garage: Garage) -> None:
    cluster = FakeCluster(ONE, TWO)
    farm, manager = open_farm(cluster)
    farm.wait_for_first(CancelToken())
    for count in (1, 2, 3):
        eventually(lambda: len(manager.workers()) == 2)
        event = hold(garage, str(count))
        garage.started.clear()
        job = manager.submit(CONFIG, ask(str(count)))
        cancelled = manager.submit(CONFIG, ask(str(count)))
        assert garage.started.wait(30)
        manager.cancel(cancelled.id)
        cluster.down = True
        eventually(lambda: not manager.workers())
        assert manager.alive and manager.get(job.id).state == "queued"
        event.set()
        cluster.down = False
        assert done(manager, job).state == "succeeded" and done(manager, cancelled).state == "cancelled"
        assert cluster.opened == count + 1


def test_every_worker_loads_the_served_model_first(open_farm: Open, garage: Garage) -> None:
    heard: list[Any] = []
    garage.open_seconds = 0.2
    farm, manager = open_farm(FakeCluster(ONE, TWO), preload=Preload(CONFIG, "p", heard.append))
    farm.wait_for_first(CancelToken())
    eventually(lambda: len(manager.workers()) == 2)
    assert garage.opened == [CONFIG, CONFIG] and heard
    assert all(worker.loaded is not None and worker.loaded.preset == "p" for worker in manager.workers())


def test_a_model_that_no_worker_loads_ends_the_start_with_its_error(open_farm: Open, garage: Garage) -> None:
    garage.open_error = CheckpointError("There is no such file.")
    farm, _ = open_farm(FakeCluster(ONE, TWO), preload=Preload(OTHER, "p", lambda event: None))
    with pytest.raises(LightX2VError, match=r"There is no such file\."):
        farm.wait_for_first(CancelToken())


def test_another_version_of_a_worker_is_not_used(open_farm: Open, caplog: pytest.LogCaptureFixture) -> None:
    cluster = FakeCluster(ONE, TWO)
    cluster.hellos = iter([{"version": "0.0.1"}, {}, *({"version": "0.0.1"} for _ in range(50))])
    _, manager = open_farm(cluster)
    eventually(lambda: names(manager) == ["beta/cpu-0"])
    eventually(lambda: "it has version 0.0.1" in caplog.text)


def test_a_start_without_machines_does_not_wait(open_farm: Open) -> None:
    cluster = FakeCluster()
    farm, manager = open_farm(cluster)
    farm.wait_for_first(CancelToken())
    job = manager.submit(CONFIG, ask())
    cluster.machines.append(ONE)
    assert done(manager, job).state == "succeeded"


def test_the_autoscaler_is_asked_for_what_the_backlog_needs_and_idle_workers_are_given_back(
    open_farm: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    backlog = [0.0]
    monkeypatch.setattr(JobManager, "backlog", lambda self: backlog[0])
    cluster = FakeCluster(ONE)
    farm, manager = open_farm(cluster, 1, 3)
    farm.wait_for_first(CancelToken())
    backlog[0] = 170.0
    eventually(lambda: cluster.asked == [1, 3])
    cluster.machines.append(TWO)
    eventually(lambda: len(manager.workers()) == 2)
    backlog[0] = 0.0
    monkeypatch.setattr("lightx2v.farm.scaling.IDLE_SECONDS", 0.1)
    eventually(lambda: len(manager.workers()) == 1)
    eventually(lambda: cluster.asked[-1] == 1)
    assert len(cluster.living()) == 1


def test_twins_have_different_names(open_farm: Open) -> None:
    twins = [Node(id=id, name="same", slots=1) for id in ("abcd1", "efgh2")]
    _, manager = open_farm(FakeCluster(*twins))
    eventually(lambda: names(manager) == ["same~abcd/cpu-0", "same~efgh/cpu-0"])


def test_a_worker_runs_a_slow_script_that_is_cancelled_within_a_step(open_farm: Open, garage: Garage) -> None:
    garage.script["slow"] = Script(steps=1000, seconds=0.05)
    farm, manager = open_farm(FakeCluster(ONE), 1, 1)
    farm.wait_for_first(CancelToken())
    job = manager.submit(CONFIG, ask("slow"))
    eventually(lambda: manager.get(job.id).progress)
    manager.cancel(job.id)
    assert done(manager, job).state == "cancelled"


def test_leftovers_of_a_run_are_not_on_the_workers_machine(
    open_farm: Open, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = tmp_path / "there"
    there.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(there))
    farm, manager = open_farm(FakeCluster(ONE), 1, 1)
    farm.wait_for_first(CancelToken())
    assert done(manager, manager.submit(CONFIG, ask())).state == "succeeded"
    assert not list(there.iterdir())


def test_a_job_goes_to_a_machine_that_holds_its_model_and_says_why_it_waits_for_one(
    open_farm: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    reason = "The model does not fit."
    monkeypatch.setattr(refusal, "refusal_of", lambda config, machine: reason if config == OTHER else "")
    cluster = FakeCluster(ONE)
    farm, manager = open_farm(cluster)
    farm.wait_for_first(CancelToken())
    job, fitting = manager.submit(OTHER, ask()), manager.submit(CONFIG, ask())
    assert done(manager, fitting).state == "succeeded" and manager.get(job.id).state == "queued"
    notes = [event.data.get("note", "") for event in manager.events(job.id)]
    assert reason in notes and any(f"alpha/cpu-0: {reason}" in note for note in notes)
    monkeypatch.setattr(refusal, "refusal_of", lambda config, machine: "")
    cluster.machines.append(TWO)
    assert done(manager, job).state == "succeeded"


def test_a_cluster_that_does_not_answer_at_the_start_ends_it(open_farm: Open) -> None:
    cluster = FakeCluster()
    cluster.down = True
    farm, _ = open_farm(cluster)
    with pytest.raises(LightX2VError, match=r"The head has ended\."):
        farm.wait_for_first(CancelToken())
