"""Waits for another thread or process, however busy the machine is."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable
from typing import Any

PATIENCE = 90.0
"""Seconds to wait for something that should take one. Only a failing test waits so long."""


def eventually(condition: Callable[[], Any]) -> Any:
    """Returns the first true value of `condition`; AssertionError after PATIENCE seconds."""
    deadline = time.monotonic() + PATIENCE
    while not (value := condition()):
        assert time.monotonic() < deadline, f"still {value!r} after {PATIENCE:.0f} s"
        time.sleep(0.01)
    return value


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
