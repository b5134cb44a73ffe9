"""Carry out a download plan: several files at a time, with progress events, cancelled within a moment.

The transfers run in an event loop in a thread of their own, where a cancel closes the connections at once. The caller's
thread waits, sends the progress events and watches the cancel token.
"""

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from functools import partial
from typing import TypeVar

from ..config.engine_config import EngineConfig
from ..config.proxies import use_proxies
from ..errors import byte_size
from ..progress import CancelToken, Meter
from .listing import Hub
from .plan import DownloadPlan, make_plan, missing
from .transfer import Transfer

log = logging.getLogger("lightx2v.hub")

T = TypeVar("T")

POLL = 0.1
"""Seconds between two looks at the cancel token."""
REPORT_EVERY = 0.5
"""Seconds between two progress events."""
SPEED_SPAN = 5.0
"""Seconds over which the speed is measured."""


def ensure(
    config: EngineConfig,
    *,
    also: Sequence[str] = (),
    meter: Meter,
    cancel: CancelToken | None = None,
    hub: Hub | None = None,
) -> None:
    """Download what `config` needs, and the paths `also`, where this machine lacks them; else send no request.

    DownloadError says why that is not possible. Cancelled follows `cancel`.
    """
    if not missing(config, also):
        return
    hub = hub or Hub()
    with meter.stage("download"):
        meter.emit("download", message="Asking the Hub for the list of files.")
        plan = _wait_for(_in_thread(partial(make_plan, config, also=also, hub=hub)), cancel)
        fetch(plan, meter=meter, cancel=cancel, hub=hub)


def fetch(plan: DownloadPlan, *, meter: Meter, cancel: CancelToken | None = None, hub: Hub | None = None) -> None:
    """Download the rest of the plan's files into the cache and make all of them visible there.

    Progress counts the bytes to download. DownloadError and Cancelled keep what has arrived for the next time.
    """
    plan.check_space()
    use_proxies()
    hub = hub or Hub()
    repos = {planned.file.repo: hub.repo(planned.file.repo) for planned in plan.files}
    for repo in repos.values():
        repo.sweep()
    transfers = [Transfer(hub, repos[file.file.repo], file.file, file.here) for file in plan.files if not file.done]
    if transfers:
        log.info("Downloading %s in %d files to %s", byte_size(plan.left), len(transfers), hub.cache)
    progress = DownloadProgress(transfers, plan.left, meter)
    stop = CancelToken()
    work = _in_thread(lambda: asyncio.run(_run_all(transfers, hub, stop)))
    with meter.stage("download"):
        try:
            _wait_for(work, cancel, tick=progress.send)
        except BaseException:
            stop.cancel()
            wait([work], timeout=1.0)
            raise
        progress.send(last=True)
    for file in (*(planned.file for planned in plan.files), *plan.reusable):
        repos[file.repo].link(file.commit, file.path, file.etag)
    for name, commit in {planned.file.repo: planned.file.commit for planned in plan.files}.items():
        repos[name].make_current(commit)


async def _run_all(transfers: list[Transfer], hub: Hub, stop: CancelToken) -> None:
    """Run the transfers, some at a time. Cancel the others once one has failed or `stop` is set."""
    from huggingface_hub import get_async_session

    slots = asyncio.Semaphore(hub.parallel_files)

    async def run(transfer: Transfer) -> None:
        async with slots:
            await transfer.run(client)

    async with get_async_session() as client:
        tasks = [asyncio.create_task(run(transfer)) for transfer in transfers]
        pending = set(tasks)
        try:
            while pending and not stop.cancelled:
                done, pending = await asyncio.wait(pending, timeout=POLL, return_when=asyncio.FIRST_EXCEPTION)
                for task in done:
                    task.result()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


class DownloadProgress:
    """Sends the progress events of a download of `total` bytes."""

    def __init__(self, transfers: list[Transfer], total: int, meter: Meter) -> None:
        self._transfers, self._total, self._meter = transfers, total, meter
        self._sent: deque[tuple[float, int]] = deque([(time.monotonic(), 0)])
        """When each event of the last seconds was sent, and the bytes by then."""

    def send(self, *, last: bool = False) -> None:
        """Send one event if it is time for one."""
        now = time.monotonic()
        if not last and now - self._sent[-1][0] < REPORT_EVERY and len(self._sent) > 1:
            return
        left = sum(transfer.file.size - transfer.done for transfer in self._transfers)
        done = min(max(0, self._total - left), self._total)
        while len(self._sent) > 1 and now - self._sent[0][0] > SPEED_SPAN:
            self._sent.popleft()
        then, before = self._sent[0]
        self._sent.append((now, done))
        speed = max(0, done - before) / max(now - then, 1e-3)
        note = next((f"{t.file.path.rpartition('/')[2]}: {t.note}" for t in self._transfers if t.note), "")
        message = f"{byte_size(done)} of {byte_size(self._total)}, {byte_size(speed)}/s" + (f", {note}" if note else "")
        self._meter.emit("download", done, self._total, message=message)


def _in_thread(work: Callable[[], T]) -> Future[T]:
    """Start `work` in a daemon thread, so that the process can end while a server does not answer."""
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:  # raised again in the caller's thread
            future.set_exception(error)

    threading.Thread(target=run, name="lightx2v-download", daemon=True).start()
    return future


def _wait_for(future: Future[T], cancel: CancelToken | None, *, tick: Callable[[], None] = lambda: None) -> T:
    """The future's result. Until it is there, call `tick` and raise Cancelled once `cancel` is set."""
    while not wait([future], timeout=POLL).done:
        if cancel is not None:
            cancel.check()
        tick()
    return future.result()
