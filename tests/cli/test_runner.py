"""What the runner of command lines does with a body's end: exit codes, messages, logs and signals."""

from __future__ import annotations

import argparse
import logging
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from lightx2v.cli.parser import ArgumentParser
from lightx2v.cli.runner import Body, CommandContext, run_command
from lightx2v.config.model_paths import PROJECT
from lightx2v.errors import Cancelled, ConfigError, OutOfMemory

log = logging.getLogger("lightx2v.test")


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)


def run(body: Body, *argv: str, stopped: str = "") -> int:
    parser = ArgumentParser(prog="program")
    parser.add_argument("--verbose", action="store_true")
    parser.add_argument("--count", type=int, default=0)
    return run_command(parser, body, argv, stopped=stopped)


def raising(error: BaseException) -> Body:
    def body(options: argparse.Namespace, context: CommandContext) -> int:
        raise error

    return body


def test_a_body_gets_its_flags_and_returns_the_exit_code() -> None:
    assert run(lambda options, context: options.count, "--count", "7") == 7


@pytest.mark.parametrize(("argv", "code"), [(["--help"], 0), (["--count", "x"], 2), (["--cuont", "1"], 2)])
def test_help_and_wrong_flags_run_nothing(argv: list[str], code: int) -> None:
    assert run(raising(AssertionError("it ran")), *argv) == code


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (ConfigError("A key is wrong."), 2, "error: A key is wrong.\n"),
        (OutOfMemory("No memory."), 1, "error: No memory.\n"),
        (Cancelled("Stop."), 130, "Stopped early.\n"),
        (KeyboardInterrupt(), 130, "Stopped early.\n"),
    ],
)
def test_an_error_ends_with_its_code_and_one_line(
    error: BaseException, code: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(raising(error), stopped="Stopped early.") == code
    assert capsys.readouterr().err == message


def test_the_exit_code_of_a_signal_is_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    def body(options: argparse.Namespace, context: CommandContext) -> int:
        with context.interrupts.cancelling() as token:
            os.kill(os.getpid(), signal.SIGTERM)
            token.check()
        return 0

    assert run(body) == 143
    assert capsys.readouterr().err == ""


def test_only_rank_0_prints_the_error_and_every_log_line_names_its_rank(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def body(options: argparse.Namespace, context: CommandContext) -> int:
        log.info("loading")
        raise OutOfMemory("No memory.")

    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank, printed in (("0", 1), ("1", 0)):
        monkeypatch.setenv("RANK", rank)
        assert run(body) == 1
        errors = capsys.readouterr().err
        assert f"INFO    [rank {rank}] loading\n" in errors and errors.count("error: No memory.") == printed


def test_environment_variables_that_make_no_sense_are_an_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "first")
    assert run(raising(AssertionError("it ran"))) == 2
    assert capsys.readouterr().err.startswith("error: The environment variable RANK is 'first'")


def test_verbose_shows_the_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(raising(OutOfMemory("No memory.")), "--verbose") == 1
    assert "Traceback (most recent call last)" in capsys.readouterr().err


def test_a_reader_that_leaves_ends_the_program_quietly(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(
        "import sys\n"
        "from lightx2v.cli.parser import ArgumentParser\n"
        "from lightx2v.cli.runner import run_command\n"
        "def body(options, context):\n"
        "    for number in range(200_000):\n"
        "        print(number)\n"
        "    return 0\n"
        "sys.exit(run_command(ArgumentParser(), body, []))\n"
    )
    process = subprocess.Popen(
        [sys.executable, program],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(PROJECT)},
    )
    assert process.stdout is not None and process.stderr is not None
    process.stdout.readline()
    process.stdout.close()
    errors = process.stderr.read()
    process.stderr.close()
    assert process.wait(60) == 1 and errors == b""


ENDING = """
import argparse, atexit, gc, sys
atexit.register(lambda: print("frozen", gc.get_freeze_count() > 1000))
from lightx2v.cli.parser import ArgumentParser
from lightx2v.cli.runner import leave_at_exit, run_command
def body(options, context):
    print("worked")
    if sys.argv[1] == "stuck":
        leave_at_exit(143)
    return 0
sys.exit(run_command(ArgumentParser(), body, []))
"""


def test_the_interpreter_does_not_search_for_garbage_at_its_end() -> None:
    """With torch loaded it would take 2 to 4 seconds, and container runtimes kill after ten."""
    done = subprocess.run(
        [sys.executable, "-c", ENDING, "free"], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stdout) == (0, "worked\nfrozen True\n")


def test_a_thread_that_does_not_stop_leaves_the_exit_code() -> None:
    done = subprocess.run(
        [sys.executable, "-c", ENDING, "stuck"], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stdout) == (143, "worked\n")
