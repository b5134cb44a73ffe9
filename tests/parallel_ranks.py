"""Starts processes that form a world on the CPU, as torchrun would, and gives back what each of them returns.

    results = ranks(2, "parallel_cases:dit", folder, cfg_p_size=1, seq_p_size=2)

The function runs in every process and returns JSON types; its first argument is the world.
"""

from __future__ import annotations

import importlib
import json
import os
import socket
import subprocess
import sys
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

ROOT = Path(__file__).parents[1]


def environment(**more: object) -> dict[str, str]:
    """One thread each, this project's modules, and what torchrun sets besides."""
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    threads = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    return os.environ | threads | {"PYTHONPATH": path} | {name: str(value) for name, value in more.items()}


def place(rank: int, size: int, port: int) -> dict[str, str]:
    """The environment of one of `size` processes, as torchrun makes it."""
    return environment(
        RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=size, LOCAL_WORLD_SIZE=size, MASTER_ADDR="127.0.0.1", MASTER_PORT=port
    )


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@dataclass(frozen=True)
class Ended:
    code: int
    out: str
    errors: str


def run(size: int, command: list[str], timeout: float = 90) -> list[Ended]:
    """`command` of this Python in `size` processes that can meet, to its end; nothing is left running."""
    port = free_port()
    with ExitStack() as stack:
        outs, errors = ([stack.enter_context(TemporaryFile("w+")) for _ in range(size)] for _ in "ab")
        processes = [
            subprocess.Popen(
                [sys.executable, *command],
                env=place(rank, size, port),
                cwd=ROOT,
                stdout=outs[rank],
                stderr=errors[rank],
            )
            for rank in range(size)
        ]
        deadline = time.monotonic() + timeout
        try:
            for process in processes:
                process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            pass  # the exit codes will say so
        finally:
            for process in processes:
                process.kill()
                process.wait()
        for file in (*outs, *errors):
            file.seek(0)
        ends = zip(processes, outs, errors, strict=True)
        return [Ended(process.returncode, out.read(), error.read()) for process, out, error in ends]


def ranks(size: int, case: str, *arguments: Any) -> list[Any]:
    """What `case` ("module:function") returns in each of `size` processes. The last line it prints is that."""
    command = [str(Path(__file__)), case, json.dumps(arguments)]
    ends = run(size, command)
    failed = [f"rank {rank}: {end.code}: {end.errors[-3000:]}" for rank, end in enumerate(ends) if end.code]
    assert not failed, "\n".join(failed)
    return [json.loads(end.out.splitlines()[-1]) for end in ends]


if __name__ == "__main__":
    module, _, name = sys.argv[1].partition(":")
    result = getattr(importlib.import_module(module), name)(*json.loads(sys.argv[2]))
    sys.stdout.write("\n" + json.dumps(result) + "\n")
