"""A command line's manners: a bar on a terminal, plain lines anywhere else, log lines between them, and clean ends.

What is shown goes to standard error; standard output is for results.
"""

from __future__ import annotations

import io
import logging
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TextIO

from ..errors import Cancelled, LightX2VError
from ..progress import Progress
from .signals import Interrupts

log = logging.getLogger("lightx2v.terminal")

BAR = 24
PLAIN_EVERY = 5.0
"""Seconds between two plain lines within one stage: a log file should not fill with steps."""


class ProgressLine:
    """Draws progress events. Redrawn in place on a terminal; elsewhere a line for each stage and every few seconds."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._live = stream.isatty()
        self._shown = ""
        self._stage: tuple[str, str | None] | None = None
        self._last = 0.0

    def __call__(self, event: Progress) -> None:
        line = describe(event)
        if self._live:
            columns = shutil.get_terminal_size().columns - 1
            self.clear()
            self._shown = line[:columns]
            self._stream.write(self._shown)
            self._stream.flush()
            return
        now = time.monotonic()
        fresh = self._stage != (event.stage, event.expert)
        done = 0 < event.total == event.step
        if fresh or done or now - self._last >= PLAIN_EVERY:
            self._stage, self._last = (event.stage, event.expert), now
            self._stream.write(line + "\n")
            self._stream.flush()

    def clear(self) -> None:
        """Takes the bar off the terminal, so that something else can be written."""
        if self._shown:
            self._stream.write("\r\x1b[K")
            self._stream.flush()
            self._shown = ""

    def finish(self, text: str) -> None:
        """Ends the bar, with a line in its place if there is something to say."""
        self.clear()
        if text:
            self._stream.write(text + "\n")
            self._stream.flush()


def describe(event: Progress) -> str:
    """One event as a line: stage, bar, step n/m, time so far, time left, memory."""
    name = f"{event.stage} {event.expert}" if event.expert else event.stage
    parts = [f"{name:<13}"]
    if event.total:
        filled = BAR * event.step // event.total
        # Of a download, counted in bytes, the message has the numbers.
        count = f"{100 * event.step // event.total} %" if event.stage == "download" else f"{event.step}/{event.total}"
        parts.append(f"[{'#' * filled}{'.' * (BAR - filled)}] {count}")
    parts.append(clock(event.seconds))
    if event.eta is not None and round(event.eta) > 0:
        parts.append(f"{clock(event.eta)} left")
    if event.vram_peak:
        parts.append(f"{event.vram_peak / 2**30:.1f} GiB")
    if event.message:
        parts.append(one_line(event.message))
    return "  ".join(parts)


def clock(seconds: float) -> str:
    """1:05, or 1:01:05 for more than an hour."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def one_line(text: str) -> str:
    """`text` with its control characters escaped: no prompt can forge a second log line or drive the terminal."""
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


@contextmanager
def logging_to(stream: TextIO, line: ProgressLine, level: int, *, prefix: str = "") -> Iterator[None]:
    """Sends this package's log to `stream` while the block runs, each record on a line of its own above the bar.

    `prefix` names the process where there are several.
    """
    handler = _Handler(stream, line, prefix)
    handler.setLevel(level)
    logger = logging.getLogger("lightx2v")
    before = logger.level
    logger.addHandler(handler)
    logger.setLevel(level)
    try:
        yield
    finally:
        line.clear()
        logger.removeHandler(handler)
        logger.setLevel(before)


def log_to_stderr(*, prefix: str = "") -> None:
    """The same for a script that set up no log of its own: all that comes, from now on, on standard error."""
    logger = logging.getLogger("lightx2v")
    if not logger.hasHandlers():
        logger.addHandler(_Handler(sys.stderr, ProgressLine(sys.stderr), prefix))
        logger.setLevel(logging.INFO)


class _Handler(logging.StreamHandler[TextIO]):
    def __init__(self, stream: TextIO, line: ProgressLine, prefix: str) -> None:
        super().__init__(stream)
        self._line = line
        self.setFormatter(_Formatter(f"%(asctime)s %(levelname)-7s {prefix}%(message)s", "%H:%M:%S"))

    def emit(self, record: logging.LogRecord) -> None:
        self._line.clear()
        super().emit(record)


class _Formatter(logging.Formatter):
    def formatMessage(self, record: logging.LogRecord) -> str:
        record.message = one_line(record.message)
        return super().formatMessage(record)


def ended(
    call: Callable[[], int], line: ProgressLine, interrupts: Interrupts, *, stopped: str, tell: bool = True
) -> int:
    """The exit code of `call`, or of what ended it; `stopped` is said where that was the user. The `tell` of one of
    several processes is false: another says what all of them met."""
    if isinstance(sys.stdout, io.TextIOWrapper):  # a terminal without … or 球 is no reason to fail after the last step
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        return call()
    except (Cancelled, KeyboardInterrupt):
        code, said = interrupts.exit_code, stopped
    except LightX2VError as error:
        log.debug("Traceback:", exc_info=True)
        code, said = error.exit_code, f"error: {error}"
    except BrokenPipeError:  # `--list_presets | head`: the reader has left, and Python would still flush to it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    line.finish(said if tell else "")
    return code
