"""Heartbeat: a thread in each process that sees whether the others still run, and ends this process if one failed.

A process whose partner is gone may wait forever inside an exchange, where no exception reaches it. So this thread ends
it with `os._exit`, after all processes know the first failure and each has had a moment to end by itself.

Timeouts of the exchanges could not replace it: rank 0 may rightly decode tiles alone for minutes while the others
wait, so a timeout that allows this would notice a stopped process after minutes too, not within SILENCE. And torchrun
ends the group when a process ends, but does not notice one that hangs.
"""

import contextlib
import hashlib
import hmac
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import psutil
import torch.distributed as dist

BEAT = 1.0
SILENCE = 15.0
"""Seconds without a heartbeat after which a process counts as dead."""
GRACE = 4.0
"""Seconds between the news of a failure and the end."""


class Heartbeat:
    """`pids` are the process ids of all ranks.

    `store` is a connection of its own: calls of another thread on it would delay the heartbeats. Other machines may
    reach it, so a failure counts only if it is signed with `secret`, which the processes share over loopback.
    """

    def __init__(self, store: dist.Store, rank: int, pids: Sequence[int], secret: bytes) -> None:
        self._store, self._rank, self._pids, self._secret = store, rank, pids, secret
        self._beats = {other: (b"", time.monotonic()) for other in range(len(pids)) if other != rank}
        self._closed = threading.Event()
        self._busy = False
        self._own_failure = ""
        self._store.set(f"beat/{rank}", "0")
        self._thread = threading.Thread(target=self._watch, name="lightx2v-heartbeat", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop the heartbeat and tell the others that this process ends without a failure."""
        self._closed.set()
        self._thread.join(5 * BEAT)
        with contextlib.suppress(RuntimeError):  # the store may be gone
            self._store.set(f"closed/{self._rank}", "1")

    def wait_for_others(self, seconds: float) -> None:
        """Wait until all other processes have closed their heartbeats, but at most `seconds`."""
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
        """Tell all processes. The store keeps only the first failure of the group."""
        self._own_failure = f"{kind} on process {self._rank}: {message[:2000]}"
        value = json.dumps([self._own_failure, self._signature(self._own_failure)])
        with contextlib.suppress(RuntimeError):
            if not self._shared_failure(self._store.compare_set("failed", "", value)):
                self._store.set("failed", value)  # another program had put something there

    def failure(self) -> str:
        """The first failure of the group as a sentence, "" without one."""
        with contextlib.suppress(RuntimeError):
            if self._store.check(["failed"]) and (failure := self._shared_failure(self._store.get("failed"))):
                return failure
        return self._own_failure

    def _signature(self, failure: str) -> str:
        return hmac.new(self._secret, failure.encode(), hashlib.sha256).hexdigest()

    def _shared_failure(self, value: bytes) -> str:
        """The failure in this value of the store; "" unless one of our processes has signed it."""
        try:
            failure, signature = json.loads(value)
            return failure if hmac.compare_digest(self._signature(failure), signature) else ""
        except (ValueError, TypeError, AttributeError):
            return ""

    def silent(self, ranks: Sequence[int], seconds: float = 3 * BEAT) -> list[int]:
        """Those of these ranks whose last heartbeat is older than `seconds`."""
        return [rank for rank in ranks if rank in self._beats and time.monotonic() - self._beats[rank][1] > seconds]

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
                self._kill_stopped()
                os._exit(1)

    def _kill_stopped(self) -> None:
        """Kill processes that hang: torchrun's SIGTERM does not reach a stopped one, and it would wait for 30 seconds.

        Only children of this process's own parent: the id of a process that has ended may be another program's now.
        """
        for rank in self.silent(list(self._beats), SILENCE):
            with contextlib.suppress(psutil.Error, OSError, RuntimeError):
                is_sibling = psutil.Process(self._pids[rank]).ppid() == os.getppid()
                if is_sibling and not self._store.check([f"closed/{rank}"]):
                    os.kill(self._pids[rank], signal.SIGKILL)

    def _check_beats(self) -> str:
        """Read the others' heartbeats; the group's failure if one of them has stopped, else ""."""
        now = time.monotonic()
        for other, (last, since) in self._beats.items():
            key = f"beat/{other}"
            beat = self._store.get(key) if self._store.check([key]) else b""
            if beat != last:
                self._beats[other] = (beat, now)
            elif now - since > SILENCE and (self._busy or not self._store.check([f"closed/{other}"])):
                message = (
                    f"Process {other} has sent no heartbeat for {SILENCE:.0f} seconds: it hangs. Start the group again."
                )
                self.report_failure(message, kind="GroupFailed")
                return self.failure()
        return ""
