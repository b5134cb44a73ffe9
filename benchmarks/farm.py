"""The farm under kill -9, and its speed. On a CPU, with the demo model and one thread per worker.

    python -m benchmarks.farm kills --rounds 3     every kind of death at random moments, and what it cost
    python -m benchmarks.farm speed                two workers against one, and the farm's overhead per job
    python -m benchmarks.farm load                 500 jobs by 32 clients: none lost, and how quickly the status answers

`kills` starts real servers and kills only processes that these have started.
"""

import argparse
import contextlib
import json
import os
import random
import signal
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import httpx
import psutil

ROOT = Path(__file__).parents[1]
PRESET = "demo_t2v_base"
STEPS = 120
WAIT = 120.0
KINDS = ("worker", "hang", "raylet", "gcs", "front end", "node", "ray front end", "ray head")
"""The last three on a cluster of three machines; the others on the cluster that the server starts for itself."""


class Server:
    """A server in a process of its own; `folder` keeps its jobs when it is killed."""

    def __init__(self, folder: Path, *flags: str) -> None:
        self.folder, self.flags = folder, flags
        self.start()

    def start(self) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        one_thread = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
        command = [sys.executable, "-m", "lightx2v.server", "--preset", PRESET, "--port", str(port)]
        command += ["--output_dir", str(self.folder), "--max_queue_size", "1000", *self.flags]
        with (self.folder.parent / f"{self.folder.name}.log").open("ab") as log:
            self.process = subprocess.Popen(command, cwd=ROOT, env=os.environ | one_thread, stdout=log, stderr=log)
        self.client = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=30, trust_env=False)
        until(self.answers)

    def answers(self) -> bool:
        if self.process.poll() is not None:
            raise SystemExit(f"the server ended with {self.process.returncode}; see {self.folder}.log")
        with contextlib.suppress(httpx.TransportError):
            return self.client.get("/health").status_code == 200
        return False

    def children(self, kind: str) -> list[psutil.Process]:
        """Processes that this server has started: its workers, or the parts of its Ray cluster."""
        found = psutil.Process(self.process.pid).children(recursive=True)
        names = {"worker": "ray::Worker", "raylet": "raylet", "gcs": "gcs_server"}
        return [each for each in found if each.is_running() and each.name().startswith(names[kind])]

    def cpu_seconds(self) -> float:
        """Of all processes of the server so far."""
        server = psutil.Process(self.process.pid)
        times = [process.cpu_times() for process in (server, *server.children(recursive=True))]
        return sum(each.user + each.system for each in times)

    def submit(self, steps: int = STEPS) -> str:
        body = {"prompt": "a red ball rolls left", "num_frames": 5, "num_inference_steps": steps, "seed": 7}
        return str(self.client.post("/v1/videos", json=body).raise_for_status().json()["id"])

    def job(self, id: str) -> dict[str, Any]:
        return self.client.get(f"/v1/videos/{id}").raise_for_status().json()

    def cancel(self, id: str) -> bool:
        """False if the job has ended before."""
        return bool(self.client.delete(f"/v1/tasks/{id}").raise_for_status().json()["stop_status"] == "success")

    def events(self, id: str) -> list[dict[str, Any]]:
        lines = self.client.get(f"/v1/videos/{id}/events").text.splitlines()
        return [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: ")]

    def stop(self) -> None:
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(60)


def until(ready: Callable[[], Any], seconds: float = WAIT) -> Any:
    deadline = time.monotonic() + seconds
    while not (value := ready()):
        if time.monotonic() > deadline:
            raise TimeoutError
        time.sleep(0.02)
    return value


# ---- kills ----------------------------------------------------------------------------------------------------------


class Machines:
    """A Ray cluster of a head without workers and two machines with one each, all here."""

    def __init__(self) -> None:
        self._folder = TemporaryDirectory(prefix="lx-", dir="/tmp")
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self._port = probe.getsockname()[1]
        self.start()

    def start(self) -> None:
        from ray.cluster_utils import Cluster

        self._small = {"num_cpus": 0, "object_store_memory": 100 * 2**20}
        head = {"temp_dir": self._folder.name, "include_dashboard": False, "gcs_server_port": self._port}
        self.cluster = Cluster(initialize_head=True, head_node_args=self._small | head)
        self.nodes: list[Any] = []
        for _ in range(2):
            self.add()

    def add(self) -> None:
        self.nodes.append(self.cluster.add_node(**self._small, resources={"lightx2v": 1}))

    def strike(self, kind: str) -> None:
        if kind == "node":
            self.cluster.remove_node(self.nodes.pop(0), allow_graceful=False)
            self.add()
        else:
            self.cluster.head_node.kill_gcs_server()
            self.cluster.shutdown()
            self.start()


def kills(rounds: int, kinds: list[str]) -> None:
    with TemporaryDirectory(prefix="farm-") as root:
        rows: list[dict[str, Any]] = []
        own = [kind for kind in kinds if kind not in KINDS[-3:]]
        if own:
            server = Server(Path(root) / "own", "--replicas", "2", "--save_every", "0.3")
            reference = video_of(server)
            rows += [one_kill(server, kind, reference) for kind in own for _ in range(rounds)]
            server.stop()
        if len(own) < len(kinds):
            machines = Machines()
            address = str(machines.cluster.address)
            server = Server(Path(root) / "ray", "--replicas", "2", "--save_every", "0.3", "--ray", address)
            reference = video_of(server)
            others = [kind for kind in kinds if kind not in own]
            rows += [one_kill(server, kind, reference, machines) for kind in others for _ in range(rounds)]
            server.stop()
            machines.cluster.shutdown()
        print(table(rows))


def video_of(server: Server) -> bytes:
    id = server.submit()
    until(lambda: server.job(id)["completed_at"])
    return server.client.get(f"/v1/videos/{id}/content").content


def one_kill(server: Server, kind: str, reference: bytes, machines: Machines | None = None) -> dict[str, Any]:
    """Five jobs on two workers; one that runs is cancelled, one that waits too; then something dies."""
    ids = [server.submit() for _ in range(5)]
    until(lambda: sum(server.job(id)["status"] == "in_progress" for id in ids) == 2)  # both workers are back
    time.sleep(random.uniform(0.3, 4.0))
    running = [id for id in ids if server.job(id)["status"] == "in_progress"]
    waiting = [id for id in ids if server.job(id)["status"] == "queued"]
    stopped = [*running[:1], *waiting[-1:]] if random.random() < 0.5 else waiting[-1:]
    stopped = [id for id in stopped if server.cancel(id)]
    started = time.monotonic()
    strike(server, kind, machines)
    watched = [id for id in running if id not in stopped]
    with ThreadPoolExecutor(2) as pool:
        seconds = list(pool.map(lambda id: seconds_until_back(server, id, started), watched))
    back = {id: took for id, took in zip(watched, seconds, strict=True) if took is not None}
    until(lambda: all(server.job(id)["completed_at"] for id in ids))
    jobs = {id: server.job(id) for id in ids}
    good = [id for id in ids if jobs[id]["status"] == "completed"]
    same = [id for id in good if server.client.get(f"/v1/videos/{id}/content").content == reference]
    events = {id: server.events(id) for id in ids}
    ends = {
        id: [event for event in events[id] if event.get("status") == "completed" and "id" not in event] for id in ids
    }
    steps = {id: max(event.get("resumed_after", 0) for event in events[id]) for id in back}
    row = {
        "what": kind,
        "jobs": len(ids),
        "cancelled": f"{sum(jobs[id]['status'] == 'cancelled' for id in stopped)} of {len(stopped)}",
        "lost": len([id for id in ids if id not in good and id not in stopped]),
        "twice": sum(len(found) > 1 for found in ends.values()),
        "other bits": len(good) - len(same),
        "interrupted runs": len(back),
        "resumed at": ", ".join(f"{step}/{STEPS}" for step in steps.values()),
        "seconds": ", ".join(f"{seconds:.1f}" for seconds in back.values()),
        "status": ", ".join(sorted({jobs[id]["status"] for id in ids if id not in stopped})),
    }
    print(json.dumps(row), flush=True)
    return row


def seconds_until_back(server: Server, id: str, started: float) -> float | None:
    """Seconds until a run that was interrupted goes on; None if nothing has interrupted it."""
    waited = False
    while not (job := server.job(id))["completed_at"] and time.monotonic() - started < WAIT:
        step = job["step"] or {}
        waited = waited or job["status"] == "queued"
        if step.get("stage") in ("denoise", "decode", "write") and (waited or step["resumed_after"]):
            return time.monotonic() - started
        time.sleep(0.02)
    return None


def strike(server: Server, kind: str, machines: Machines | None) -> None:
    if machines is not None and kind in ("node", "ray head"):
        machines.strike(kind)
    elif kind in ("front end", "ray front end"):
        server.process.kill()
        server.process.wait()
        server.start()
    elif kind in ("worker", "hang"):
        random.choice(server.children("worker")).send_signal(signal.SIGSTOP if kind == "hang" else signal.SIGKILL)
    else:
        server.children(kind)[0].kill()


def table(rows: list[dict[str, Any]]) -> str:
    lines = ["| " + " | ".join(rows[0]) + " |", "|" + "---|" * len(rows[0])]
    return "\n".join([*lines, *("| " + " | ".join(map(str, row.values())) + " |" for row in rows)])


# ---- speed and load -------------------------------------------------------------------------------------------------


def speed(jobs: int) -> None:
    """The same jobs with one worker and with two, interleaved; and short jobs one by one, with the farm and without."""
    with TemporaryDirectory(prefix="farm-") as root:
        servers = {
            "one": Server(Path(root) / "one", "--save_every", "0"),
            "two": Server(Path(root) / "two", "--replicas", "2", "--save_every", "0"),
        }
        for server in servers.values():
            seconds_for(server, 2)
        times: dict[str, list[float]] = {name: [] for name in servers}
        work: dict[str, list[float]] = {name: [] for name in servers}
        single: dict[str, list[float]] = {name: [] for name in servers}
        for _ in range(3):
            for name, server in servers.items():
                before = server.cpu_seconds()
                times[name].append(seconds_for(server, jobs))
                work[name].append((server.cpu_seconds() - before) / jobs)
                single[name] += [seconds_for(server, 1, steps=2) for _ in range(5)]
        one, two = (statistics.median(times[name]) for name in servers)
        print(f"{jobs} jobs: one worker {one:.2f} s, two workers {two:.2f} s, {one / two:.2f} times")
        one, two = (statistics.median(work[name]) for name in servers)
        print(f"CPU seconds of all processes per job: {one:.2f} and {two:.2f}")
        print(f"on two free cores: {2 * one / two:.2f} times")
        alone, farmed = (statistics.median(single[name]) for name in servers)
        print(
            f"one short job: {alone * 1000:.0f} ms, on the farm {farmed * 1000:.0f} ms, "
            f"{(farmed - alone) * 1000:.0f} ms more"
        )
        for server in servers.values():
            server.stop()


def seconds_for(server: Server, jobs: int, steps: int = STEPS) -> float:
    started = time.monotonic()
    ids = [server.submit(steps) for _ in range(jobs)]
    until(lambda: all(server.job(id)["completed_at"] for id in ids[-2:]))
    until(lambda: all(server.job(id)["completed_at"] for id in ids))
    return time.monotonic() - started


def load(jobs: int, clients: int) -> None:
    with TemporaryDirectory(prefix="farm-") as root:
        server = Server(Path(root) / "load", "--replicas", "2", "--save_every", "0")
        seconds: list[float] = []
        lock = threading.Lock()

        def client(count: int) -> list[str]:
            ids = []
            for _ in range(count):
                ids.append(server.submit(steps=1))
                while not ask(ids[-1])["completed_at"]:
                    time.sleep(0.25)
            return ids

        def ask(id: str) -> dict[str, Any]:
            started = time.monotonic()
            job = server.job(id)
            with lock:
                seconds.append(time.monotonic() - started)
            return job

        started = time.monotonic()
        with ThreadPoolExecutor(clients) as pool:
            counts = [jobs // clients + (index < jobs % clients) for index in range(clients)]
            ids = [id for made in pool.map(client, counts) for id in made]
        took = time.monotonic() - started
        states = [server.job(id)["status"] for id in ids]
        p99 = statistics.quantiles(seconds, n=100)[98] * 1000
        print(
            f"{len(ids)} jobs by {clients} clients in {took:.0f} s: {states.count('completed')} completed, "
            f"{len(set(ids))} different; {len(seconds)} status requests, median "
            f"{statistics.median(seconds) * 1000:.1f} ms, p99 {p99:.0f} ms"
        )
        server.stop()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("kills", "speed", "load"))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--kinds", default=",".join(KINDS))
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    random.seed(options.seed)
    if options.what == "kills":
        kills(options.rounds, options.kinds.split(","))
    elif options.what == "speed":
        speed(jobs=8)
    else:
        load(jobs=500, clients=32)


if __name__ == "__main__":
    main()
