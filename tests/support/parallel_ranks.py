"""Process groups on the CPU for tests, started as torchrun starts them.

    results = group(2).call(case, 1, 2)          connected processes, which stay for the next case
    ends = Running(2, case, str(folder)).ended() new processes, until they end: exit codes and output

A case is a function that all processes call with the same arguments. They are forked from a server that has already
imported everything, so they start within a tenth of a second.
"""

from __future__ import annotations

import atexit
import functools
import gc
import multiprocessing
import os
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest import mock

from patience import free_port

ROOT = Path(__file__).parents[2]
IMPORTS = [
    *("parallel_parts", "parallel_runs", "parallel_troubles", "parallel_front_ends"),
    *("ftfy", "tokenizers", "lightx2v.models.umt5_stack", "imageio_ffmpeg"),
]
PATIENCE = 120.0
"""Longest seconds for one case. Only a failing test waits so long."""


def environment(**more: object) -> dict[str, str]:
    """One thread each, no GPU, and this project's modules."""
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests" / "support")])
    fixed = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": path}
    return os.environ | fixed | {name: str(value) for name, value in more.items()}


def place(rank: int, size: int, port: int) -> dict[str, object]:
    """The variables that a launcher sets for each of its processes."""
    whole = {"WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return {"RANK": rank, "LOCAL_RANK": rank} | whole


@functools.cache
def _context() -> Any:
    """Start the server from which processes are forked. It has no threads, so forking is safe."""
    multiprocessing.set_forkserver_preload(IMPORTS)
    with mock.patch.dict(os.environ, environment()):
        forkserver.ensure_running()
    return multiprocessing.get_context("forkserver")


def tiny_models(folder: Path) -> Path:
    """Two models with four heads and an input image, for `parallel_runs.requests_of`."""
    import numpy as np
    from PIL import Image
    from tiny import DiTSizes, build_tiny

    sizes = DiTSizes(dim=48, num_heads=4)
    build_tiny(folder / "t2v", "t2v", dit=sizes)
    build_tiny(folder / "i2v", "i2v", dit=sizes, seed=10)
    pixels = np.random.default_rng(0).integers(0, 256, (96, 80, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / "first.png")
    return folder


class Group:
    """Connected processes that call one case after another."""

    def __init__(self, size: int) -> None:
        port, self.pipes, self.processes = free_port(), [], []
        for rank in range(size):
            here, there = _context().Pipe()
            process = _context().Process(target=_serve, args=(place(rank, size, port), there), daemon=True)
            process.start()
            there.close()
            self.pipes.append(here)
            self.processes.append(process)

    def call(self, case: Callable[..., Any], *arguments: Any) -> list[Any]:
        """The case's result in each process. AssertionError with the traceback of the first that fails."""
        deadline = time.monotonic() + PATIENCE
        for pipe in self.pipes:
            pipe.send((case, arguments))
        answers: list[Any] = []
        for rank, pipe in enumerate(self.pipes):
            try:
                answers.append(pipe.recv() if pipe.poll(max(0.0, deadline - time.monotonic())) else ("no answer", None))
            except EOFError:
                answers.append(("ended", None))
            if answers[-1][0]:
                self.end()
                raise AssertionError(f"rank {rank}: {answers[-1][0]}")
        return [result for _, result in answers]

    def end(self) -> None:
        group.cache_clear()
        for process in self.processes:
            process.kill()
            process.join()


@functools.cache
def group(size: int) -> Group:
    return Group(size)


def _begin(variables: dict[str, object]) -> None:
    os.environ.update({name: str(value) for name, value in variables.items()})
    gc.freeze()  # garbage collection need not visit the imported modules


def _serve(variables: dict[str, object], pipe: Connection) -> None:
    _begin(variables)
    while True:
        try:
            case, arguments = pipe.recv()
        except EOFError:
            return
        try:
            pipe.send(("", case(*arguments)))
        except BaseException:
            pipe.send((traceback.format_exc(), None))


@dataclass(frozen=True)
class Ended:
    code: int | None
    output: str


class Running:
    """The case in new processes, as torchrun starts them: with a store that outlives them all."""

    def __init__(self, size: int, case: Callable[..., Any], *arguments: Any) -> None:
        import torch.distributed as dist

        port, self._folder = free_port(), TemporaryDirectory()
        self._store = dist.TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)
        self._processes = []
        for rank in range(size):
            variables = place(rank, size, port) | {"TORCHELASTIC_USE_AGENT_STORE": True}
            Path(self._file(rank)).touch()
            argument = (variables, self._file(rank), case, arguments)
            self._processes.append(_context().Process(target=_run, args=argument, daemon=True))
            self._processes[-1].start()

    def _file(self, rank: int) -> str:
        return str(Path(self._folder.name) / str(rank))

    def wait_for(self, rank: int) -> None:
        self._processes[rank].join(PATIENCE)

    def wait_for_output(self, rank: int, word: str) -> None:
        deadline = time.monotonic() + PATIENCE
        while word not in Path(self._file(rank)).read_text():
            assert time.monotonic() < deadline and self._processes[rank].is_alive(), f"{rank} has not printed {word}"
            time.sleep(0.05)

    def signal(self, rank: int, number: int) -> None:
        if self._processes[rank].is_alive():
            os.kill(self._processes[rank].pid, number)

    @property
    def alive(self) -> bool:
        return all(process.is_alive() for process in self._processes)

    @property
    def pids(self) -> list[int]:
        return [process.pid for process in self._processes]

    def ended(self) -> list[Ended]:
        """Wait for all of them. A process that does not end has no exit code."""
        deadline = time.monotonic() + PATIENCE
        for process in self._processes:
            process.join(max(0.0, deadline - time.monotonic()))
        codes = [process.exitcode for process in self._processes]
        for process in self._processes:
            process.kill()
            process.join()
        outputs = [Path(self._file(rank)).read_text() for rank in range(len(codes))]
        self._folder.cleanup()
        return [Ended(*end) for end in zip(codes, outputs, strict=True)]


def _run(variables: dict[str, object], file: str, case: Callable[..., Any], arguments: Any) -> None:
    """Run the case like a program: with its output in a file, and its exit functions at the end."""
    _begin(variables)
    for number in (1, 2):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
    code = 0
    try:
        code = case(*arguments) or 0
    except SystemExit as end:
        code = int(end.code or 0)
    except BaseException:
        traceback.print_exc()
        code = 1
    atexit._run_exitfuncs()
    os._exit(code)


def under_torchrun(case: Callable[..., Any], *arguments: Any) -> None:
    """Start two processes like `torchrun --nproc_per_node=2 --max-restarts=1`, with the case instead of a program."""
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    multiprocessing.current_process()._config["daemon"] = False  # a daemon may not have children
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        os.environ.pop(name, None)
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=2,
        max_restarts=1,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        run_id="tests",
        monitor_interval=0.1,
        start_method="fork",
    )
    elastic_launch(config, program)(case, *arguments)


def program(case: Callable[..., Any], *arguments: Any) -> None:
    code = case(*arguments)
    atexit._run_exitfuncs()  # a forked process ends without them
    if code:
        os._exit(code)
