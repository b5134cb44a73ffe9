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
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]


def environment(rank: int, size: int, port: int) -> dict[str, str]:
    """What torchrun sets."""
    more = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, "MASTER_PORT": port}
    threads = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "MASTER_ADDR": "127.0.0.1"}
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    return os.environ | {name: str(value) for name, value in more.items()} | threads | {"PYTHONPATH": path}


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def start(size: int, command: list[str], **more: Any) -> list[subprocess.Popen[str]]:
    """`command` of this Python in `size` processes that can meet."""
    port = free_port()
    return [
        subprocess.Popen(
            [sys.executable, *command],
            env=environment(rank, size, port),
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            **more,
        )
        for rank in range(size)
    ]


def finish(processes: list[subprocess.Popen[str]], timeout: float = 120) -> list[tuple[int, str, str]]:
    """Exit code, output and errors of each; nothing is left running."""
    try:
        ends = [process.communicate(timeout=timeout) for process in processes]
        return [(process.returncode, *end) for process, end in zip(processes, ends, strict=True)]
    finally:
        for process in processes:
            process.kill()
            process.wait()


def ranks(size: int, case: str, *arguments: Any) -> list[Any]:
    """What `case` ("module:function") returns in each of `size` processes. The last line it prints is that."""
    command = [str(Path(__file__)), case, json.dumps(arguments)]
    ends = finish(start(size, command))
    failed = [f"rank {rank}: {error[-3000:]}" for rank, (code, _, error) in enumerate(ends) if code]
    assert not failed, "\n".join(failed)
    return [json.loads(out.splitlines()[-1]) for _, out, _ in ends]


if __name__ == "__main__":
    module, _, name = sys.argv[1].partition(":")
    result = getattr(importlib.import_module(module), name)(*json.loads(sys.argv[2]))
    sys.stdout.write("\n" + json.dumps(result) + "\n")
