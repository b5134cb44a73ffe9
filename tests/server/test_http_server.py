"""Connections are bounded below the limit of open files: half-open ones make room, and the log stays short."""

from __future__ import annotations

import logging
import os
import re
import resource
import socket
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import httpx
import pytest
from patience import PATIENCE, eventually, free_port

from lightx2v.server.http_server import FOR_WORK, NO_ROOM, RareLines, room_for_connections

ROOT = Path(__file__).parents[2]

SERVE = """
import resource, sys
sys.path[:0] = sys.argv[3:]
from fake_engine import Garage
from lightx2v.server import command
resource.setrlimit(resource.RLIMIT_NOFILE, (int(sys.argv[2]), int(sys.argv[2])))
flags = ["--preset", "demo_t2v_distill_lora", "--port", sys.argv[1], "--output_dir", "out"]
sys.exit(command.main(flags, open_engine=Garage()))
"""


@pytest.mark.slow
@pytest.mark.parametrize("files", [32, 64, 128])
def test_half_open_connections_keep_nobody_out_and_the_log_short(files: int, tmp_path: Path) -> None:
    port = free_port()
    command = [sys.executable, "-c", SERVE, str(port), str(files), str(ROOT), str(ROOT / "tests" / "support")]
    log = tmp_path / "log"
    with log.open("w") as output, ExitStack() as half_open:
        server = subprocess.Popen(command, cwd=tmp_path, stdout=output, stderr=output)
        try:
            url = f"http://127.0.0.1:{port}"

            def health() -> int:
                try:
                    return httpx.get(f"{url}/health", trust_env=False, timeout=10).status_code
                except httpx.TransportError:
                    return 0

            eventually(lambda: health() == 200 or server.poll() is not None)
            for _ in range(3):
                for _ in range(40):
                    half_open.enter_context(socket.create_connection(("127.0.0.1", port), PATIENCE))
                assert eventually(health) == 200
            job = httpx.post(f"{url}/v1/videos", json={"prompt": "a"}, trust_env=False).json()
            half_open.close()
            assert eventually(health) == 200 and job["id"]
        finally:
            server.terminate()
            assert server.wait(PATIENCE) == 143
    said = [line for line in log.read_text().splitlines() if "INFO" not in line]
    assert len(said) <= 5, said


def test_the_room_is_what_the_system_leaves() -> None:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    room = room_for_connections()
    limit, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    assert limit == max(before[0], min(4096, most))
    assert room == pytest.approx(limit - FOR_WORK - len(os.listdir("/dev/fd")), abs=2)


def test_one_line_a_second_says_that_there_is_no_room() -> None:
    log, lines = logging.Logger("asyncio"), []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(logging.Formatter().format(record))  # type: ignore[method-assign]
    log.addHandler(handler)
    log.addFilter(RareLines())
    for _ in range(2000):
        log.error(f"{NO_ROOM}\nsocket: <socket>", exc_info=OSError(24, "Too many open files"))
    log.error("another matter")
    assert (
        len(lines) == 2 and re.fullmatch("Too many open files: .*ulimit -n.", lines[0]) and lines[1] == "another matter"
    )
