"""Cases for the parallel tests: errors, cancels and kills on one of several processes."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from parallel_runs import digest, requests_of
from torch.distributed.rendezvous import rendezvous

from lightx2v.config.engine_config import EngineConfig, ParallelConfig
from lightx2v.config.environment import Environment
from lightx2v.config.lora_spec import LoraSpec
from lightx2v.config.request import Request
from lightx2v.errors import LightX2VError
from lightx2v.jobs.queue import JobManager
from lightx2v.models.dit import WanDiT
from lightx2v.models.vae import WanVAE
from lightx2v.parallel import heartbeat
from lightx2v.parallel.rendezvous import join
from lightx2v.pipeline import LightX2VPipeline
from lightx2v.progress import CancelToken, Progress
from lightx2v.weights import module_loader as stream


def mistakes(root: str) -> list[Any]:
    """User errors and cancels, which must end alike on both processes and not change the next run."""
    config, request = requests_of(Path(root))["base"]
    picture_config, pictured = requests_of(Path(root))["i2v"]
    ends: list[Any] = []
    rank = Environment.read().rank

    def attempt(request: Request, **more: Any) -> None:
        try:
            ends.append(digest(pipe.run(request, return_latents=True, **more).latents))
        except LightX2VError as error:
            ends.append([type(error).__name__, str(error)])

    def cancelled(stage: str, step: int, who: int, request: Request = request) -> None:
        """Process `who` cancels at this progress event. Also records the last denoising step here."""
        token, steps = CancelToken(), [-1]

        def seen(event: Progress) -> None:
            if event.stage == "denoise":
                steps.append(event.step)
            if (event.stage, event.step, rank) == (stage, step, who):
                token.cancel()

        attempt(request, cancel=token, on_progress=seen)
        ends[-1].append(steps[-1])

    stopped = CancelToken()
    if rank == 0:
        stopped.cancel()
    small = replace(config, parallel=ParallelConfig(seq_p_size=2), max_tokens=40)
    try:
        LightX2VPipeline.from_config(small, cancel=stopped)
    except LightX2VError as error:
        ends.append(type(error).__name__)
    with LightX2VPipeline.from_config(small) as pipe:
        attempt(request)
        attempt(replace(request, frames=9) if rank == 0 else request)
        attempt(request, save_result_path=Path(root) / "no folder" / "x.mp4")
        cancelled("text", 1, 0, replace(request, prompt="never", negative_prompt="seen"))
        cancelled("denoise", 0, 1)
        cancelled("denoise", 2, 0)
        cancelled("denoise", 1, 1)
        cancelled("decode", 1, 0)
        attempt(replace(request, loras=(LoraSpec(expert="high", path="missing.safetensors"),)))
        attempt(request)
        attempt(replace(request, seed=-1))
    with LightX2VPipeline.from_config(picture_config) as pipe:
        attempt(replace(pictured, image_path=str(Path(root) / "no picture.png")))
        attempt(pictured)
    try:
        LightX2VPipeline.from_config(replace(config, parallel=ParallelConfig(seq_p_size=4)))
    except LightX2VError as error:
        ends.append([type(error).__name__, str(error)])
    return ends


def starved(root: str, everybody: bool) -> list[Any]:
    """Memory runs out in a step, on both processes or on one; then the next run succeeds."""
    config, request = requests_of(Path(root))["base"]
    ends: list[Any] = []
    with LightX2VPipeline.from_config(config) as pipe:
        if everybody or Environment.read().rank == 1:
            fail_at(WanDiT, "forward", 2, starve)
        for _ in range(2):
            try:
                pipe.run(request)
                ends.append("made")
            except LightX2VError as error:
                ends.append(type(error).__name__)
    return ends


def black(root: str) -> list[Any]:
    """The rows of process 1 hold NaN in the second chunk of the first video; then the next run succeeds."""
    config, request = requests_of(Path(root))["base"]
    real = WanVAE.decode

    def decode(*arguments: Any, **more: Any) -> Iterator[torch.Tensor]:
        for index, part in enumerate(real(*arguments, **more)):
            yield part * torch.nan if index == 1 else part

    ends: list[Any] = []
    with LightX2VPipeline.from_config(config) as pipe:
        if Environment.read().rank == 1:
            WanVAE.decode = decode  # type: ignore[method-assign]
        for _ in range(2):
            try:
                pipe.run(request)
                ends.append("made")
            except LightX2VError as error:
                ends.append([type(error).__name__, str(error)[:24]])
            WanVAE.decode = real  # type: ignore[method-assign]
    return ends


def failing(root: str, how: str, where: str, who: int) -> None:
    """Process `who` fails during work of all processes, or while the others wait for a command."""
    config, request = requests_of(Path(root))["base"]
    if how == "stop" or where == "idle":
        heartbeat.SILENCE = 10.0  # instead of 15, for a shorter test
    means = {"raise": bug, "kill": kill, "stop": stop, "starve": starve, "exit": leave, "forge": forge}[how]
    if Environment.read().rank == who:
        if where == "meet":
            means()
        if where == "connect":
            fail_at(dist, "init_process_group", 1, means)
        if where in ("load", "denoise", "decode"):
            owner, name, times = {
                "load": (stream, "_place", 3),
                "denoise": (WanDiT, "forward", 2),
                "decode": (WanVAE, "_denormalise", 1),
            }[where]
            fail_at(owner, name, times, means)
    if where == "idle":
        group = join(Environment.read())
        group._store.set(f"idle/{group.rank}", "1")
        if group.rank == who:
            while not group._store.check([f"idle/{1 - who}"]):  # the other one has connected too
                time.sleep(0.02)
            means()
        if group.is_rank0:
            time.sleep(60)
        LightX2VPipeline.follow()
        return
    with LightX2VPipeline.from_config(config) as pipe:
        if where == "between" and Environment.read().rank == who:
            means()
        pipe.run(request)


def fail_at(owner: Any, name: str, times: int, means: Callable[[], None]) -> None:
    """Make the `times`th call fail."""
    real, calls = getattr(owner, name), []

    def failing(*arguments: Any, **more: Any) -> Any:
        calls.append(1)
        if len(calls) == times:
            means()
        return real(*arguments, **more)

    setattr(owner, name, failing)


def bug() -> None:
    raise ValueError("nobody thought of this")


def starve() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def stop() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def forge() -> None:
    """Another program writes into torchrun's store that a process has failed, and then this one really fails."""
    store, _, _ = next(iter(rendezvous("env://")))
    for key in ("failed", "beat/9"):
        store.set(f"lightx2v/0/heartbeat/{key}", '["ValueError on process 0: a stranger says so", ""]')
    time.sleep(3)  # the heartbeats look once a second
    bug()


def leave() -> None:
    raise SystemExit(0)


def queue(root: str) -> None:
    """Rank 0 works on a queue. At first, process 1 is killed in the second job and torchrun restarts the group."""
    environment = Environment.read()
    if environment.rank and not environment.restart_count:
        fail_at(WanDiT, "forward", 5, kill)
    if LightX2VPipeline.follow():
        return
    config, request = requests_of(Path(root))["base"]

    def open_engine(config: EngineConfig, **more: Any) -> LightX2VPipeline:
        return LightX2VPipeline.from_config(config, **more)

    manager = JobManager(open_engine, Path(root) / "queue")
    if not environment.restart_count:
        for seed in range(3):
            manager.submit(config, replace(request, seed=seed))
    jobs = [manager.wait(job.id, 60) for job in manager.list()]
    if not environment.restart_count:
        time.sleep(60)  # the heartbeat ends this process long before
    manager.close()
    (Path(root) / "queue.txt").write_text(" ".join(job.state for job in sorted(jobs, key=lambda job: job.request.seed)))
