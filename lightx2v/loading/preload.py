"""Import slow packages in a thread while the program does something else.

torch takes seconds to import on a small machine. A program that will load a model calls `start` at its own start;
loading then waits only for the rest.
"""

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from ..background import Background

SWITCH = 0.0005
"""Seconds after which a thread that computes lets another one of this program go on, while a model loads."""


def start() -> Background:
    """Start importing the packages that loading a model needs. May be called again; loading reports a failure."""
    return Background(_import, "lightx2v-preload")


def _import(_: threading.Event) -> None:
    try:
        from ..models.umt5 import preload

        preload()
    except ImportError:
        pass  # loading a model imports the same and names the missing package


@contextmanager
def in_turns() -> Iterator[None]:
    """Inside, threads take shorter turns: an import computes all the time, and at Python's usual 5 ms each piece that
    another thread reads would wait for it several times, longer than the reading takes."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(SWITCH)
    try:
        yield
    finally:
        sys.setswitchinterval(before)
