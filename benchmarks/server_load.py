"""The server under load: mixed jobs from many clients on loopback. Checks every job and measures response times.

    python -m benchmarks.server_load                              200 jobs, 16 clients, an engine without a model
    python -m benchmarks.server_load --engine demo --jobs 20      the demo model

The server is a process of its own. Clients submit jobs to both families of routes, as JSON and as forms, and cancel
every tenth while it waits or runs. After a 429 (full queue or rate limit) a client waits and tries again. At the end
each job must be completed, or cancelled if its client cancelled it, with an id and a video of its own.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

DEMO = "demo_t2v_distill_lora"
SMALL = {"size": "64x64", "num_frames": 5}


@dataclass
class Tally:
    """The clients' results. `latency` is the seconds of each status request."""

    ids: list[str] = field(default_factory=list)
    ends: dict[str, str] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)
    waits: int = 0
    latency: list[float] = field(default_factory=list)
    seconds: float = 0.0

    def report(self) -> dict[str, Any]:
        cuts = statistics.quantiles(self.latency, n=100)
        percentiles = {f"status_p{p}_ms": round(cuts[p - 1] * 1e3, 2) for p in (50, 95, 99)}
        ends = {end: list(self.ends.values()).count(end) for end in sorted(set(self.ends.values()))}
        counts = {"jobs": len(self.ids), "distinct": len(set(self.ids)), **ends, "wrong": len(self.wrong)}
        asked = {"status_requests": len(self.latency), "refused_429": self.waits}
        return counts | asked | percentiles | {"seconds": round(self.seconds, 2)}


def load(url: str, jobs: int, clients: int, *, patience: float = 300.0) -> Tally:
    """Submit the jobs and follow each to its end."""
    tally, numbers = Tally(), itertools.count()
    deadline = time.monotonic() + patience

    def client(_: int) -> None:
        with httpx.Client(base_url=url, timeout=30, trust_env=False) as http:
            while (number := next(numbers)) < jobs and time.monotonic() < deadline:
                follow(http, number, tally, deadline)

    started = time.perf_counter()
    with ThreadPoolExecutor(clients) as pool:
        list(pool.map(client, range(clients)))
    tally.seconds = time.perf_counter() - started
    return tally


def follow(http: httpx.Client, number: int, tally: Tally, deadline: float) -> None:
    """Follow one job from its request to its video."""
    prompt, cancelled = f"job number {number}", number % 10 == 3
    task = number % 2
    while (answer := submit(http, number, prompt)).status_code == 429:
        tally.waits += 1
        if time.monotonic() > deadline:
            tally.wrong.append(f"{prompt} was never taken")
            return
        time.sleep(random.uniform(0.2, 0.8))
    if answer.status_code != 200:
        tally.wrong.append(f"{prompt}: {answer.text}")
        return
    id = answer.json()["task_id" if task else "id"]
    tally.ids.append(id)
    if cancelled:
        while http.delete(f"/v1/{'tasks' if task else 'videos'}/{id}").status_code == 429:
            time.sleep(random.uniform(0.2, 0.8))
    status = ""
    while status not in ("completed", "failed", "cancelled", "interrupted"):
        if time.monotonic() > deadline:
            tally.wrong.append(f"{prompt} is stuck: {status}")
            return
        asked = time.perf_counter()
        found = http.get(f"/v1/tasks/{id}/status" if task else f"/v1/videos/{id}")
        tally.latency.append(time.perf_counter() - asked)
        status = found.json()["status"]
        time.sleep(0.02)
    tally.ends[id] = status
    content = http.get(f"/v1/videos/{id}/content")
    expected = (200,) if status == "completed" else (404,)
    if content.status_code not in expected or (status != "completed" and not cancelled):
        tally.wrong.append(f"{prompt}: {status}, content {content.status_code}")
    if status == "completed" and http.get(f"/v1/videos/{id}").json()["prompt"] != prompt:
        tally.wrong.append(f"{prompt} got another's video")


def submit(http: httpx.Client, number: int, prompt: str) -> httpx.Response:
    """Submit a job in one of the four ways."""
    if number % 2:
        body = {
            "prompt": prompt,
            "target_shape": [64, 64],
            "target_video_length": 5,
            "save_result_path": f"./{number}.mp4",
        }
        if number % 4 == 1:
            return http.post("/v1/tasks/video/", json=body)
        return http.post(
            "/v1/tasks/video/form", files={key: (None, json.dumps(value).strip('"')) for key, value in body.items()}
        )
    body = {"prompt": prompt, **SMALL, "seed": number}
    if number % 4 == 0:
        return http.post("/v1/videos", json=body)
    return http.post("/v1/videos", files={key: (None, str(value)) for key, value in body.items()})


@dataclass(frozen=True)
class Stub:
    """An engine that takes twenty milliseconds and writes its request's prompt."""

    def exchange(self, config: Any, **_: Any) -> bool:
        return False

    def release(self) -> None:
        pass

    def run(
        self, request: Any, *, save_result_path: Path, on_progress: Callable[[Any], None], cancel: Any, steps: Any
    ) -> Stub:
        from lightx2v.progress import Progress

        for step in range(1, 5):
            cancel.check()
            time.sleep(0.005)
            on_progress(Progress(stage="denoise", step=step, total=4))
        save_result_path.write_text(request.prompt)
        return self

    def report(self) -> dict[str, Any]:
        return {"timings": {"total": 0.02, "seconds": {}, "peak_vram": None}}

    def close(self) -> None:
        pass


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", choices=("stub", "demo"), default="stub")
    parser.add_argument("--jobs", type=int, default=200)
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--serve", metavar="PORT FOLDER", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        from lightx2v.server.command import load as load_engine
        from lightx2v.server.command import main as serve

        port, folder = options.serve
        flags = ["--preset", DEMO, "--port", port, "--output_dir", folder]
        return serve(flags, open_engine=load_engine if options.engine == "demo" else lambda *given, **more: Stub())
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps({"engine": options.engine, "clients": options.clients} | measured(options, folder), indent=2))
    return 0


def measured(options: argparse.Namespace, folder: str) -> dict[str, Any]:
    """Start the server, load it, stop it."""
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    line = [sys.executable, "-m", "benchmarks.server_load", "--engine", options.engine, "--serve", port, folder]
    with (Path(folder) / "log").open("w") as log:
        server = subprocess.Popen(line, stdout=log, stderr=log)
        try:
            url = f"http://127.0.0.1:{port}"
            with httpx.Client(base_url=url, trust_env=False) as http:
                while not ready(http):
                    assert server.poll() is None, (Path(folder) / "log").read_text()
                    time.sleep(0.1)
                tally = load(url, options.jobs, options.clients)
                known = http.get("/v1/service/status").json()["total_tasks"]
        finally:
            server.terminate()
            server.wait(30)
    return tally.report() | {"known_to_the_server": known, "faults": tally.wrong[:5]}


def ready(http: httpx.Client) -> bool:
    try:
        return http.get("/ready").status_code == 200
    except httpx.TransportError:
        return False


if __name__ == "__main__":
    sys.exit(main())
