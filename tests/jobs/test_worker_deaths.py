"""Workers die, hang and are taken away at any moment: no job is lost, and none is delivered twice."""

from __future__ import annotations

import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from fake_engine import Garage, Script
from fake_replica import FakeReplica
from job_runs import CONFIG, OTHER, ask, done, hold
from patience import PATIENCE, eventually

from lightx2v.errors import Busy
from lightx2v.jobs.queue import JobManager
from lightx2v.jobs.store import Job

SUPPORT = Path(__file__).parents[1] / "support"


@pytest.fixture
def farm(open_manager: Callable[..., JobManager]) -> JobManager:
    """A queue whose workers all come from elsewhere."""
    manager = open_manager(garage=None, max_queue=1000, predict=lambda *_, loaded, **__: 0.01 if loaded else 0.02)
    manager.more_may_come = True
    return manager


def held_on(manager: JobManager, replica: FakeReplica, **options: object) -> tuple[Job, threading.Event]:
    """A job that runs half-way on this replica, and the event that lets it go on."""
    event = hold(replica.garage, "held", **options)
    replica.garage.started.clear()
    job = manager.submit(CONFIG, ask("held"))
    assert replica.garage.started.wait(PATIENCE)
    return job, event


def states(manager: JobManager, job: Job) -> list[str]:
    return [event.data["state"] for event in manager.events(job.id) if event.kind == "state"]


def test_the_job_of_a_worker_that_dies_goes_on_at_its_saved_step_on_another_at_once(farm: JobManager) -> None:
    first, second = FakeReplica("gpu-0"), FakeReplica("gpu-1")
    farm.add_replica(first)
    job, _ = held_on(farm, first, saves=b"half of it")
    waiting = farm.submit(CONFIG, ask("waiting"))
    farm.add_replica(second)
    assert done(farm, waiting).state == "succeeded"
    died = time.monotonic()
    first.die()
    assert done(farm, job).state == "succeeded" and time.monotonic() - died < 5
    assert second.garage.went_on_from == [None, b"half of it"]
    assert states(farm, job) == ["queued", "running", "queued", "running", "succeeded"]
    note = next(event.data["note"] for event in farm.events(job.id) if "note" in event.data)
    assert note.startswith("The worker that ran this job has ended") and "saved step" in note
    assert [worker.name for worker in farm.workers()] == ["gpu-1"]


def test_a_job_with_which_two_workers_in_a_row_have_died_is_interrupted_and_can_be_run_again(farm: JobManager) -> None:
    job = farm.submit(CONFIG, ask("held"))
    for number, state in enumerate(("queued", "interrupted")):
        replica = FakeReplica(f"gpu-{number}")
        hold(replica.garage, "held", saves=b"half of it")
        farm.add_replica(replica)
        assert replica.garage.started.wait(PATIENCE)
        replica.die()
        eventually(lambda state=state: farm.get(job.id).state == state)
    error = farm.get(job.id).error
    assert error is not None and error["type"] == "Interrupted" and "ended twice" in error["message"]
    farm.add_replica(FakeReplica("gpu-2"))
    farm.requeue(job.id)
    assert done(farm, job).state == "succeeded"


def test_without_any_worker_left_jobs_wait_for_the_next_start_and_new_ones_are_refused(farm: JobManager) -> None:
    farm.more_may_come = False
    replica = FakeReplica("gpu-0")
    farm.add_replica(replica)
    job, _ = held_on(farm, replica, saves=b"half of it")
    replica.die()
    eventually(lambda: not farm.alive)
    assert farm.get(job.id).state == "queued"
    with pytest.raises(Busy, match="gpu-0 has ended.*restart it"):
        farm.submit(CONFIG, ask("more"))


def test_a_job_that_was_put_back_by_a_drain_counts_no_death(farm: JobManager) -> None:
    replica = FakeReplica("gpu-0")
    farm.add_replica(replica)
    job, event = held_on(farm, replica)
    replica.die()
    for number in (1, 2):
        replica = FakeReplica(f"gpu-{number}")
        event = hold(replica.garage, "held")
        farm.add_replica(replica)
        assert replica.garage.started.wait(PATIENCE)
        if number == 1:
            assert farm.remove_replica("gpu-1")
    replica.die()
    eventually(lambda: farm.get(job.id).state == "queued")
    event.set()


def test_a_cancelled_job_stays_cancelled_when_its_worker_dies(farm: JobManager) -> None:
    replica = FakeReplica("gpu-0")
    farm.add_replica(replica)
    job, _ = held_on(farm, replica, ignore_cancel=True)
    assert farm.cancel(job.id).cancelling
    replica.die()
    replica.garage.script["held"].hold.set()  # type: ignore[union-attr]
    assert done(farm, job).state == "cancelled"
    farm.add_replica(FakeReplica("gpu-1"))
    assert done(farm, farm.submit(CONFIG, ask("next"))).state == "succeeded"
    assert farm.get(job.id).state == "cancelled" and states(farm, job)[-1] == "cancelled"


def test_a_job_can_be_cancelled_while_its_dead_worker_has_not_ended_and_another_has_its_name(farm: JobManager) -> None:
    class Slow(FakeReplica):
        """It is known to be dead before its run ends."""

        alive = True  # type: ignore[assignment]

    first, second = Slow("gpu-0"), FakeReplica("gpu-0")
    farm.add_replica(first)
    job, _ = held_on(farm, first, ignore_cancel=True)
    first.alive = False  # type: ignore[misc]
    farm.add_replica(second)
    assert farm.cancel(job.id).cancelling and farm.get(job.id).state == "running"
    first.die()
    first.garage.script["held"].hold.set()  # type: ignore[union-attr]
    assert done(farm, job).state == "cancelled" and second.garage.ran == []


