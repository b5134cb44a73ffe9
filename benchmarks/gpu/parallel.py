"""Several GPUs for one video: equality of results, speed, and the end of the group when a process is killed.

ranks.py holds what the processes measure. torchrun starts it on four devices and then on two; meanwhile a process of
another group is killed on the free devices. With three devices two are used.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from .bench import Bench

PATIENCE = 90.0
"""Seconds in which the group that is to be killed has begun to denoise."""


def run(bench: Bench) -> None:
    devices = torch.cuda.device_count() if bench.cuda else 4
    assert bench.cuda or bench.tiny, "full sizes need GPUs"
    if devices < 2:
        sys.exit(f"This section needs two GPUs or more; this machine has {devices}.")
    failed = []
    if start(bench, list(range(4 if devices >= 4 else 2)), largest=True).wait():
        failed.append("the largest group")
    if devices >= 4:
        two = start(bench, [0, 1], largest=False)
        kill(bench, [2, 3])
        if two.wait():
            failed.append("the group of two")
    else:
        kill(bench, [0, 1])
    if failed:
        sys.exit(f"Failed: {' and '.join(failed)}; see above.")


def torchrun(bench: Bench, devices: list[int], *command: str, **more: Any) -> subprocess.Popen[str]:
    """One process for each device; on a CPU, as many processes with one thread each."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    if bench.cuda:
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, devices))
    launcher = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={len(devices)}"]
    launcher += ["--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0"]  # several groups at a time
    return subprocess.Popen([*launcher, *command], env=environment, text=True, **more)


def start(bench: Bench, devices: list[int], *, largest: bool) -> subprocess.Popen[str]:
    settings = {"results": str(bench.results), "tiny": bench.tiny, "largest": largest}
    return torchrun(bench, devices, "-m", "benchmarks.gpu.ranks", json.dumps(settings))


def kill(bench: Bench, devices: list[int]) -> None:
    """Kill one process (-9) during its work; measure the seconds until the group has ended, and how it ended."""
    with tempfile.TemporaryDirectory() as folder:
        video = ["lightx2v.infer", "--preset", "demo_t2v_base", "--prompt", "a red ball", "--steps", "200"]
        video += ["--save_result_path", str(Path(folder) / "x.mp4")]
        for what, command in {"a demo video": video, "full-size forwards": ["benchmarks.gpu.forwards"]}.items():
            for who in (1, 0):
                said = Path(folder) / "said"
                with said.open("w") as output:
                    group = torchrun(bench, devices[:2], "-m", *command, stdout=output, stderr=output)
                    ranks = wait_until_it_denoises(group, said)
                    os.kill(ranks[who], signal.SIGKILL)
                    began = time.monotonic()
                    code = group.wait(PATIENCE)
                    seconds = time.monotonic() - began
                words = re.findall(r"error: (.*)", said.read_text("utf-8"))
                left = sum(Path(f"/proc/{pid}").exists() for pid in ranks)
                name = f"kill -9 of process {who}, {what}"
                bench.write(name, killed=who, work=what, seconds=seconds, code=code, left=left, told=words[:1])


def wait_until_it_denoises(group: subprocess.Popen[str], said: Path) -> list[int]:
    """The processes of the group, in the order of their ranks."""
    deadline = time.monotonic() + PATIENCE
    while "denoise" not in said.read_text("utf-8"):
        if time.monotonic() > deadline or group.poll() is not None:
            group.kill()
            sys.exit(f"The demo model does not run:\n{said.read_text('utf-8')}")
        time.sleep(0.05)
    time.sleep(0.5)
    children = Path(f"/proc/{group.pid}/task/{group.pid}/children").read_text().split()
    found = {}
    for child in map(int, children):
        variables = Path(f"/proc/{child}/environ").read_bytes().decode("utf-8", "replace").split("\0")
        found |= {variable: child for variable in variables if variable.startswith("RANK=")}
    return [found[f"RANK={rank}"] for rank in range(len(found))]
