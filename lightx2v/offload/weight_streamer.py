"""Streams the weights of modules to the device, block by block, ahead of the computation.

A `WeightStreamer` serves one or several modules of the same architecture with the same device memory: both experts, or
the text encoder, or the VAE. The first `resident` blocks have a device slot each, and the others share
`prefetch_slots` slots as a ring. Everything outside of the blocks has one slot.

    resident = blocks   one module on the device; each of its blocks is replaced by the next module's as soon as it has
                        run for the last time
    resident < blocks   the rest streams: while a block runs the next ones are copied, and after the last block the
                        first ones for the next forward

Nothing is ever copied back. Hooks on the blocks do the work, so the modules need no change. While blocks run, another
thread reads weights that stay on disk, one block after the other.
"""

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .device_copies import Copies, Slot
from .host_slabs import HostSlabs
from .packed_weights import OUTSIDE, PackedModule, PackedWeights, Reader

Item = tuple[str, int]
"""(module, block index)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamedModule:
    """One module and its blocks; `reader` reads weights that stay on disk, in the dtypes of `dtype_of`.

    `packed` has the weights of a module that was loaded to host memory.
    """

    module: nn.Module
    blocks: Sequence[nn.Module] = ()
    reader: Reader | None = None
    dtype_of: Any = None
    packed: PackedModule | None = None


class WeightStreamer:
    def __init__(
        self,
        streamed: Mapping[str, StreamedModule],
        copies: Copies,
        device: torch.device,
        *,
        resident: int,
        prefetch_slots: int = 3,
        read_ahead: bool = True,
        slabs: HostSlabs | None = None,
    ) -> None:
        """Move the weights of modules without a reader to host memory, `slabs`; afterwards they are there only.

        Without `read_ahead` the caller's thread reads weights from disk when they are needed.
        """
        self.copies, self.device = copies, device
        self.modules = {name: each.module for name, each in streamed.items()}
        self.readers = {name: each.reader for name, each in streamed.items()}
        self.blocks = len(next(iter(streamed.values())).blocks)
        self.packed: dict[Item, PackedWeights] = {}
        self.own: dict[int, Slot] = {}
        self.shared: list[Slot] = []
        self.resident = self.prefetch_slots = 0
        self._hooks: list[Any] = []
        self._staging = [_Staging(), _Staging()]
        self._thread: ThreadPoolExecutor | None = None
        if read_ahead and any(self.readers.values()):
            self._thread = ThreadPoolExecutor(1, "lightx2v-read")
        self._current: str | None = None
        self._next: str | None = None
        self._slabs = slabs or HostSlabs(pin=device.type == "cuda")
        self._in_host: list[PackedModule] = []
        for name, each in streamed.items():
            assert len(each.blocks) == self.blocks, "the modules of a streamer need the same number of blocks"
            packed = each.packed or PackedModule(each.module, each.blocks, dtype_of=each.dtype_of)
            self.packed |= {(name, index): part for index, part in packed.parts.items()}
            for index, block in enumerate(each.blocks):
                self._hooks += [
                    block.register_forward_pre_hook(lambda *_, at=(name, index): self.before(*at)),
                    block.register_forward_hook(lambda *_, at=(name, index): self.after(*at)),
                ]
            if each.reader is None:
                if not packed.in_host_memory:
                    packed.pack(self._slabs)
                packed.unbind()
                self._in_host.append(packed)
        self._slabs.wait()
        self.resize(resident, prefetch_slots)

    # ---- device memory ------------------------------------------------------------------------------------------

    def resize(self, resident: int, prefetch_slots: int = 3) -> None:
        """Change the number of resident blocks and of slots for the others. The next use takes the device memory."""
        resident = max(0, min(resident, self.blocks))
        streamed = self.blocks - resident
        slots = max(1, min(prefetch_slots, streamed)) if streamed else 0
        if (resident, slots) != (self.resident, self.prefetch_slots):
            self.free()
            self.resident, self.prefetch_slots = resident, slots

    def free(self) -> None:
        """Give the device memory back; the next `use` copies again."""
        for slot in [*self.own.values(), *self.shared]:
            _stop_reading(slot)
            if slot.copy_event is not None:
                self.copies.acquire(slot)  # a running copy must not write into memory that was given back
                self.copies.release(slot)
        for weights in self.packed.values():
            weights.forget()
        self.own, self.shared = {}, []

    def _sizes(self) -> tuple[int, int]:
        """The bytes of the largest slot for weights outside of the blocks, and for a block."""
        outside = [weights.nbytes for (_, index), weights in self.packed.items() if index == OUTSIDE]
        blocks = [weights.nbytes for (_, index), weights in self.packed.items() if index != OUTSIDE]
        return max(outside), max(blocks, default=0)

    def _allocate(self) -> None:
        if self.own:
            return
        outside, block = self._sizes()
        try:
            with torch.inference_mode(False):
                self.own[OUTSIDE] = self._slot(outside)
                for index in range(self.resident):
                    self.own[index] = self._slot(block)
                self.shared = [self._slot(block) for _ in range(self.prefetch_slots)]
        except BaseException:
            self.own, self.shared = {}, []
            raise

    def _slot(self, nbytes: int) -> Slot:
        slot = Slot(torch.empty(nbytes, dtype=torch.uint8, device=self.device))
        self.copies.release(slot)  # earlier users of this memory come first
        return slot

    # ---- use ----------------------------------------------------------------------------------------------------

    @contextmanager
    def use(
        self, name: str, then: str | None = None, *, blocks: bool = True, then_blocks: str | None = None
    ) -> Iterator[Any]:
        """The module, usable inside the `with` block. `then` is the module of the next use, `then_blocks` that of the
        next use with blocks, as far as they are known. Without `blocks` none may run, and none is copied."""
        self._allocate()
        self._current, self._next = name, then_blocks or then or name
        try:
            self._fetch((name, OUTSIDE), self.own[OUTSIDE])
            if blocks:
                self._fetch_all([(name, i) for i in range(min(2, self.resident))])
                self._fetch_all([(name, i) for i in range(self.resident, self.resident + self.prefetch_slots)])
            self._enter((name, OUTSIDE), self.own[OUTSIDE])
            yield self.modules[name]
            self.copies.release(self.own[OUTSIDE])
            if then is not None and then != name:
                self._fetch((then, OUTSIDE), self.own[OUTSIDE])
        finally:
            for slot in [*self.own.values(), *self.shared]:
                if slot.in_use:
                    self.copies.release(slot)
            self._current = self._next = None

    def before(self, name: str, index: int) -> None:
        """Before a block runs: wait for its weights, and start the copies of the next ones."""
        if name != self._current:
            raise RuntimeError(f"block {index} of {name} runs outside of its use")
        slot = self._want((name, index))
        self._enter((name, index), slot)
        self._fetch_all([(name, i) for i in range(index + 1, min(index + 3, self.resident))])

    def after(self, name: str, index: int) -> None:
        """After a block has run: start the next copy into its memory."""
        slot = self._holder((name, index))
        if slot is None or not slot.in_use:
            return
        self.copies.release(slot)
        following = self._next
        assert following is not None
        if index < self.resident:
            if following != name:
                self._fetch((following, index), slot)
            return
        # The ring continues with the streamed blocks still to come, then with those of the next forward.
        coming = [(name, i) for i in range(index + 1, self.blocks)]
        coming += [(following, i) for i in range(self.resident, self.blocks)]
        self._fetch_all(coming[: self.prefetch_slots])

    def _fetch_all(self, items: Sequence[Item]) -> None:
        for item in items:
            self._want(item, keep=items)

    def _want(self, item: Item, keep: Sequence[Item] = ()) -> Slot:
        """The slot that holds `item` or gets it now. A shared slot that holds an item of `keep` is not reused."""
        slot = self._holder(item)
        if slot is not None:
            return slot
        if item[1] < self.resident:
            slot = self.own[item[1]]
        else:
            slot = next(s for s in self.shared if not s.in_use and s.item not in keep)
        self._fetch(item, slot)
        return slot

    def _holder(self, item: Item) -> Slot | None:
        if item[1] < self.resident:
            slot = self.own.get(item[1])
            return slot if slot is not None and slot.item == item else None
        return next((slot for slot in self.shared if slot.item == item), None)

    def _fetch(self, item: Item, slot: Slot) -> None:
        if slot.item == item:
            return
        if slot.item is not None:
            self.packed[slot.item].unbind()
        slot.item = None
        weights = self.packed[item]
        if weights.host is not None:
            self.copies.load(slot, weights.host[: weights.nbytes])
        elif self._thread is None:
            self._read(item, weights, slot)
        else:
            slot.reading = self._thread.submit(self._read, item, weights, slot)
        slot.item = item

    def _read(self, item: Item, weights: PackedWeights, slot: Slot) -> None:
        """Read from disk into one of two staging buffers, and copy from there like any other weights."""
        reader = self.readers[item[0]]
        assert reader is not None
        staging = self._staging.pop(0)
        self._staging.append(staging)
        if staging.event is not None:
            self.copies.synchronize(staging.event)
        if staging.buffer is None:
            [staging.buffer] = self._slabs.take([max(self._sizes())])
            self._slabs.wait([staging.buffer])
        weights.read(reader, staging.buffer)
        staging.event = self.copies.load(slot, staging.buffer[: weights.nbytes])

    def _enter(self, item: Item, slot: Slot) -> None:
        if slot.reading is not None:
            try:
                slot.reading.result()
            except BaseException:
                slot.item = None  # the next use tries again
                raise
            finally:
                slot.reading = None
        self.copies.acquire(slot)
        self.packed[item].bind(slot.buffer)

    @contextmanager
    def edit(self) -> Iterator[None]:
        """Inside, the modules' tensors are those in host memory and may be changed."""
        self.free()
        packed = [weights for weights in self.packed.values() if weights.host is not None]
        for weights in packed:
            weights.bind(weights.host)
        try:
            yield
        finally:
            for weights in packed:
                weights.forget()

    def close(self) -> None:
        """Drop all weights. The modules are on the meta device afterwards."""
        for packed in self.release():
            packed.give_back(self._slabs)

    def release(self) -> list[PackedModule]:
        """End, but leave the weights of each module in host memory. The modules are on the meta device afterwards."""
        for slot in [*self.own.values(), *self.shared]:
            _stop_reading(slot)
            if slot.copy_event is not None:
                self.copies.synchronize(slot.copy_event)  # host memory is released below
        self.free()
        if self._thread is not None:
            self._thread.shutdown()
        for hook in self._hooks:
            hook.remove()
        self._slabs.give_back(staging.buffer for staging in self._staging if staging.buffer is not None)
        self._staging.clear()
        self.packed.clear()
        self.modules.clear()
        in_host, self._in_host = self._in_host, []
        return in_host


@dataclass
class _Staging:
    """A host buffer between disk and device, and the event of the last copy from it."""

    buffer: Tensor | None = None
    event: Any = None


def _stop_reading(slot: Slot) -> None:
    """Stop or await the read into the slot. Its error, if any, no longer matters."""
    if slot.reading is not None and not slot.reading.cancel():
        wait([slot.reading])
    slot.reading = None
