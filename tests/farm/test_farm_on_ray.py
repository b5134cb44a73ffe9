"""The farm on Ray, with a cluster in this machine: workers, machines and the head are killed while jobs run."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import httpx
import psutil
import pytest
from parallel_front_ends import PRESET, PROMPT, server
from parallel_ranks import Running
from patience import PATIENCE, eventually, free_port

from lightx2v.catalog.choose import named_preset
from lightx2v.config.environment import Environment
from lightx2v.config.presets import Resolved, resolve
from lightx2v.config.request import Request
from lightx2v.farm.farm import Farm
from lightx2v.farm.options import FarmOptions
from lightx2v.farm.places import SLOT
from lightx2v.farm.ray_settings import prepare
from lightx2v.jobs.pool import WorkerState
from lightx2v.jobs.queue import JobManager
from lightx2v.jobs.store import Job
from lightx2v.progress import CancelToken
from lightx2v.server.command import load

STEPS = 60


class Machines:
    """A Ray cluster: a head without workers, and machines with room for one process or two."""

    def __init__(self, folder: str) -> None:
        from ray.cluster_utils import Cluster

        self._small = {"num_cpus": 0, "object_store_memory": 100 * 2**20}
        head = self._small | {"temp_dir": folder, "include_dashboard": False}
        self.cluster = Cluster(initialize_head=True, head_node_args=head)
        self.address = str(self.cluster.address)
        self.nodes: list[Any] = []

    def add(self, slots: int) -> None:
        self.nodes.append(self.cluster.add_node(**self._small, resources={SLOT: slots}))

    def kill(self) -> None:
        """The oldest machine loses its power."""
        self.cluster.remove_node(self.nodes.pop(0), allow_graceful=False)


@pytest.fixture(scope="module")
def machines() -> Iterator[Machines]:
    with pytest.MonkeyPatch.context() as patch, TemporaryDirectory(prefix="lx-", dir="/tmp") as folder:
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("CUDA_VISIBLE_DEVICES", "")
        patch.setenv("RAY_TMPDIR", folder)  # Cluster writes its address there, into a folder that it expects
        Path(folder, "ray").mkdir()
        for name in ("RAY_ENABLE_AUTO_CONNECT", "RAY_USAGE_STATS_ENABLED", "RAY_gcs_rpc_server_reconnect_timeout_s"):
            patch.setenv(name, "0")
            patch.delenv(name)  # put back after the tests
        prepare(own=False)
        started = Machines(folder)
        yield started
        started.cluster.shutdown()


@pytest.fixture(scope="module")
def model() -> Resolved:
    environment = Environment.read()
    return resolve(named_preset(PRESET, (), environment), {}, environment=environment)


@contextmanager
def farm(machines: Machines, folder: Path, replicas: int, gpus: int = 1) -> Iterator[JobManager]:
    manager = JobManager(None, folder, max_queue=100, save_every=0.1)
    options = FarmOptions(low=replicas, high=replicas, gpus=gpus, address=machines.address)
    crew = Farm(manager, options, load, silence=3.0)
    try:
        crew.start()
        crew.wait_for_first(CancelToken())
        eventually(lambda: len(manager.workers()) == replicas)
        yield manager
    finally:
        manager.close()
        crew.close()


def submit(manager: JobManager, model: Resolved, steps: int = STEPS) -> Job:
    request = Request(prompt=PROMPT, **{**model.request, "frames": 5, "steps": steps, "seed": 7})
    return manager.submit(model.engine, request, preset=PRESET)


def done(manager: JobManager, job: Job) -> Job:
    job = manager.wait(job.id, PATIENCE)
    assert job.state == "succeeded", job
    return job


def worker_of(manager: JobManager, job: Job) -> WorkerState | None:
    return next((worker for worker in manager.workers() if worker.job is not None and worker.job.id == job.id), None)


def with_a_step(manager: JobManager, job: Job) -> WorkerState:
    """Wait for the job's first saved step; returns the worker that runs it."""
    eventually((manager.folder / f"{job.id}.mp4.step.safetensors").exists)
    found = worker_of(manager, job)
    assert found is not None
    return found


