"""Carrying out a plan: several files at a time, with progress for whoever waits, stopped within a moment.

The transfers run in an event loop in a thread of their own, where cancelling means closing the connections whatever
they are doing. The caller's thread waits, tells the progress and watches the cancel token.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import TypeVar

from ..config.engine_config import EngineConfig
from ..errors import byte_size
from ..progress import CancelToken, Meter
from .listing import Hub
from .plan import DownloadPlan, make_plan, missing
from .transfer import Transfer

log = logging.getLogger("lightx2v.hub")

T = TypeVar("T")

LOOK = 0.1
"""Seconds between two looks at the cancel token."""
TELL = 0.5
"""Seconds between two progress events."""
SPAN = 5.0
"""Seconds over which the speed is measured."""


def ensure(config: EngineConfig, *, meter: Meter, cancel: CancelToken | None = None, hub: Hub | None = None) -> None:
    """Fetches what `config` needs and this machine lacks; asks nobody where it lacks nothing.

    DownloadError says why that is not possible, Cancelled that somebody asked to stop.
    """
    if not missing(config):
        return
    hub = hub or Hub()
    with meter.stage("download"):
        meter.emit("download", message="Asking the Hub for the list of files.")
        plan = attended(lambda: make_plan(config, hub=hub), cancel)
        fetch(plan, meter=meter, cancel=cancel, hub=hub)


def fetch(plan: DownloadPlan, *, meter: Meter, cancel: CancelToken | None = None, hub: Hub | None = None) -> None:
    """Brings what `plan` lacks into the cache and makes all of it visible there.

    Progress is in bytes of what was lacking. DownloadError or Cancelled leave what came, for the next time.
    """
    plan.check_space()
    hub = hub or Hub()
    repos = {file.file.repo: hub.repo(file.file.repo) for file in plan.files}
    for repo in repos.values():
        repo.sweep()
    transfers = [Transfer(hub, repos[file.file.repo], file.file, file.here) for file in plan.files if not file.done]
    if transfers:
        log.info("Downloading %s in %d files to %s", byte_size(plan.left), len(transfers), hub.cache)
    loop = Loop(transfers, hub)
    board = Board(transfers, plan.left, meter)
    with meter.stage("download"):
        attended(loop.run, cancel, tick=board.tell, stop=loop.stop)
        board.tell(last=True)
    for file in (*(planned.file for planned in plan.files), *plan.known):
        repos[file.repo].link(file.commit, file.path, file.etag)
    for name, commit in {file.file.repo: file.file.commit for file in plan.files}.items():
        repos[name].take(commit)


class Loop:
    """The transfers, several at a time. `run` is called in one thread, `stop` from another."""

    def __init__(self, transfers: list[Transfer], hub: Hub) -> None:
        self._transfers, self._hub = transfers, hub
        self._main: asyncio.Task[None] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stopped = False

    def run(self) -> None:
        try:
            asyncio.run(self._all())
        except asyncio.CancelledError:
            pass
        except BaseExceptionGroup as group:  # one failed, and the others were cancelled with it
            raise group.exceptions[0] from None

    def stop(self) -> None:
        self._stopped = True
        if self._loop is not None and self._main is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._main.cancel)

    async def _all(self) -> None:
        from huggingface_hub import get_async_session

        self._loop, self._main = asyncio.get_running_loop(), asyncio.current_task()
        if self._stopped:
            return
        places = asyncio.Semaphore(self._hub.at_once)

        async def bring(transfer: Transfer) -> None:
            async with places:
                await transfer.run(client)

        async with get_async_session() as client, asyncio.TaskGroup() as group:
            for transfer in self._transfers:
                group.create_task(bring(transfer))


class Board:
    """Tells how far a download is."""

    def __init__(self, transfers: list[Transfer], total: int, meter: Meter) -> None:
        self._transfers, self._total, self._meter = transfers, total, meter
        self._seen: deque[tuple[float, int]] = deque([(time.monotonic(), 0)])

    def tell(self, *, last: bool = False) -> None:
        """One event, if it is time for one."""
        now = time.monotonic()
        if not last and now - self._seen[-1][0] < TELL and len(self._seen) > 1:
            return
        left = sum(transfer.file.size - transfer.done for transfer in self._transfers)
        done = min(max(0, self._total - left), self._total)
        while len(self._seen) > 1 and now - self._seen[0][0] > SPAN:
            self._seen.popleft()
        then, before = self._seen[0]
        self._seen.append((now, done))
        speed = max(0, done - before) / max(now - then, 1e-3)
        note = next((f"{t.file.path.rpartition('/')[2]}: {t.note}" for t in self._transfers if t.note), "")
        message = f"{byte_size(done)} of {byte_size(self._total)}, {byte_size(speed)}/s" + (f", {note}" if note else "")
        self._meter.emit("download", done, self._total, message=message)


def attended(
    work: Callable[[], T],
    cancel: CancelToken | None,
    *,
    tick: Callable[[], None] = lambda: None,
    stop: Callable[[], None] | None = None,
) -> T:
    """`work()` in a thread, while this one calls `tick` and watches `cancel`. Its result, its error, or Cancelled.

    `stop` makes the work end; without it a cancelled work is left to end by itself.
    """
    results: list[T] = []
    errors: list[BaseException] = []

    def caught() -> None:
        try:
            results.append(work())
        except BaseException as error:  # raised again in the caller's thread
            errors.append(error)

    thread = threading.Thread(target=caught, name="lightx2v-download", daemon=True)
    thread.start()
    try:
        while thread.is_alive():
            thread.join(LOOK)
            if cancel is not None:
                cancel.check()
            tick()
    except BaseException:
        if stop is not None:
            stop()
            thread.join(1.0)
        raise
    if errors:
        raise errors[0]
    return results[0]
