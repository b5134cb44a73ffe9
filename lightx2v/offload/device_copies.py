"""Copies from host to device beside the computation, and the order between the two.

A `Slot` is device memory that holds one weights of a model at a time. Its life is a circle:

    load      a copy into it is queued; it starts after the last use of what the slot held
    acquire   the computation waits for that copy, and uses the slot
    release   the computation is done with it

With CUDA these are a stream and events; the host waits for none of them. `HostCopies` does the same without streams:
it puts every copy off until somebody acquires the slot, and raises where the order is wrong.
"""

from __future__ import annotations

import threading
from concurrent.futures import Future
from typing import Any, Protocol

import torch
from torch import Tensor


class Slot:
    """`item` names what the flat buffer holds or is about to hold; `reading` is the read from disk before the copy,
    `copied` and `left` belong to the copies."""

    def __init__(self, buffer: Tensor) -> None:
        self.buffer = buffer
        self.item: object = None
        self.in_use = False
        self.reading: Future[None] | None = None
        self.copy_event: Any = None
        self.release_event: Any = None


class Copies(Protocol):
    def load(self, slot: Slot, source: Tensor) -> Any:
        """Queues the copy of `source` (flat, host memory) into the slot. Returns a mark for `synchronize`."""

    def acquire(self, slot: Slot) -> None: ...

    def release(self, slot: Slot) -> None: ...

    def synchronize(self, mark: Any) -> None:
        """The host waits until the copy of that mark is done; its source may then be written again."""


class CudaCopies:
    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device)

    def load(self, slot: Slot, source: Tensor) -> Any:
        assert not slot.in_use, "a slot in use is not loaded"
        if slot.release_event is not None:
            self.stream.wait_event(slot.release_event)
        with torch.cuda.stream(self.stream):
            slot.buffer[: len(source)].copy_(source, non_blocking=True)
            slot.copy_event = self.stream.record_event()
        return slot.copy_event

    def acquire(self, slot: Slot) -> None:
        torch.cuda.current_stream(self.device).wait_event(slot.copy_event)
        slot.in_use = True

    def release(self, slot: Slot) -> None:
        slot.release_event = torch.cuda.current_stream(self.device).record_event()
        slot.in_use = False

    def synchronize(self, mark: Any) -> None:
        mark.synchronize()


class HostCopies:
    """Without streams: for devices that have none, and to check on a CPU what CUDA would not tell.

    A copy is done when its slot is acquired, or when a later one is. Until then, with `poison`, the slot holds bytes
    that are NaN in every float format, so that nobody uses it early unnoticed.
    """

    def __init__(self, *, poison: bool = False) -> None:
        self.poison = poison
        self._queue: list[tuple[Slot, Tensor, object]] = []
        self._lock = threading.Lock()

    def load(self, slot: Slot, source: Tensor) -> object:
        if slot.in_use:
            raise RuntimeError(f"{slot.item} was to be overwritten while it is in use")
        if slot.release_event is None:
            raise RuntimeError(f"{slot.item}: the copy does not know what to wait for")
        if self.poison:
            slot.buffer.fill_(0xFF)
        with self._lock:
            slot.copy_event = object()
            self._queue.append((slot, source, slot.copy_event))
            return slot.copy_event

    def acquire(self, slot: Slot) -> None:
        if slot.copy_event is None:
            raise RuntimeError("a slot was used that nothing was copied into")
        self.synchronize(slot.copy_event)
        slot.in_use = True

    def release(self, slot: Slot) -> None:
        slot.release_event = object()
        slot.in_use = False

    def synchronize(self, mark: object) -> None:
        with self._lock:
            if any(queued is mark for _, _, queued in self._queue):
                while True:
                    slot, source, done = self._queue.pop(0)
                    slot.buffer[: len(source)].copy_(source)
                    if done is mark:
                        break


def copies_for(device: torch.device) -> Copies:
    return CudaCopies(device) if device.type == "cuda" else HostCopies()
