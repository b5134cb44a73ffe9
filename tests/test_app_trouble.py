"""The page on a machine with something in the way: it says in a sentence what, and what to do, and ends or goes on.

Covered: a port or address that cannot be had, a folder in use, files of its own folder that are none, a reader that
leaves, two signals at once.
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
from studio_app import ROOT, free_port, launched

PAINTED = (sys.executable, str(ROOT / "tests" / "painted_app.py"))


def ends(folder: Path, *flags: str) -> tuple[int, str]:
    """The exit code of a page that does not start, and all that it says."""
    environment = {**os.environ, "LIGHTX2V_OUTPUT_DIR": str(folder)}
    done = subprocess.run(
        [*PAINTED, *flags], capture_output=True, text=True, timeout=60, env=environment, cwd=ROOT, check=False
    )
    return done.returncode, done.stdout + done.stderr


@contextmanager
def taken_port() -> Iterator[int]:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        yield int(other.getsockname()[1])


def test_a_taken_port_is_told(tmp_path: Path) -> None:
    with taken_port() as port:
        code, said = ends(tmp_path, "--port", str(port))
    assert code == 2 and said.strip().endswith("cannot be listened on: Address already in use. Choose another --port.")


@pytest.mark.parametrize("port", ["99999", "-1"])
def test_a_port_that_there_is_not_is_told(tmp_path: Path, port: str) -> None:
    code, said = ends(tmp_path, "--port", port)
    assert code == 2 and "Choose another --port." in said and len(said.splitlines()) == 1


def test_an_address_of_another_machine_is_told_instead_of_being_tried_for_ever(tmp_path: Path) -> None:
    code, said = ends(tmp_path, "--host", "192.0.2.1", "--public")
    assert code == 2 and said.startswith("192.0.2.1 cannot be listened on") and len(said.splitlines()) == 1


@pytest.mark.parametrize("content", [None, b"\xff\xfe"], ids=["folder", "no text"])
def test_a_key_file_that_is_none_is_told(tmp_path: Path, content: bytes | None) -> None:
    key = tmp_path / "browser.key"
    key.mkdir() if content is None else key.write_bytes(content)
    code, said = ends(tmp_path, "--port", str(free_port()))
    assert code == 1 and len(said.splitlines()) == 1, said
    assert "browser.key cannot be read or written" in said and "Move it away" in said
    assert str(tmp_path) not in said


def test_a_reader_that_leaves_ends_nothing_and_leaves_no_traceback(tmp_path: Path) -> None:
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
        assert process.wait(30) == 143 and "Traceback" not in said and "BrokenPipe" not in said, said


def test_two_signals_at_once_end_it_as_one(tmp_path: Path) -> None:
    with launched(tmp_path / "out") as page:
        id = page.ask("generate", prompt="an endless run")["id"]
        page.wait(id, "running")
        for _ in range(2):
            page.process.send_signal(signal.SIGTERM)
        assert page.process.wait(60) == 143 and "Traceback" not in page.said, page.said
    with launched(tmp_path / "out") as page:
        assert page.ask("status", id=id)["state"] == "interrupted"
