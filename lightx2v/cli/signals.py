"""Signals of a command line: the first Ctrl+C cancels the run, the second ends the process."""

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any, Self

from ..progress import CancelToken

ECHO = 3.0
"""Seconds in which torchrun repeats a signal (see Interrupts)."""


class Interrupted(KeyboardInterrupt):
    """Raised by a signal. Not KeyboardInterrupt itself: after one has passed through a module that runs Python from C,
    as torch does while it is imported, Python ends with Ctrl-C's exit code, whatever the program returns."""


class Interrupts:
    """Handles Ctrl-C and SIGTERM while the block runs.

    Inside `cancelling`, the first signal cancels the run, which then cleans up after itself. Anywhere else, and on the
    second signal, the handler raises a KeyboardInterrupt. Signals within `echo` seconds of the first one are ignored:
    torchrun passes on to its processes what the terminal has already sent them.
    """

    def __init__(self, *, echo: float = 0.0) -> None:
        self.token = CancelToken()
        self._echo = echo
        self._number = int(signal.SIGINT)
        self._first: float | None = None
        self._cancelling = False
        self._before: dict[signal.Signals, Any] = {}

    @property
    def exit_code(self) -> int:
        """A shell's exit code for a program that a signal ended: 130 or 143."""
        return 128 + self._number

    @contextmanager
    def cancelling(self) -> Iterator[CancelToken]:
        """While the block runs, the first signal only sets the token. The block must check it."""
        self._cancelling = True
        try:
            yield self.token
        finally:
            self._cancelling = False

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        now, first = time.monotonic(), self._first
        if first is not None and now - first < self._echo:
            return
        self._first, self._number = first or now, number
        self.token.suspend()
        if first is not None or not self._cancelling:
            raise Interrupted
