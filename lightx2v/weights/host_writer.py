"""HostWriter: copies many tensors from a GPU to memory of the host that is new, by threads.

A copy from the GPU straight to memory that CUDA does not know yet takes one thread and waits for each page; to know
all of it takes seconds, in which nothing would be copied. So each piece goes to one of a few pinned buffers first, and
a thread copies it from there, while the GPU goes on.
"""

from __future__ import annotations

from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

THREADS = 8
PIECE = 8 << 20


class HostWriter:
    """As a context manager; `finish` waits until all is written. Nothing is written after the `with` block."""

    def __init__(self) -> None:
        self._threads = ThreadPoolExecutor(THREADS, "lightx2v-write")
        self._free: list[Tensor] = []
        self._busy: deque[tuple[Tensor, Future[None]]] = deque()

    def __enter__(self) -> HostWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self._threads.shutdown(cancel_futures=True)

    def write(self, target: Tensor, source: Tensor) -> None:
        """Begin to copy `source`, of the same dtype and shape as `target`, and contiguous like it."""
        into, values = target.view(-1).view(torch.uint8), source.view(-1).view(torch.uint8)
        for start in range(0, len(values), PIECE):
            piece = values[start : start + PIECE]
            buffer = self._buffer()
            staged = buffer[: len(piece)]
            staged.copy_(piece, non_blocking=True)
            copied = torch.cuda.current_stream(source.device).record_event()
            place = into[start : start + PIECE].numpy()
            self._busy.append((buffer, self._threads.submit(_write, place, staged.numpy(), copied)))

    def finish(self) -> None:
        while self._busy:
            self._reuse()

    def _buffer(self) -> Tensor:
        if len(self._busy) >= 2 * THREADS:
            self._reuse()
        return self._free.pop() if self._free else torch.empty(PIECE, dtype=torch.uint8, pin_memory=True)

    def _reuse(self) -> None:
        buffer, written = self._busy.popleft()
        written.result()
        self._free.append(buffer)


def _write(place: np.ndarray, staged: np.ndarray, copied: torch.Event) -> None:
    copied.synchronize()
    np.copyto(place, staged)
