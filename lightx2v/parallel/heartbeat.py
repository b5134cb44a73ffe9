"""A thread in each process that sees whether the others still live, and ends this one when one of them failed.

A process whose partner is gone may wait for ever inside an exchange, where no exception reaches it. So the end is
`os._exit`, from here, after the first failure has been told and everybody had a moment to end by itself.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch.distributed as dist

BEAT = 1.0
SILENCE = 15.0
"""Seconds without a heartbeat after which a process counts as dead."""
GRACE = 4.0
"""Seconds between the news of a failure and the end."""


class Watch:
    """`store` is a connection of its own: calls of another thread on it would hold up the heartbeat."""

    def __init__(self, store: dist.Store, rank: int, size: int) -> None:
        self._store, self._rank = store, rank
        self._beats = {other: (b"", time.monotonic()) for other in range(size) if other != rank}
        self._closed = threading.Event()
        self._busy = False
        self._own = ""
        self._store.set(f"beat/{rank}", "0")
        self._thread = threading.Thread(target=self._watch, name="lightx2v-watch", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """This process ends in peace."""
        self._closed.set()
        self._thread.join(5 * BEAT)
        with contextlib.suppress(RuntimeError):  # nobody may be left to be told
            self._store.set(f"left/{self._rank}", "1")

    def wait_for_others(self, seconds: float) -> None:
        """Until all the others have closed theirs, or so many seconds have passed."""
        deadline = time.monotonic() + seconds
        with contextlib.suppress(RuntimeError):
            while time.monotonic() < deadline and not self._store.check([f"left/{rank}" for rank in self._beats]):
                time.sleep(0.02)

    @contextmanager
    def busy(self) -> Iterator[None]:
        """Inside, this process needs all the others: one that leaves in peace is missing, too."""
        self._busy = True
        try:
            yield
        finally:
            self._busy = False

    def fail(self, message: str, *, kind: str) -> None:
        """Tells everybody; the first one who does is heard."""
        news = {"rank": self._rank, "kind": kind, "message": message[:2000]}
        self._own = _words(news)
        with contextlib.suppress(RuntimeError):
            self._store.compare_set("failed", "", json.dumps(news))

    def reason(self) -> str:
        """The first failure, in words; "" if there was none."""
        try:
            return _words(json.loads(self._store.get("failed"))) if self._store.check(["failed"]) else self._own
        except RuntimeError:
            return self._own

    def silent(self, ranks: Sequence[int]) -> bool:
        """Whether the heartbeat of one of these has stopped."""
        return any(time.monotonic() - self._beats[rank][1] > 3 * BEAT for rank in ranks if rank in self._beats)

    def _watch(self) -> None:
        count, ended, reason = 0, 0.0, ""
        while not self._closed.wait(BEAT):
            count += 1
            try:
                self._store.set(f"beat/{self._rank}", str(count))
                reason = reason or self.reason() or self._silence()
            except RuntimeError:
                reason = reason or self._own or "The program that started the processes is gone."
            if reason and not ended:
                ended = time.monotonic()
            if ended and time.monotonic() - ended > GRACE and not self._closed.is_set():
                sys.stderr.write(f"error: {reason}\n")
                sys.stderr.flush()
                os._exit(1)

    def _silence(self) -> str:
        now = time.monotonic()
        for other, (beat, since) in self._beats.items():
            key = f"beat/{other}"
            new = self._store.get(key) if self._store.check([key]) else b""
            if new != beat:
                self._beats[other] = (new, now)
            elif now - since > SILENCE and (self._busy or not self._store.check([f"left/{other}"])):
                self.fail(f"Process {other} has not been heard of for {SILENCE:.0f} seconds.", kind="GroupFailed")
                return self.reason()
        return ""


def _words(news: dict[str, str]) -> str:
    return f"{news['kind']} on process {news['rank']}: {news['message']}"
