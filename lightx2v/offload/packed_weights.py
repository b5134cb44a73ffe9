"""The tensors of a module in one flat buffer, so that one copy moves them all.

weights = PackedWeights(block)   find the tensors' places; the module may be on the meta device
weights.pack()                   move their values to a flat buffer in host memory, pinned for CUDA
weights.bind(buffer)             make the module's tensors views of a device buffer
weights.unbind()                 put them on the meta device: using them is then an error, not a wrong result
"""

import ctypes
import logging
import mmap
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

log = logging.getLogger("lightx2v.placement")

ALIGN = 256
PAGE = 4096
HUGE_PAGE = 2 << 20

Holder = dict[str, Tensor | None]
"""A module's parameters or buffers."""

Reader = Callable[[frozenset[str]], Iterable[tuple[str, Tensor]]]
"""Reads the named tensors, in any dtypes that can be cast to the module's."""


@dataclass(frozen=True, slots=True)
class Place:
    """One tensor: its place in the module and its place in the buffer."""

    name: str
    holder: Holder
    leaf: str
    parameter: bool
    offset: int
    dtype: torch.dtype
    shape: torch.Size
    stride: tuple[int, ...]

    def view(self, buffer: Tensor) -> Tensor:
        count = self.shape.numel()
        flat = buffer[self.offset : self.offset + count * self.dtype.itemsize].view(self.dtype)
        return flat.as_strided(self.shape, self.stride, flat.storage_offset())

    def tensor(self, values: Tensor) -> Tensor:
        return nn.Parameter(values, requires_grad=False) if self.parameter else values


class PackedWeights:
    """The tensors of `module`, without those of the modules in `without`. `prefix` goes before their names."""

    def __init__(
        self,
        module: nn.Module,
        *,
        without: Iterable[nn.Module] = (),
        prefix: str = "",
        dtype_of: Callable[[str], torch.dtype] | None = None,
    ) -> None:
        self.places: list[Place] = []
        self.nbytes = 0
        self.host: Tensor | None = None
        self._bound: Tensor | None = None
        self._views: dict[int, tuple[Tensor, list[Tensor]]] = {}
        inner = {id(part) for other in without for part in other.modules()}
        for path, owner in module.named_modules(prefix=prefix):
            if id(owner) in inner:
                continue
            for holder, parameter in ((owner._parameters, True), (owner._buffers, False)):
                for leaf, tensor in holder.items():
                    if tensor is None:
                        continue
                    name, dtype = f"{path}.{leaf}" if path else leaf, tensor.dtype
                    if dtype_of and tensor.is_floating_point() and tensor.itemsize > 1:
                        dtype = dtype_of(name)
                    stride = torch.empty_like(tensor, device="meta").stride()  # of any order, but without gaps
                    place = Place(
                        name, cast("Holder", holder), leaf, parameter, self.nbytes, dtype, tensor.shape, stride
                    )
                    self.places.append(place)
                    self.nbytes += -(-tensor.numel() * dtype.itemsize // ALIGN) * ALIGN

    def pack(self, *, pin: bool) -> None:
        """Move the values to the host buffer; the module releases its own memory."""
        host = host_buffer(self.nbytes, pin=pin)
        for place in self.places:
            tensor = place.holder[place.leaf]
            assert tensor is not None
            place.view(host).copy_(tensor)
        self.host = host
        self.unbind()

    def read(self, reader: Reader, buffer: Tensor) -> None:
        """Fill a host buffer from disk."""
        places = {place.name: place for place in self.places}
        for name, tensor in reader(frozenset(places)):
            places.pop(name).view(buffer).copy_(tensor)
        assert not places, f"not read: {list(places)[:3]}"

    def bind(self, buffer: Tensor | None) -> None:
        assert buffer is not None
        if self._bound is buffer:
            return
        known = self._views.get(id(buffer))
        if known is None or known[0] is not buffer:
            known = self._views[id(buffer)] = (buffer, [place.tensor(place.view(buffer)) for place in self.places])
        for place, tensor in zip(self.places, known[1], strict=True):
            place.holder[place.leaf] = tensor
        self._bound = buffer

    def unbind(self) -> None:
        for place in self.places:
            empty = torch.empty_strided(place.shape, place.stride, dtype=place.dtype, device="meta")
            place.holder[place.leaf] = place.tensor(empty)
        self._bound = None

    def forget(self) -> None:
        """Release all device buffers."""
        self.unbind()
        self._views.clear()


def host_buffer(nbytes: int, *, pin: bool) -> Tensor:
    """Allocate flat host memory on its own pages, pinned if `pin` is set and CUDA allows it.

    It registers existing memory with CUDA: torch's own pinned allocator rounds up to powers of two, which would waste
    up to half of a model's blocks. A large buffer asks for huge pages: allocating and registering them takes a fraction
    of the time.
    """
    page = HUGE_PAGE if nbytes >= HUGE_PAGE else PAGE
    size = -(-max(nbytes, 1) // PAGE) * PAGE
    with torch.inference_mode(False):  # LoRAs are merged into it later, outside of inference mode
        room = torch.empty(size + page, dtype=torch.uint8, device="cpu")
    start = -room.data_ptr() % page
    buffer = room[start : start + size]
    if page == HUGE_PAGE and hasattr(mmap, "MADV_HUGEPAGE"):  # Linux; the system may ignore the advice
        ctypes.CDLL(None).madvise(ctypes.c_void_p(buffer.data_ptr()), ctypes.c_size_t(size), mmap.MADV_HUGEPAGE)
    if pin and torch.cuda.is_available():
        runtime: Any = torch.cuda.cudart()
        if int(runtime.cudaHostRegister(buffer.data_ptr(), size, 0)) == 0:
            weakref.finalize(buffer, _unregister, buffer.data_ptr(), room).atexit = False
        else:
            log.warning("Could not pin %d MB of host memory; copies from it will be slower.", size >> 20)
    return buffer


def _unregister(pointer: int, room: Tensor) -> None:
    """Unregister the memory. The argument `room` keeps it alive until then."""
    runtime: Any = torch.cuda.cudart()
    runtime.cudaHostUnregister(pointer)
