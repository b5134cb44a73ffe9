"""Copies from host to device that run beside the computation, and the order between the two.

A `Slot` is device memory that holds one block of weights at a time. Three calls repeat:

    load      queue a copy into it; the copy starts after the last use of the slot's content
    acquire   the computation waits for that copy and uses the slot
    release   the computation no longer needs it

`CudaCopies` uses a stream and events, and the host waits for neither. `HostCopies` does the same without streams: it
delays every copy until a slot is acquired, and raises if the order is wrong.
"""

import threading
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(eq=False)
class Slot:
    """`item` names the weights that the flat buffer holds or will hold. `reading` is the read from disk before the
    copy. `copy_event` and `release_event` belong to the copies."""

    buffer: Tensor
    item: Any = None
    in_use: bool = False
    reading: Future[None] | None = None
    copy_event: Any = None
    release_event: Any = None


class CudaCopies:
    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device)

    def load(self, slot: Slot, source: Tensor) -> Any:
        """Queue the copy of `source` (flat, host memory) into the slot. Returns an event for `synchronize`."""
        assert not slot.in_use, "a slot in use cannot be loaded"
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

    def synchronize(self, event: Any) -> None:
        """The host waits until that copy is done; afterwards its source may change."""
        event.synchronize()


class HostCopies:
    """Without streams: for devices that have none, and for checks on a CPU that CUDA does not make.

    A copy happens when its slot is acquired, or when a later one is. With `poison` the slot holds bytes until then that
    are NaN in every float format, so that an early use shows.
    """

    def __init__(self, *, poison: bool = False) -> None:
        self.poison = poison
        self._queue: list[tuple[Slot, Tensor, object]] = []
        self._lock = threading.Lock()

    def load(self, slot: Slot, source: Tensor) -> object:
        if slot.in_use:
            raise RuntimeError(f"{slot.item} would be overwritten while it is in use")
        if slot.release_event is None:
            raise RuntimeError(f"{slot.item}: the copy has no release event to wait for")
        if self.poison:
            slot.buffer.fill_(0xFF)
        with self._lock:
            slot.copy_event = object()
            self._queue.append((slot, source, slot.copy_event))
            return slot.copy_event

    def acquire(self, slot: Slot) -> None:
        if slot.copy_event is None:
            raise RuntimeError("a slot is used before anything was copied into it")
        self.synchronize(slot.copy_event)
        slot.in_use = True

    def release(self, slot: Slot) -> None:
        slot.release_event = object()
        slot.in_use = False

    def synchronize(self, event: object) -> None:
        with self._lock:
            while any(queued is event for _, _, queued in self._queue):
                slot, source, _ = self._queue.pop(0)
                slot.buffer[: len(source)].copy_(source)


Copies = CudaCopies | HostCopies


def copies_for(device: torch.device) -> Copies:
    return CudaCopies(device) if device.type == "cuda" else HostCopies()
