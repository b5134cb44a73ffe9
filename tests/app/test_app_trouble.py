"""The page on a machine with a problem: it reports it in one sentence with the remedy, and ends or continues.

Covered: an unavailable port or address, an unreadable key file, a closed output pipe, two signals at once.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from patience import PATIENCE, free_port
from studio_app import ROOT, launched

pytestmark = pytest.mark.multi

pytestmark = pytest.mark.slow

PAINTED = (sys.executable, str(ROOT / "tests" / "support" / "painted_app.py"))


def ends(folder: Path, *flags: str) -> tuple[int, str]:
    """The exit code of a page that does not start, and its whole output."""
    environment = {**os.environ, "LIGHTX2V_OUTPUT_DIR": str(folder)}
    done = subprocess.run(
        [*PAINTED, *flags], capture_output=True, text=True, timeout=PATIENCE, env=environment, cwd=ROOT, check=False
    )
    return done.returncode, done.stdout + done.stderr


@contextmanager
def taken_port() -> Iterator[int]:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        yield int(other.getsockname()[1])


def test_a_taken_port_is_reported(tmp_path: Path) -> None:
    with taken_port() as port:
        code, said = ends(tmp_path, "--port", str(port))
    expected = f"error: Cannot listen on 127.0.0.1:{port}: Address already in use. Choose another --port."
    assert code == 2 and said.strip() == expected


@pytest.mark.parametrize("port", ["99999", "-1"])
def test_an_invalid_port_is_reported(tmp_path: Path, port: str) -> None:
    code, said = ends(tmp_path, "--port", port)
    assert code == 2 and "Choose another --port." in said and len(said.splitlines()) == 1


def test_an_address_of_another_machine_is_reported_at_once(tmp_path: Path) -> None:
    code, said = ends(tmp_path, "--host", "192.0.2.1", "--public")
    assert code == 2 and said.startswith("error: Cannot listen on 192.0.2.1: ") and len(said.splitlines()) == 1


@pytest.mark.parametrize(("given", "used"), [({}, "PASSIVE"), ({"OMP_WAIT_POLICY": "ACTIVE"}, "ACTIVE")])
def test_threads_wait_passively_unless_the_environment_says_otherwise(
    tmp_path: Path, given: dict[str, str], used: str
) -> None:
    """torch reads the variable once, on import."""
    script = "import os, pathlib, sys; from app import main; main.prepare_environment(pathlib.Path(sys.argv[1]));"
    script += "print(os.environ['OMP_WAIT_POLICY'], 'torch' in sys.modules)"
    environment = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"} | given
    command = [sys.executable, "-c", script, str(tmp_path)]
    assert subprocess.check_output(command, text=True, env=environment, cwd=ROOT).split() == [used, "False"]


@pytest.mark.parametrize("content", [None, b"\xff\xfe"], ids=["folder", "no text"])
def test_an_unreadable_key_file_is_reported(tmp_path: Path, content: bytes | None) -> None:
    key = tmp_path / "browser.key"
    key.mkdir() if content is None else key.write_bytes(content)
    code, said = ends(tmp_path, "--port", str(free_port()))
    assert code == 1 and len(said.splitlines()) == 1, said
    assert "Could not read or write" in said and "browser.key" in said and "Move it away" in said
    assert str(tmp_path) not in said


def test_a_closed_output_pipe_causes_no_traceback(tmp_path: Path) -> None:
    """python app.py | head -1"""
    command = [*PAINTED, "--port", str(free_port())]
    environment = {**os.environ, "LIGHTX2V_OUTPUT_DIR": str(tmp_path), "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, cwd=ROOT
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        assert "LightX2V Studio is on" in process.stdout.readline()
        process.stdout.close()
        process.send_signal(signal.SIGTERM)
        said = process.stderr.read()
        assert process.wait(PATIENCE) == 143 and "Traceback" not in said and "BrokenPipe" not in said, said


@pytest.mark.slow
def test_two_signals_at_once_count_as_one(tmp_path: Path) -> None:
    with launched(tmp_path / "out") as opened:
        id = opened.ask("generate", prompt="an endless run")["id"]
        opened.wait(id, "running")
        for _ in range(2):
            opened.process.send_signal(signal.SIGTERM)
        assert opened.process.wait(PATIENCE) == 143 and "Traceback" not in opened.said, opened.said
    with launched(tmp_path / "out") as opened:
        assert opened.wait(id, "running")
