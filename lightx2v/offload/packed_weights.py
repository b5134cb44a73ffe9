"""The tensors of a module in one flat buffer, so that one copy moves them all.

weights = PackedWeights(block)   find the tensors' places; the module may be on the meta device
weights.place(buffer)            give a module on the meta device its memory, in a flat buffer on the host
weights.pack(buffer)             move the values of one with memory there
weights.bind(buffer)             make the module's tensors views of a device buffer
weights.unbind()                 put them on the meta device: using them is then an error, not a wrong result
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from .host_slabs import HostSlabs

ALIGN = 256

OUTSIDE = -1
"""The index of everything outside of the blocks."""

Holder = dict[str, Tensor | None]
"""A module's parameters or buffers."""

Reader = Callable[[frozenset[str], Callable[[str], Tensor | None]], Iterable[tuple[str, Tensor]]]
"""Reads the named tensors, in any dtypes that can be cast to the module's; into the memory that the second argument
names for a tensor, if it likes."""


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
                    stride = _dense(tensor)
                    place = Place(
                        name, cast("Holder", holder), leaf, parameter, self.nbytes, dtype, tensor.shape, stride
                    )
                    self.places.append(place)
                    self.nbytes += -(-tensor.numel() * dtype.itemsize // ALIGN) * ALIGN

    def place(self, host: Tensor) -> None:
        """Make the module's tensors views of `host`, whatever its content."""
        self.host = host
        self.bind(host)

    def pack(self, host: Tensor) -> None:
        """Move the values to `host`; the module releases its own memory."""
        for place in self.places:
            tensor = place.holder[place.leaf]
            assert tensor is not None
            place.view(host).copy_(tensor)
        self.host = host
        self.unbind()

    def read(self, reader: Reader, buffer: Tensor) -> None:
        """Fill a host buffer from disk."""
        views = {place.name: place.view(buffer) for place in self.places}
        missing = set(views)
        for name, tensor in reader(frozenset(views), lambda name: views[name] if views[name].is_contiguous() else None):
            missing.remove(name)
            if tensor.data_ptr() != views[name].data_ptr():
                views[name].copy_(tensor)
        assert not missing, f"not read: {list(missing)[:3]}"

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


def _dense(tensor: Tensor) -> tuple[int, ...]:
    """The strides of a copy of `tensor`: its dimensions in the same order, without gaps.

    torch would tell (`empty_like` on the meta device), but imports half of its compiler for that: 3 seconds.
    """
    strides, size = [0] * tensor.dim(), 1
    for dim in sorted(range(tensor.dim()), key=lambda dim: (tensor.stride(dim), -dim)):
        strides[dim] = size
        size *= max(tensor.shape[dim], 1)
    gapless = all(
        own == dense for own, dense, side in zip(tensor.stride(), strides, tensor.shape, strict=True) if side > 1
    )
    return tensor.stride() if gapless else tuple(strides)


class PackedModule:
    """A module with blocks: `parts` has the packed weights of each block, and of everything outside of them."""

    def __init__(
        self,
        module: nn.Module,
        blocks: Sequence[nn.Module] | nn.ModuleList = (),
        *,
        dtype_of: Callable[[str], torch.dtype] | None = None,
    ) -> None:
        self.module, self.blocks = module, blocks
        names = {id(part): path for path, part in module.named_modules()}
        self.parts = {OUTSIDE: PackedWeights(module, without=blocks, dtype_of=dtype_of)}
        for index, block in enumerate(blocks):
            self.parts[index] = PackedWeights(block, prefix=names[id(block)], dtype_of=dtype_of)

    @property
    def in_host_memory(self) -> bool:
        return self.parts[OUTSIDE].host is not None

    def place(self, slabs: HostSlabs) -> None:
        """Give a module on the meta device memory of the slabs, to be filled."""
        for part, buffer in zip(self.parts.values(), self._take(slabs), strict=True):
            part.place(buffer)

    def pack(self, slabs: HostSlabs) -> None:
        """Move the values of a module with memory to the slabs."""
        for part, buffer in zip(self.parts.values(), self._take(slabs), strict=True):
            part.pack(buffer)

    def unbind(self) -> None:
        for part in self.parts.values():
            part.forget()

    def give_back(self, slabs: HostSlabs) -> None:
        """The module is on the meta device afterwards."""
        self.unbind()
        slabs.give_back(part.host for part in self.parts.values() if part.host is not None)
        for part in self.parts.values():
            part.host = None

    def _take(self, slabs: HostSlabs) -> list[Tensor]:
        return slabs.take([part.nbytes for part in self.parts.values()])
