"""Terminal output of the command lines: a progress line and log lines, on standard error.

Standard output is for results.
"""

import array
import logging
import os
import select
import shutil
import stat
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

from ..errors import one_line
from ..progress import BYTES, Progress

BAR = 24
PLAIN_EVERY = 5.0
"""Seconds between two plain lines within one stage, so that steps do not fill a log file."""


PATIENCE = 5.0
"""Seconds that a result or an error waits for somebody to read it."""
HALF_PIPE = 32 * 1024


class ProgressLine:
    """Shows progress events: one line that is redrawn on a terminal, elsewhere a new line per stage and few seconds."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._on_terminal = stream.isatty()
        self._shown = ""
        self._stage: tuple[str, str | None] | None = None
        self._last = 0.0

    def __call__(self, event: Progress) -> None:
        line = progress_text(event)
        if self._on_terminal:
            self.clear()
            self._shown = line[: shutil.get_terminal_size().columns - 1]
            self._write(self._shown)
            return
        now, stage = time.monotonic(), (event.stage, event.expert)
        finished = 0 < event.total == event.step
        if stage != self._stage or finished or now - self._last >= PLAIN_EVERY:
            self._stage, self._last = stage, now
            self._write(line + "\n")

    def clear(self) -> None:
        """Erase the line from the terminal, so that other output can take its place."""
        if self._shown:
            self._write("\r\x1b[K")
            self._shown = ""

    def finish(self, text: str) -> None:
        """Erase the line and write `text` in its place, if there is any."""
        self.clear()
        if text and takes_lines(self._stream, PATIENCE):
            self._stream.write(text + "\n")
            self._stream.flush()

    def _write(self, text: str) -> None:
        """Progress never waits for a reader, and leaves half of a pipe's room to what matters more."""
        if takes_lines(self._stream) and _unread(self._stream) < HALF_PIPE:
            self._stream.write(text)
            self._stream.flush()


def takes_lines(stream: TextIO, seconds: float = 0.0) -> bool:
    """Whether `stream` takes some lines within `seconds`. A write to a full pipe that nobody reads never returns."""
    try:
        ready = select.poll()
        ready.register(stream.fileno(), select.POLLOUT)
    except (OSError, ValueError, AttributeError):  # no file, or a closed one; Windows has no poll
        return True
    return bool(ready.poll(1000 * seconds))


def _unread(stream: TextIO) -> int:
    """The bytes that wait in a pipe; 0 for anything else."""
    try:
        if not stat.S_ISFIFO(os.fstat(stream.fileno()).st_mode):
            return 0
        import fcntl
        import termios

        count = array.array("i", [0])
        fcntl.ioctl(stream.fileno(), termios.FIONREAD, count)
        return count[0]
    except (OSError, ValueError, ImportError):
        return 0


def progress_text(event: Progress) -> str:
    """One event as a line: stage, bar, step n/m, time so far, time left, memory, message."""
    name = f"{event.stage} {event.expert}" if event.expert else event.stage
    parts = [f"{name:<13}"]
    if event.total:
        filled = BAR * event.step // event.total
        # Of a stage that counts bytes show a percentage: its message has the byte counts.
        count = f"{100 * event.step // event.total} %" if event.stage in BYTES else f"{event.step}/{event.total}"
        parts.append(f"[{'#' * filled}{'.' * (BAR - filled)}] {count}")
    parts.append(clock_time(event.seconds))
    if event.eta is not None and round(event.eta) > 0:
        parts.append(f"{clock_time(event.eta)} left")
    if event.vram_peak:
        parts.append(f"{event.vram_peak / 2**30:.1f} GiB")
    if event.message:
        parts.append(one_line(event.message))
    return "  ".join(parts)


def clock_time(seconds: float) -> str:
    """1:05, or 1:01:05 from one hour on."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


@contextmanager
def logging_to(stream: TextIO, line: ProgressLine, level: int, *, prefix: str = "") -> Iterator[None]:
    """Write this package's log to `stream` while the block runs, each record on a line of its own above the bar.

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
    """Write this package's log to standard error from now on, for a script that has set up no log of its own."""
    logger = logging.getLogger("lightx2v")
    if not logger.hasHandlers():
        logger.addHandler(_Handler(sys.stderr, ProgressLine(sys.stderr), prefix))
        logger.setLevel(logging.INFO)


class _Handler(logging.StreamHandler[TextIO]):
    def __init__(self, stream: TextIO, line: ProgressLine, prefix: str) -> None:
        super().__init__(stream)
        self._line = line
        self._patience = 1.0
        self.setFormatter(_Formatter(f"%(asctime)s %(levelname)-7s {prefix}%(message)s", "%H:%M:%S"))

    def emit(self, record: logging.LogRecord) -> None:
        if takes_lines(self.stream, self._patience):
            self._patience = 1.0
            self._line.clear()
            super().emit(record)
        else:  # nobody reads: wait once, not for every record
            self._patience = 0.0


class _Formatter(logging.Formatter):
    def formatMessage(self, record: logging.LogRecord) -> str:
        record.message = one_line(record.message)
        return super().formatMessage(record)
