"""Heartbeat: a thread in each process that sees whether the others still live, and ends this process if one failed.

A process whose partner is gone may wait forever inside an exchange, where no exception reaches it. So this thread ends
it with `os._exit`, after the first failure is known to all and each process has had a moment to end by itself.
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


class Heartbeat:
    """`store` is a connection of its own: calls of another thread on it would delay the heartbeats."""

    def __init__(self, store: dist.Store, rank: int, size: int) -> None:
        self._store, self._rank = store, rank
        self._beats = {other: (b"", time.monotonic()) for other in range(size) if other != rank}
        self._closed = threading.Event()
        self._busy = False
        self._own_failure = ""
        self._store.set(f"beat/{rank}", "0")
        self._thread = threading.Thread(target=self._watch, name="lightx2v-heartbeat", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """This process ends without a failure."""
        self._closed.set()
        self._thread.join(5 * BEAT)
        with contextlib.suppress(RuntimeError):  # the store may be gone
            self._store.set(f"closed/{self._rank}", "1")

    def wait_for_others(self, seconds: float) -> None:
        """Wait until all others have closed theirs, at most this many seconds."""
        deadline = time.monotonic() + seconds
        with contextlib.suppress(RuntimeError):
            while time.monotonic() < deadline and not self._store.check([f"closed/{rank}" for rank in self._beats]):
                time.sleep(0.02)

    @contextmanager
    def needs_all(self) -> Iterator[None]:
        """Inside, this process needs all others, so one that has closed counts as missing too."""
        self._busy = True
        try:
            yield
        finally:
            self._busy = False

    def report_failure(self, message: str, *, kind: str) -> None:
        """Tell all processes. Only the first failure of the group is kept."""
        failure = {"rank": self._rank, "kind": kind, "message": message[:2000]}
        self._own_failure = _sentence(failure)
        with contextlib.suppress(RuntimeError):
            self._store.compare_set("failed", "", json.dumps(failure))

    def failure(self) -> str:
        """The first failure of the group as a sentence, "" without one."""
        try:
            if self._store.check(["failed"]):
                return _sentence(json.loads(self._store.get("failed")))
        except RuntimeError:
            pass
        return self._own_failure

    def silent(self, ranks: Sequence[int]) -> bool:
        """Whether the heartbeat of one of these ranks has stopped."""
        return any(time.monotonic() - self._beats[rank][1] > 3 * BEAT for rank in ranks if rank in self._beats)

    def _watch(self) -> None:
        count, failed_at, failure = 0, 0.0, ""
        while not self._closed.wait(BEAT):
            count += 1
            try:
                self._store.set(f"beat/{self._rank}", str(count))
                failure = failure or self.failure() or self._check_beats()
            except RuntimeError:
                failure = failure or self._own_failure or "The program that started the processes has ended."
            if failure and not failed_at:
                failed_at = time.monotonic()
            if failed_at and time.monotonic() - failed_at > GRACE and not self._closed.is_set():
                sys.stderr.write(f"error: {failure}\n")
                sys.stderr.flush()
                os._exit(1)

    def _check_beats(self) -> str:
        """Read the others' heartbeats; the group's failure if one of them has stopped, else ""."""
        now = time.monotonic()
        for other, (last, since) in self._beats.items():
            key = f"beat/{other}"
            beat = self._store.get(key) if self._store.check([key]) else b""
            if beat != last:
                self._beats[other] = (beat, now)
            elif now - since > SILENCE and (self._busy or not self._store.check([f"closed/{other}"])):
                self.report_failure(
                    f"Process {other} has not been heard of for {SILENCE:.0f} seconds.", kind="GroupFailed"
                )
                return self.failure()
        return ""


def _sentence(failure: dict[str, str]) -> str:
    return f"{failure['kind']} on process {failure['rank']}: {failure['message']}"