def test_a_queue_without_machines_for_a_model_says_so_at_once_or_waits_for_one(farm: JobManager) -> None:
    small = FakeReplica("gpu-0", refuses={"models/a": "It needs 28 GB, and the GPU has 8 GB."})
    also = FakeReplica("gpu-1", refuses={"models/a": "It needs 28 GB, and the GPU has 12 GB."})
    for replica in (small, also):
        farm.add_replica(replica)
    waits = farm.submit(CONFIG, ask("waits"))
    other = farm.submit(OTHER, ask("fits"))
    assert done(farm, other).state == "succeeded", "the one that waits is in nobody's way"
    eventually(lambda: any("note" in event.data for event in farm.events(waits.id)))
    note = next(event.data["note"] for event in farm.events(waits.id) if "note" in event.data)
    assert "gpu-0: It needs 28 GB, and the GPU has 8 GB" in note and "gpu-1" in note and "waits" in note
    assert farm.backlog() == float("inf") and farm.get(waits.id).starts_in is None
    large = FakeReplica("gpu-2")
    farm.add_replica(large)
    assert done(farm, waits).state == "succeeded" and large.garage.ran == ["waits"]
    assert len([event for event in farm.events(waits.id) if "note" in event.data]) == 1
    farm.remove_replica("gpu-2")
    farm.more_may_come = False
    failed = done(farm, farm.submit(CONFIG, ask("never")))
    assert failed.state == "failed" and failed.error is not None
    assert "gpu-0: It needs 28 GB" in failed.error["message"] and "gpu-1" in failed.error["message"]


def test_at_random_moments_workers_die_hang_come_and_go_and_every_job_ends_once(farm: JobManager) -> None:
    dice = random.Random(0)
    names = iter(range(1000))

    def add() -> FakeReplica:
        replica = FakeReplica(f"gpu-{next(names)}")
        replica.garage.script = scripts
        farm.add_replica(replica)
        return replica

    scripts = {str(n): Script(seconds=0.002, saves=str(n).encode(), at=("denoise", 2)) for n in range(80)}
    replicas = [add() for _ in range(4)]
    jobs = [farm.submit(dice.choice([CONFIG, CONFIG, OTHER]), ask(str(n))) for n in range(80)]
    cancelled: set[str] = set()
    deadline = time.monotonic() + PATIENCE
    while not all(farm.get(job.id).over for job in jobs):
        assert time.monotonic() < deadline
        time.sleep(0.02 * dice.random())
        victim, act = dice.choice(replicas), dice.random()
        if act < 0.4:
            victim.die()
        elif act < 0.6:
            farm.remove_replica(victim.name)
        elif act < 0.8:
            farm.drain(victim.name, on=dice.random() < 0.5)
        else:
            job = farm.cancel(dice.choice(jobs).id)
            cancelled |= {job.id} if job.cancelling or job.state == "cancelled" else set()
        replicas = [it for it in replicas if it.alive] or [add()]
        while len(replicas) < 4:
            replicas.append(add())
        for job in farm.list(states=["interrupted"]):
            farm.requeue(job.id)
        farm.drain(replicas[0].name, on=False)
    ended = [farm.get(job.id) for job in jobs]
    assert {job.id for job in ended if job.state == "cancelled"} == cancelled
    assert all(job.state == "succeeded" for job in ended if job.id not in cancelled)
    for job in ended:
        assert sum(state in ("succeeded", "cancelled", "failed") for state in states(farm, job)) == 1
    videos = {f"{job.id}.mp4" for job in ended if job.state == "succeeded"}
    eventually(lambda: {file.name for file in farm.folder.glob("*.*") if "jobs.sqlite" not in file.name} == videos)


KILLED = """
import sys, threading, time
sys.path.insert(0, sys.argv[2])
from fake_engine import Garage, Script
from fake_replica import FakeReplica
from job_runs import CONFIG, ask
from lightx2v.jobs.queue import JobManager
manager = JobManager(None, sys.argv[1], predict=lambda *_, loaded, **__: 60.0 if loaded else 60.001)
replicas = [FakeReplica(f"gpu-{n}") for n in range(3)]
for replica in replicas:
    for n in range(3):
        replica.garage.script[str(n)] = Script(hold=threading.Event(), saves=b"step of %d" % n)
    manager.add_replica(replica)
ids = [manager.submit(CONFIG, ask(str(n))).id for n in range(5)]
for replica in replicas:
    replica.garage.started.wait()
manager.cancel(ids[3])
print(*ids, flush=True)
time.sleep(60)
"""


def test_all_jobs_that_ran_when_the_front_end_was_killed_go_on_at_their_steps_in_their_order(
    tmp_path: Path, garage: Garage
) -> None:
    command = [sys.executable, "-c", KILLED, str(tmp_path), str(SUPPORT)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=SUPPORT.parents[1]) as process:
        assert process.stdout is not None
        ids = process.stdout.readline().split()
        process.kill()
    with JobManager(garage, tmp_path, start=False) as manager:
        assert [job.id for job in manager.list(oldest_first=True, states=["queued"])] == [*ids[:3], ids[4]]
        assert [manager.get(id).position for id in (*ids[:3], ids[4])] == [1, 2, 3, 4]
        manager.start()
        assert [manager.wait(id, PATIENCE).state for id in ids] == ["succeeded"] * 3 + ["cancelled", "succeeded"]
    assert garage.went_on_from == [b"step of 0", b"step of 1", b"step of 2", None]
