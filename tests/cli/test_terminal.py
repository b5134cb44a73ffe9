from __future__ import annotations

import contextlib
import io
import logging
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from lightx2v.cli.signals import Interrupts
from lightx2v.cli.terminal import ProgressLine, clock_time, logging_to, progress_text
from lightx2v.config.model_paths import PROJECT
from lightx2v.errors import one_line
from lightx2v.progress import Progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def step(number: int, *, expert: str = "high", stage: str = "denoise") -> Progress:
    return Progress(stage=stage, step=number, total=4, expert=expert, seconds=65.4, eta=3661, vram_peak=3 << 29)


def test_a_line_shows_stage_step_time_and_memory() -> None:
    expected = "denoise high   [############............] 2/4  1:05  1:01:01 left  1.5 GiB"
    assert progress_text(step(2)) == expected
    assert progress_text(Progress(stage="load", seconds=2.0)) == "load           0:02"
    assert progress_text(Progress(stage="download", message="a\nb")).endswith("a\\nb")


@pytest.mark.parametrize(("seconds", "text"), [(0, "0:00"), (59.6, "1:00"), (3599, "59:59"), (3600, "1:00:00")])
def test_times_read_like_a_clock(seconds: float, text: str) -> None:
    assert clock_time(seconds) == text


def test_a_terminal_gets_one_line_that_is_redrawn() -> None:
    stream = Terminal()
    line = ProgressLine(stream)
    for number in range(1, 5):
        line(step(number))
    line.clear()
    text = stream.getvalue()
    assert "\n" not in text
    assert text.count("\r\x1b[K") == 4
    assert text.endswith("\r\x1b[K")


def test_a_bar_is_never_wider_than_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "20")
    stream = Terminal()
    ProgressLine(stream)(step(1))
    assert len(stream.getvalue()) == 19


def test_a_file_gets_a_plain_line_for_each_stage_and_no_control_characters() -> None:
    stream = io.StringIO()
    line = ProgressLine(stream)
    for number in (0, 1, 2):
        line(step(number))
    for number in (3, 4):
        line(step(number, expert="low"))
    lines = stream.getvalue().splitlines()
    assert [text.split()[1] for text in lines] == ["high", "low", "low"]
    assert lines[-1].split()[3] == "4/4"
    assert stream.getvalue().replace("\n", "").isprintable()


def test_text_cannot_forge_lines_or_control_the_terminal() -> None:
    assert one_line("a\nERROR b\r\x1b[2J\x85\u2028猫 🐈") == "a\\nERROR b\\r\\x1b[2J\\x85\\u2028猫 🐈"


def test_a_log_record_takes_one_line_above_the_bar() -> None:
    stream = Terminal()
    line = ProgressLine(stream)
    logger = logging.getLogger("lightx2v.test")
    with logging_to(stream, line, logging.INFO):
        line(step(1))
        logger.info("prompt %s", "a\n00:00:00 ERROR   forged")
        logger.debug("too much")
    logger.error("after")
    shown = stream.getvalue().split("\r\x1b[K")[1]
    assert shown.count("\n") == 1
    assert shown.endswith("INFO    prompt a\\n00:00:00 ERROR   forged\n")
    assert logging.getLogger("lightx2v").handlers == []


def send(number: signal.Signals) -> None:
    os.kill(os.getpid(), number)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_the_first_signal_asks_a_run_to_stop_and_the_second_stops_it(number: signal.Signals, code: int) -> None:
    before = signal.getsignal(number)
    with Interrupts() as interrupts:
        with interrupts.cancelling() as token:
            assert not token.cancelled
            send(number)
            assert token.cancelled
            with pytest.raises(KeyboardInterrupt):
                send(number)
        assert interrupts.exit_code == code
    assert signal.getsignal(number) is before


def test_a_signal_that_torchrun_repeats_counts_once() -> None:
    with Interrupts(echo=60.0) as interrupts, interrupts.cancelling() as token:
        send(signal.SIGINT)
        send(signal.SIGINT)
        send(signal.SIGTERM)
        assert token.cancelled and interrupts.exit_code == 130


def test_a_signal_outside_of_a_run_stops_at_once() -> None:
    with Interrupts() as interrupts, pytest.raises(KeyboardInterrupt):
        send(signal.SIGTERM)
    assert interrupts.token.cancelled


def test_the_exit_code_is_the_signals_even_inside_a_module_that_runs_python_from_c(tmp_path: Path) -> None:
    """torch is one while it is imported. A KeyboardInterrupt itself would make it 130 there."""
    program = """
        import ctypes, sys
        from lightx2v.cli.signals import Interrupts

        run = ctypes.pythonapi.PyRun_String
        run.restype = ctypes.py_object
        run.argtypes = (ctypes.c_char_p, ctypes.c_int, ctypes.py_object, ctypes.py_object)
        with Interrupts() as interrupts:
            try:
                run(b"import os, signal; os.kill(os.getpid(), signal.SIGTERM); list(range(1000))", 257, {}, {})
            except KeyboardInterrupt:
                sys.exit(interrupts.exit_code)
    """
    (tmp_path / "stopped.py").write_text(textwrap.dedent(program))
    environment = {**os.environ, "PYTHONPATH": f"{PROJECT}{os.pathsep}{tmp_path}"}
    done = subprocess.run([sys.executable, "-m", "stopped"], capture_output=True, env=environment, check=False)
    assert done.returncode == 143, done


PIPED = """
import argparse, logging, os, sys
from lightx2v.cli.parser import ArgumentParser
from lightx2v.cli.runner import run_command
from lightx2v.cli.terminal import takes_lines
from lightx2v.progress import Progress
log = logging.getLogger("lightx2v.test")
def body(options, context):
    for step in range(3000):
        context.progress(Progress(stage=f"stage {step}", step=step, total=3000, seconds=0.0))
        log.info("x" * 100)
    os.write(int(sys.argv[1]), b"worked")
    if takes_lines(sys.stdout, 0.5):
        print("result")
    return 0
sys.exit(run_command(ArgumentParser(), body, []))
"""


@pytest.mark.slow
@pytest.mark.parametrize("filled", [False, True])
def test_a_pipe_that_nobody_reads_does_not_stop_the_work(filled: bool) -> None:
    unread, pipe = os.pipe()
    told, tell = os.pipe()
    if filled:
        os.set_blocking(pipe, False)
        with contextlib.suppress(BlockingIOError):
            while os.write(pipe, bytes(4096)):
                pass
        os.set_blocking(pipe, True)
    done = subprocess.Popen(
        [sys.executable, "-c", PIPED, str(tell)], stdout=pipe, stderr=pipe, pass_fds=[tell], bufsize=0
    )
    assert done.wait(60) == 0
    assert os.read(told, 6) == b"worked"
    os.close(pipe)
    with open(unread, "rb") as reader:
        said = reader.read()
    assert filled or b"stage 1 " in said and len(said) <= 2**16
    os.close(told)
    os.close(tell)
