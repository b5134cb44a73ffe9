"""Several workers: they share one queue, come and go, and no job is lost or run twice."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
from fake_engine import Garage, Script
from fake_replica import FakeReplica
from job_runs import CONFIG, OTHER, ask, done, hold
from patience import PATIENCE, eventually

from lightx2v.errors import Busy, ConfigError
from lightx2v.jobs import store
from lightx2v.jobs.dispatcher import ASSUMED_LOAD
from lightx2v.jobs.engine_slot import EngineSlot
from lightx2v.jobs.queue import JobManager
from lightx2v.jobs.store import Job

EAGER = {"predict": lambda *_, loaded, **__: 60.0 if loaded else 60.001}
"""Loading costs nothing, so that no worker leaves a job to another."""


@pytest.fixture
def second() -> Garage:
    """The engines of a second replica."""
    return Garage()


def running(manager: JobManager, *jobs: Job) -> bool:
    return all(manager.get(job.id).state == "running" for job in jobs)


def test_two_replicas_run_two_jobs_at_once_each_with_its_own_progress(
    open_manager: Callable[..., JobManager], garage: Garage, second: Garage
) -> None:
    manager = open_manager(**EAGER)
    manager.add_replica(EngineSlot(second, "gpu-1"))
    events = [hold(garage, "a"), hold(garage, "b")]
    second.script = garage.script
    jobs = [manager.submit(CONFIG, ask(prompt)) for prompt in "ab"]
    waiting = manager.submit(CONFIG, ask("c"))
    eventually(lambda: running(manager, *jobs))
    eventually(lambda: all(manager.get(job.id).progress for job in jobs))
    eventually(lambda: sorted(garage.ran + second.ran) == ["a", "b"])  # progress begins with loading
    assert manager.get(waiting.id).position == 1
    assert {worker.job.id for worker in manager.workers() if worker.job} == {job.id for job in jobs}
    events[1].set()
    assert done(manager, jobs[1]).state == "succeeded" and done(manager, waiting).state == "succeeded"
    assert running(manager, jobs[0])
    events[0].set()
    assert done(manager, jobs[0]).state == "succeeded"
    assert garage.most_running == second.most_running == 1


def test_a_replica_that_is_removed_gives_its_job_to_another_at_its_step(
    manager: JobManager, garage: Garage, second: Garage
) -> None:
    hold(garage, "held", saves=b"half of it")
    job = manager.submit(CONFIG, ask("held"))
    assert garage.started.wait(PATIENCE)
    manager.add_replica(EngineSlot(second, "gpu-1"))
    assert manager.remove_replica("this machine")
    assert done(manager, job).state == "succeeded"
    assert second.went_on_from == [b"half of it"] and garage.alive == 0
    states = [event.data for event in manager.events(job.id) if event.kind == "state"]
    assert [data["state"] for data in states] == ["queued", "running", "queued", "running", "succeeded"]
    assert "goes on" in states[2]["note"]
    assert [worker.name for worker in manager.workers()] == ["gpu-1"] and not manager.remove_replica("this machine")


def test_a_drained_replica_takes_no_job_until_it_is_put_back(manager: JobManager, garage: Garage) -> None:
    event = hold(garage, "held", saves=b"half of it")
    job = manager.submit(CONFIG, ask("held"))
    assert garage.started.wait(PATIENCE)
    assert manager.drain("this machine") and not manager.drain("nobody")
    eventually(lambda: manager.get(job.id).state == "queued")
    assert [(worker.state, worker.job) for worker in manager.workers()] == [("drained", None)]
    assert manager.get(job.id).position == 1 and manager.alive and garage.alive == 1, "the model stays loaded"
    event.set()
    manager.drain("this machine", on=False)
    assert done(manager, job).state == "succeeded" and garage.went_on_from == [None, b"half of it"]


@pytest.mark.parametrize("deleted", [False, True])
def test_a_replica_that_does_not_stop_loses_its_job_to_another_and_delivers_nothing_later(
    deleted: bool, manager: JobManager, garage: Garage, second: Garage
) -> None:
    event = hold(garage, "held", ignore_cancel=True)
    job = manager.submit(CONFIG, ask("held"))
    assert garage.started.wait(PATIENCE)
    manager.add_replica(EngineSlot(second, "gpu-1"))
    assert manager.remove_replica("this machine", timeout=0.05)
    job = done(manager, job)
    assert job.state == "succeeded" and second.ran == ["held"]
    events = manager.events(job.id)
    if deleted:
        manager.delete(job.id)
    event.set()
    eventually(lambda: garage.alive == 0)
    if deleted:
        assert not list(manager.folder.glob("*.mp4"))
    else:
        assert manager.get(job.id) == job and manager.events(job.id) == events


def test_names_are_unique_and_a_queue_without_workers_refuses_jobs_unless_some_may_come(
    open_manager: Callable[..., JobManager], garage: Garage
) -> None:
    manager = open_manager(garage=None)
    assert not manager.alive
    with pytest.raises(Busy, match="No worker is left"):
        manager.submit(CONFIG, ask())
    manager.more_may_come = True
    assert manager.alive
    job = manager.submit(CONFIG, ask())
    manager.add_replica(EngineSlot(garage, "gpu-0"))
    with pytest.raises(ConfigError, match="already a worker 'gpu-0'"):
        manager.add_replica(EngineSlot(garage, "gpu-0"))
    assert done(manager, job).state == "succeeded"
    assert manager.remove_replica("gpu-0") and manager.alive
    manager.more_may_come = False
    assert not manager.alive


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_worker_that_crashes_loses_no_job_while_there_is_another(
    manager: JobManager, garage: Garage, second: Garage
) -> None:
    event = hold(garage, "kill", error=SystemExit(1), saves=b"half of it")
    job = manager.submit(CONFIG, ask("kill"))
    assert garage.started.wait(PATIENCE)
    manager.add_replica(EngineSlot(second, "gpu-1"))
    event.set()
    assert done(manager, job).state == "succeeded" and second.went_on_from == [b"half of it"]
    assert manager.alive and [worker.name for worker in manager.workers()] == ["gpu-1"]


def test_all_workers_stop_when_the_queue_closes(open_manager: Callable[..., JobManager], garage: Garage) -> None:
    manager = open_manager(**EAGER)
    garages = [Garage() for _ in range(3)]
    for number, other in enumerate(garages):
        manager.add_replica(EngineSlot(other, f"gpu-{number}"))
    for number in range(4):
        for each in (garage, *garages):
            each.script[str(number)] = Script(hold=threading.Event())
    jobs = [manager.submit(CONFIG, ask(str(number))) for number in range(4)]
    eventually(lambda: running(manager, *jobs))
    assert manager.close()
    assert [each.alive for each in (garage, *garages)] == [0] * 4


def test_jobs_go_where_their_model_is_loaded_and_wait_there_if_that_is_sooner(
    open_manager: Callable[..., JobManager],
) -> None:
    seconds = {True: 1.0, False: 1000.0}
    manager = open_manager(garage=None, max_queue=100, predict=lambda *_, loaded, **__: seconds[loaded], start=False)
    a, b = FakeReplica("a"), FakeReplica("b")
    for replica in (a, b):
        manager.add_replica(replica)
    jobs = [manager.submit(config, ask(str(n))) for n, config in enumerate([CONFIG, OTHER])]
    manager.start()
    assert {done(manager, job).state for job in jobs} == {"succeeded"}
    more = [manager.submit(config, ask(f"more {n}")) for n, config in enumerate([CONFIG, OTHER] * 6)]
    assert {done(manager, job).state for job in more} == {"succeeded"}
    assert sorted(len(replica.garage.opened) for replica in (a, b)) == [1, 1], "12 jobs of two models, no other load"


def test_the_start_and_the_backlog_are_predicted_for_all_workers(open_manager: Callable[..., JobManager]) -> None:
    manager = open_manager(
        garage=None, predict=lambda config, request, **_: float(request.frames), clock=lambda: 1000.0, max_queue=100
    )
    manager.more_may_come = True
    assert manager.backlog() == 0.0
    replicas = [FakeReplica(f"gpu-{number}") for number in range(2)]
    for replica in replicas:
        replica.garage.script = {name: Script(at=("text", 1), hold=threading.Event()) for name in ("a", "b")}
    held = [manager.submit(CONFIG, ask(name, frames=frames)) for name, frames in (("a", 41), ("b", 81))]
    assert manager.get(held[0].id).starts_in is None and manager.backlog() == float("inf")
    for replica in replicas:
        manager.add_replica(replica)
    eventually(lambda: running(manager, *held))
    jobs = [manager.submit(CONFIG, ask(str(frames), frames=frames)) for frames in (45, 5, 9)]
    assert [manager.get(job.id).starts_in for job in jobs] == [41.0, 81.0, 86.0]
    assert [manager.get(job.id).position for job in jobs] == [1, 2, 3]
    assert manager.backlog() == 86.0
    more = [manager.submit(CONFIG, ask(str(n), frames=5)) for n in range(30)]
    assert manager.backlog() < 1000, "a plan that is some milliseconds old lacks jobs, not workers"
    for job in more:
        manager.cancel(job.id)
    eventually(lambda: manager.backlog() == 86.0)
    assert manager.move(jobs[2].id, 1).starts_in == 41.0
    manager.edit(jobs[2].id, ask("longer", frames=161))
    assert [manager.get(jobs[n].id).starts_in for n in (2, 0, 1)] == [41.0, 81.0, 126.0]
    for replica in replicas:
        for script in replica.garage.script.values():
            script.hold.set()  # type: ignore[union-attr]


def test_a_replica_that_leaves_before_the_start_is_closed_and_forgotten(
    open_manager: Callable[..., JobManager],
) -> None:
    manager = open_manager(garage=None, start=False)
    replica = FakeReplica("gpu-0")
    manager.add_replica(replica)
    assert manager.remove_replica("gpu-0") and manager.workers() == [] and not replica.alive
    manager.close()
    late = FakeReplica("gpu-1")
    manager.add_replica(late)
    assert not late.alive, "nobody would close it"


def test_a_drained_worker_stays_out_of_service_when_it_is_started_again(
    open_manager: Callable[..., JobManager],
) -> None:
    manager = open_manager(garage=None)
    manager.more_may_come = True
    manager.add_replica(FakeReplica("gpu-0"))
    manager.drain("gpu-0")
    manager.remove_replica("gpu-0")
    manager.add_replica(FakeReplica("gpu-0"))
    assert [worker.state for worker in manager.workers()] == ["drained"]
    job = manager.submit(CONFIG, ask())
    assert manager.backlog() == float("inf")
    manager.drain("gpu-0", on=False)
    assert done(manager, job).state == "succeeded"


def test_the_progress_of_many_jobs_at_once_is_kept(
    open_manager: Callable[..., JobManager], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store, "LOGGED_JOBS", 2)
    manager = open_manager(garage=None, max_queue=100, **EAGER)
    manager.more_may_come = True
    scripts = {str(number): Script(at=("denoise", 4), hold=threading.Event()) for number in range(5)}
    for number in range(len(scripts)):
        replica = FakeReplica(f"gpu-{number}")
        replica.garage.script = scripts
        manager.add_replica(replica)
    jobs = [manager.submit(CONFIG, ask(name)) for name in scripts]
    eventually(lambda: all((job := manager.get(one.id)).progress and job.progress.step == 3 for one in jobs))
    for job in jobs:
        steps = [e.data["step"] for e in manager.events(job.id) if e.data.get("stage") == "denoise"]
        assert steps == [1, 2, 3]
    for script in scripts.values():
        script.hold.set()  # type: ignore[union-attr]


def test_a_long_list_reads_the_queue_and_plans_it_once(
    open_manager: Callable[..., JobManager], monkeypatch: pytest.MonkeyPatch
) -> None:
    manager = open_manager(max_queue=1000, start=False, predict=lambda *_, **__: 5.0)
    jobs = [manager.submit(CONFIG, ask(str(number))) for number in range(300)]
    queued, reads = manager._store.queued, []
    monkeypatch.setattr(manager._store, "queued", lambda: reads.append(1) or queued())
    listed = manager.list(limit=1000, oldest_first=True)
    assert len(reads) <= 3
    assert [job.position for job in listed] == list(range(1, 301))
    eventually(lambda: manager.get(jobs[-1].id).starts_in)
    starts = [job.starts_in for job in manager.list(limit=1000, oldest_first=True)]
    assert starts == [0.0, *(ASSUMED_LOAD + 5.0 * number for number in range(1, 300))]
