"""HttpServer: uvicorn's server with open connections bounded below the limit of open files, and a quick end.

Every connection takes a file descriptor, also one that never sends a request. Without a free one a process can accept
no connection and open no file, and asyncio logs a traceback two thousand times a second. So the connection that has
waited longest without a request makes room for a new one.
"""

import contextlib
import logging
import os
import sys
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

import uvicorn

MAX_FILES = 4096
"""Open files that a process asks the system for, if it allows so many."""
FOR_WORK = 64
"""Descriptors that stay free, where there are enough, for videos, model files and SQLite."""
LOG_SECONDS = 1.0
NO_ROOM = "socket.accept() out of system resource"
"""asyncio's message when the process has no free descriptor."""


class HttpServer(uvicorn.Server):
    """Serves until a signal, which calls `on_signal` first: what is slow to stop does so while connections close."""

    def __init__(self, config: uvicorn.Config, on_signal: Callable[[], None]) -> None:
        room = room_for_connections()
        config.backlog = min(config.backlog, max(1, room // 4))  # as many are accepted before the bound counts them
        config.timeout_graceful_shutdown = 1
        super().__init__(config)
        self._room, self._on_signal = room, on_signal

    async def startup(self, sockets: Any = None) -> None:
        bound_connections(self.config, self._room)
        await super().startup(sockets)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self._on_signal()
        super().handle_exit(sig, frame)


def room_for_connections() -> int:
    """How many connections may be open at once beside this process's files. Raises the limit of open files first."""
    if sys.platform == "win32":
        return MAX_FILES
    import resource

    limit, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MAX_FILES if most == resource.RLIM_INFINITY else min(MAX_FILES, most)
    if limit < wanted:
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, most))
            limit = wanted
    free = limit - len(os.listdir("/dev/fd"))
    return max(2, free - min(FOR_WORK, free // 2))


def bound_connections(config: uvicorn.Config, room: int) -> None:
    """Let the server of a loaded `config` keep at most `room` connections open from now on, and repeat no log line."""
    kind: Any = config.http_protocol_class

    class Bounded(kind):  # type: ignore[misc]  # uvicorn chooses the protocol at run time
        def connection_made(self, transport: Any) -> None:
            self.since = time.monotonic()
            super().connection_made(transport)
            live = [other for other in self.connections if not other.transport.is_closing()]
            if len(live) > room:
                min(live, key=lambda other: (_is_busy(other), getattr(other, "since", 0.0))).transport.abort()

    config.http_protocol_class = Bounded
    for name in ("asyncio", "uvicorn.error"):
        logging.getLogger(name).addFilter(RareLines())


def _is_busy(connection: Any) -> bool:
    """Whether a request on this connection has no complete response yet."""
    cycle = getattr(connection, "cycle", None)
    return cycle is not None and not cycle.response_complete


class RareLines(logging.Filter):
    """Each message at most once a second, and without a traceback where no connection could be accepted."""

    def __init__(self) -> None:
        super().__init__()
        self._next: dict[str, float] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        text, now = record.getMessage().partition("\n")[0], time.monotonic()
        if now < self._next.get(text, 0.0):
            return False
        self._next = {known: time for known, time in self._next.items() if time > now} | {text: now + LOG_SECONDS}
        if text == NO_ROOM:
            record.msg, record.args = "Too many open files: new connections wait. Raise the limit with ulimit -n.", ()
            record.exc_info = record.exc_text = None
        return True
