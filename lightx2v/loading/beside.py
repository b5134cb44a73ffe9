"""Beside: threads for work that needs no expert, while the experts are read: the seconds of it cost no time.

with Beside(device) as beside:
    beside.start(call)      in a thread; on a GPU on a stream of its own, after all that was queued before
    ...
    beside.finish()         wait for all, and raise what stopped the first one
"""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Self

import torch

THREADS = 4


class Beside:
    """Leaving the `with` block waits for calls that have begun, and drops the others."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._threads = ThreadPoolExecutor(THREADS, "lightx2v-beside")
        self._started: list[Future[None]] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._threads.shutdown(cancel_futures=True)

    def start(self, call: Callable[[], None]) -> None:
        if self._device.type == "cuda":
            queued = torch.cuda.Event()
            queued.record(torch.cuda.current_stream(self._device))
            self._started.append(self._threads.submit(self._on_stream, call, queued))
        else:
            self._started.append(self._threads.submit(call))

    def finish(self) -> None:
        started, self._started = self._started, []
        for each in started:
            each.result()

    def _on_stream(self, call: Callable[[], None], queued: torch.cuda.Event) -> None:
        """On the device's usual stream the copies of the experts would wait for this work."""
        with torch.cuda.device(self._device):
            stream = torch.cuda.Stream()
            stream.wait_event(queued)
            with torch.cuda.stream(stream):
                call()
            stream.synchronize()
