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

import torch.distributed as dist

BEAT = 1.0
SILENCE = 15.0
"""Seconds without a heartbeat after which a process counts as dead."""
GRACE = 4.0
"""Seconds between the news of a failure and the end."""


class Watch:
    def __init__(self, store: dist.Store, rank: int, size: int) -> None:
        self._store, self._rank, self._size = store, rank, size
        self._beats = {other: (b"", time.monotonic()) for other in range(size) if other != rank}
        self._closed = threading.Event()
        self._store.set(f"beat/{rank}", "0")
        self._thread = threading.Thread(target=self._watch, name="lightx2v-watch", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """This process ends in peace."""
        self._closed.set()
        self._thread.join(5 * BEAT)

    def fail(self, message: str, *, kind: str) -> None:
        """Tells everybody; the first one who does is heard."""
        news = {"rank": self._rank, "kind": kind, "message": message[:2000]}
        self._store.compare_set("failed", "", json.dumps(news))

    def reason(self) -> str:
        """The first failure, in words; "" if there was none."""
        if not self._store.check(["failed"]):
            return ""
        news = json.loads(self._store.get("failed"))
        return f"{news['kind']} on process {news['rank']}: {news['message']}"

    def silent(self, ranks: list[int]) -> bool:
        """Whether the heartbeat of one of these has stopped."""
        return any(time.monotonic() - self._beats[rank][1] > 3 * BEAT for rank in ranks if rank in self._beats)

    def _watch(self) -> None:
        count, ended, reason = 0, 0.0, ""
        while not self._closed.wait(BEAT):
            count += 1
            try:
                self._store.set(f"beat/{self._rank}", str(count))
                reason = reason or self.reason() or self._silence()
            except RuntimeError:  # the store is gone, and with it whoever started us
                reason = "The program that started the processes is gone."
            if reason and not ended:
                ended = time.monotonic()
            if ended and time.monotonic() - ended > GRACE and not self._closed.is_set():
                sys.stderr.write(f"error: {reason}\n")
                sys.stderr.flush()
                os._exit(1)
        with contextlib.suppress(RuntimeError):  # nobody may be left to be told
            self._store.set(f"left/{self._rank}", "1")

    def _silence(self) -> str:
        now = time.monotonic()
        for other, (beat, since) in self._beats.items():
            key = f"beat/{other}"
            new = self._store.get(key) if self._store.check([key]) else b""
            if new != beat:
                self._beats[other] = (new, now)
            elif now - since > SILENCE and not self._store.check([f"left/{other}"]):
                self.fail(f"Process {other} has not been heard of for {SILENCE:.0f} seconds.", kind="GroupFailed")
                return self.reason()
        return ""
