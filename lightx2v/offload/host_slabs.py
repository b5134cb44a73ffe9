"""HostSlabs: host memory for weights that a GPU copies from: fast to get, and used again by the next model.

    slabs = HostSlabs(pin=True)
    buffers = slabs.take([nbytes, ...])    may be written at once; threads make them ready meanwhile
    slabs.wait()                           now copies from all of them are fast
    slabs.give_back(buffers)               the next `take` gets this memory before fresh memory
    slabs.trim()                           frees what nobody took

Fresh memory costs more time than reading a model into it: the system clears each page when it is first touched, and
CUDA has to register all of them. So slabs are large, in huge pages, which many threads touch and register while others
already read into them. torch's own pinned memory is touched by one thread, and rounds up to powers of two.
"""

import ctypes
import logging
import mmap
import os
import threading
import weakref
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..weights.host_memory import HUGE_PAGE, use_huge_pages

log = logging.getLogger("lightx2v.placement")

SLAB = 256 << 20
PAGE = 4096
ALIGN = 256
POPULATE_WRITE = 23
"""madvise's MADV_POPULATE_WRITE, of Linux 5.14: touches pages and leaves their content. Python has no name for it."""
THREADS = 16


@dataclass(eq=False)
class _Slab:
    """`memory` begins at a page; `users` buffers of it are taken. `ready` ends when it is touched and registered."""

    memory: Tensor
    users: int = 0
    ready: list[Future[None]] = field(default_factory=list)
    unregister: Callable[[], Any] = lambda: None


class HostSlabs:
    """Any thread may take and give back."""

    def __init__(self, *, pin: bool) -> None:
        """`pin` registers the memory with CUDA."""
        self._pin = pin and torch.cuda.is_available()
        self._lock = threading.Lock()
        self._slabs: dict[int, _Slab] = {}
        self._threads = ThreadPoolExecutor(min(THREADS, os.cpu_count() or 1), "lightx2v-slabs")

    @property
    def nbytes(self) -> int:
        """The bytes of all slabs."""
        return sum(len(slab.memory) for slab in self._slabs.values())

    def take(self, sizes: Sequence[int]) -> list[Tensor]:
        """A flat buffer of bytes for each size, at an address that suits every dtype."""
        buffers: list[Tensor] = []
        slab, at = None, 0
        with self._lock:
            for index, size in enumerate(sizes):
                if slab is None or at + size > len(slab.memory):
                    slab, at = self._slab(sizes[index:]), 0
                buffers.append(slab.memory[at : at + size])
                slab.users += 1
                at += -(-size // ALIGN) * ALIGN
        return buffers

    def wait(self, buffers: Iterable[Tensor] | None = None) -> None:
        """Wait until these buffers, or all, are ready. Memory that CUDA refuses stays usable: copies are slower."""
        slabs = [*self._slabs.values()] if buffers is None else [self._of(buffer) for buffer in buffers]
        for slab in slabs:
            for each in slab.ready:
                each.result()
            slab.ready.clear()

    def give_back(self, buffers: Iterable[Tensor]) -> None:
        """Nobody uses these buffers any more, nor any copy from them."""
        with self._lock:
            for buffer in buffers:
                self._of(buffer).users -= 1

    def trim(self) -> None:
        """Free the slabs of which no buffer is taken."""
        for address, slab in [*self._slabs.items()]:
            if not slab.users:
                self.wait([slab.memory])
                slab.unregister()
                del self._slabs[address]

    def _of(self, buffer: Tensor) -> _Slab:
        return self._slabs[buffer.untyped_storage().data_ptr()]

    def _slab(self, sizes: Sequence[int]) -> _Slab:
        """A slab for the first of these sizes, and for as many more as SLAB bytes hold: a free one, or a new one."""
        size = sizes[0]
        free = [slab for slab in self._slabs.values() if not slab.users and len(slab.memory) >= size]
        if free:
            return min(free, key=lambda slab: len(slab.memory))
        whole = 0
        for more in sizes:
            if whole and whole + more > SLAB:
                break
            whole += -(-max(more, 1) // ALIGN) * ALIGN
        return self._new(-(-whole // PAGE) * PAGE)

    def _new(self, size: int) -> _Slab:
        page = HUGE_PAGE if size >= HUGE_PAGE else PAGE
        with torch.inference_mode(False):  # LoRAs are merged into it later, outside of inference mode
            room = torch.empty(size + page, dtype=torch.uint8, device="cpu")
        use_huge_pages(room)
        start = -room.data_ptr() % page
        slab = _Slab(room[start : start + size])
        self._slabs[room.untyped_storage().data_ptr()] = slab
        step = -(-size // THREADS // HUGE_PAGE) * HUGE_PAGE
        touched = [self._threads.submit(_touch, slab.memory[at : at + step]) for at in range(0, size, step)]
        slab.ready = [self._threads.submit(self._register, slab, touched)]
        return slab

    def _register(self, slab: _Slab, touched: list[Future[None]]) -> None:
        for each in touched:
            each.result()
        if self._pin:
            runtime: Any = torch.cuda.cudart()
            if int(runtime.cudaHostRegister(slab.memory.data_ptr(), len(slab.memory), 0)) == 0:
                # Also where nobody closes this: CUDA refuses the address as long as it is registered.
                slab.unregister = weakref.finalize(
                    slab.memory, _unregister, slab.memory.data_ptr(), slab.memory.untyped_storage()
                )
                slab.unregister.atexit = False
            else:
                log.warning(
                    "Could not pin %d MB of host memory; copies from it will be slower.", len(slab.memory) >> 20
                )

    def close(self) -> None:
        """Free everything; no buffer may be used afterwards."""
        for slab in self._slabs.values():
            slab.users = 0
        self.trim()
        self._threads.shutdown()


def _unregister(address: int, storage: torch.UntypedStorage) -> None:
    """Unregister the memory. The argument `storage` keeps it alive until then."""
    runtime: Any = torch.cuda.cudart()
    runtime.cudaHostUnregister(address)


def _touch(memory: Tensor) -> None:
    """Have the system hand out these pages now. Others may write into them meanwhile; where it cannot, they do it."""
    if hasattr(mmap, "MADV_HUGEPAGE"):  # Linux
        address, size = ctypes.c_void_p(memory.data_ptr()), ctypes.c_size_t(len(memory))
        ctypes.CDLL(None).madvise(address, size, POPULATE_WRITE)