@pytest.mark.multi
def test_jobs_go_on_at_their_step_when_a_worker_is_killed_or_hangs_and_when_its_machine_goes(
    machines: Machines, model: Resolved, tmp_path: Path
) -> None:
    machines.add(1)
    machines.add(1)

    def kill(number: int) -> Callable[[WorkerState], None]:
        def strike(worker: WorkerState) -> None:
            assert worker.status.pid is not None
            os.kill(worker.status.pid, number)

        return strike

    def unplug(worker: WorkerState) -> None:
        ids = [node.node_id for node in machines.nodes]
        index = next(index for index, id in enumerate(ids) if id[:4] in worker.name)
        machines.nodes.insert(0, machines.nodes.pop(index))
        machines.kill()
        machines.add(1)

    with farm(machines, tmp_path, 2) as manager:
        undisturbed = done(manager, submit(manager, model))
        for strike in (kill(signal.SIGKILL), kill(signal.SIGSTOP), unplug):
            job, cancelled = submit(manager, model), submit(manager, model, steps=200)
            worker = with_a_step(manager, job)
            manager.cancel(cancelled.id)
            started = time.monotonic()
            strike(worker)
            job = done(manager, job)
            assert time.monotonic() - started < 30
            assert job.result is not None and 0 < job.result["resumed_after"] <= STEPS
            assert job.path is not None and undisturbed.path is not None
            assert job.path.read_bytes() == undisturbed.path.read_bytes()
            assert manager.wait(cancelled.id, PATIENCE).state == "cancelled"
            states = [event.data["state"] for event in manager.events(job.id) if event.kind == "state"]
            assert states == ["queued", "running", "queued", "running", "succeeded"]
            eventually(lambda: len(manager.workers()) == 2)


@pytest.mark.multi
def test_a_group_of_processes_makes_a_video_together_and_is_replaced_as_a_whole(
    machines: Machines, model: Resolved, tmp_path: Path
) -> None:
    machines.add(2)
    with farm(machines, tmp_path, 1, gpus=2) as manager:
        result = done(manager, submit(manager, model, steps=2)).result
        assert result is not None and len(result["processes"]) == 2
        job = submit(manager, model)
        worker = with_a_step(manager, job)
        assert worker.status.pid is not None
        (follower,) = psutil.Process(worker.status.pid).children()
        follower.kill()
        result = done(manager, job).result
        assert result is not None and result["resumed_after"] > 0 and len(result["processes"]) == 2
        assert not psutil.pid_exists(worker.status.pid)


@pytest.mark.multi
def test_the_server_starts_its_own_cluster_again_when_the_head_is_killed(tmp_path: Path) -> None:
    port = free_port()
    running = Running(1, server, port, str(tmp_path), "--save_every", "0.1", "--replicas", "2")
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=PATIENCE, trust_env=False) as client:

        def state(id: str) -> str:
            return str(client.get(f"/v1/videos/{id}").json()["status"])

        def up() -> bool:
            try:
                return client.get("/health").status_code == 200
            except httpx.TransportError:
                return False

        eventually(lambda: up() or not running.alive)
        body = {"prompt": PROMPT, "num_frames": 5, "num_inference_steps": STEPS, "seed": 7}
        ids = [str(client.post("/v1/videos", json=body).json()["id"]) for _ in range(3)]
        eventually(lambda: all((tmp_path / f"{id}.mp4.step.safetensors").exists() for id in ids[:2]))
        family = psutil.Process(running.pids[0]).children(recursive=True)
        (head,) = [process for process in family if process.name() == "gcs_server"]
        head.kill()
        eventually(lambda: all(state(id) == "completed" for id in ids))
        assert len({client.get(f"/v1/videos/{id}/content").content for id in ids}) == 1
        left = list(psutil.Process(running.pids[0]).children(recursive=True))
        running.signal(0, signal.SIGTERM)
    (end,) = running.ended()
    assert end.code == 143, end.output
    assert "The head of the Ray cluster has ended" in end.output
    eventually(lambda: not [process for process in [*family, *left] if process.is_running()])
