"""Host memory for weights: buffers keep apart, are used again, and go when nobody takes them."""

from __future__ import annotations

import itertools
import mmap
import subprocess
import sys

import pytest
import torch
from torch import nn

from lightx2v.offload import host_slabs
from lightx2v.offload.host_slabs import HostSlabs
from lightx2v.offload.packed_weights import OUTSIDE, PackedModule


def addresses(buffers: list[torch.Tensor]) -> set[int]:
    return {buffer.untyped_storage().data_ptr() for buffer in buffers}


@pytest.fixture
def slabs(monkeypatch: pytest.MonkeyPatch) -> HostSlabs:
    monkeypatch.setattr(host_slabs, "SLAB", 1 << 20)
    return HostSlabs(pin=False)


def test_buffers_never_overlap_and_suit_every_dtype(slabs: HostSlabs) -> None:
    sizes = [5, 0, 300_000, 700_000, 1, 3 << 20, 400_000, 400_000]
    buffers = slabs.take(sizes)
    assert [len(buffer) for buffer in buffers] == sizes
    for number, buffer in enumerate(buffers):
        buffer.fill_(number)
    slabs.wait()  # touching pages keeps what is in them
    assert all(bool((buffer == number).all()) for number, buffer in enumerate(buffers))
    assert all(buffer.data_ptr() % 256 == 0 for buffer in buffers)
    assert len(addresses(buffers)) == 3, "slabs of 1 MiB, and one for the buffer that is larger"


def test_the_next_model_gets_the_memory_of_the_last_one(slabs: HostSlabs) -> None:
    first = slabs.take([600_000] * 4)
    before = addresses(first)
    slabs.give_back(first)
    second = slabs.take([300_000] * 6)
    assert addresses(second) <= before, "other sizes fit into the same slabs"
    kept = slabs.take([600_000])
    slabs.give_back(second)
    slabs.trim()
    assert set(slabs._slabs) == addresses(kept)
    kept[0].fill_(1)
    slabs.close()
    assert not slabs._slabs


def test_a_slab_is_free_only_when_all_of_its_buffers_are(slabs: HostSlabs) -> None:
    first, second = slabs.take([1000, 1000])
    slabs.give_back([first])
    assert not addresses(slabs.take([1000])) & addresses([second])


def test_memory_is_touched_before_it_is_needed(slabs: HostSlabs) -> None:
    """On a system that can: the pages are resident although nobody has written to them."""
    [buffer] = slabs.take([8 << 20])
    slabs.wait()
    pages = mmap.PAGESIZE
    resident = bytearray(len(buffer) // pages)
    vector = (host_slabs.ctypes.c_ubyte * len(resident)).from_buffer(resident)
    if host_slabs.ctypes.CDLL(None).mincore(
        host_slabs.ctypes.c_void_p(buffer.data_ptr()), host_slabs.ctypes.c_size_t(len(buffer)), vector
    ):
        pytest.skip("no mincore here")
    share = sum(byte & 1 for byte in vector) / len(resident)
    assert share > 0.99 or share < 0.01, "all of it, or an old kernel"


def test_a_module_is_filled_in_its_place(slabs: HostSlabs) -> None:
    with torch.device("meta"):
        module = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.LayerNorm(4))
    packed = PackedModule(module, list(module)[:2], dtype_of=lambda name: torch.bfloat16)
    packed.place(slabs)
    state = {name: torch.randn(tensor.shape).bfloat16() for name, tensor in module.state_dict().items()}
    for name, tensor in module.state_dict().items():
        assert tensor.dtype == torch.bfloat16
        tensor.copy_(state[name])
    packed.unbind()
    assert all(tensor.is_meta for tensor in module.state_dict().values())
    for index, part in packed.parts.items():
        assert part.host is not None and [place.name.startswith(f"{index}.") for place in part.places] == [
            index != OUTSIDE
        ] * len(part.places)
        part.bind(part.host)
    assert all(torch.equal(tensor, state[name]) for name, tensor in module.state_dict().items())
    packed.give_back(slabs)
    slabs.trim()
    assert not slabs._slabs and all(tensor.is_meta for tensor in module.state_dict().values())


@pytest.mark.parametrize("sides", [(), (7,), (3, 4), (2, 1, 4, 5), (6, 1, 1, 3, 3), (16, 4, 3, 3, 3)])
def test_packed_tensors_keep_the_order_of_their_dimensions(sides: tuple[int, ...]) -> None:
    """As torch would lay out a copy; without asking torch, which imports its compiler for the answer."""
    for order in itertools.permutations(range(len(sides))):
        dense = torch.empty([sides[dim] for dim in order]).permute([order.index(dim) for dim in range(len(sides))])
        gaps = torch.empty([2 * side for side in sides])[tuple(slice(None, None, 2) for _ in sides)]
        for tensor in (dense, gaps):
            module = nn.Module()
            module.register_buffer("x", tensor)
            [place] = PackedModule(module).parts[OUTSIDE].places
            assert place.stride == torch.empty_like(tensor, device="meta").stride()


def test_packing_imports_no_compiler() -> None:
    program = (
        "import sys, torch; from torch import nn; from lightx2v.offload.packed_weights import PackedModule;"
        "before = set(sys.modules);"
        "module = nn.Linear(4, 4, device='meta'); PackedModule(module);"
        "assert not {'sympy', 'torch._inductor', 'torch._dynamo'} & (set(sys.modules) - before)"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
