"""The memory model against a forward of the real size, on the meta device, where tensors have sizes and no bytes.

Every storage that an operation allocates counts until it is freed.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lightx2v.cost.memory_bytes import denoise_bytes, rife_bytes
from lightx2v.cost.memory_plan import GIB, ModelSize, Workload
from lightx2v.models import fused, pointwise
from lightx2v.models.dit import DiTConfig, WanDiT, parameter_dtype
from lightx2v.models.quant_linear import swap_linears
from lightx2v.models.rife import Rife
from lightx2v.weights.quant_layout import is_expert_matrix

LAYERS = 2
SHAPES = {"720p": (16, 21, 90, 160), "480p": (16, 21, 60, 104), "480p, 33 frames": (16, 9, 60, 104)}
BF16 = ModelSize(dit=DiTConfig(num_layers=LAYERS))


class PeakMemory(TorchDispatchMode):
    """The largest sum of bytes of the storages that operations made and that were alive at the same time."""

    def __init__(self) -> None:
        super().__init__()
        self.alive: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        given = {leaf.untyped_storage()._cdata for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        self.alive = {key: entry for key, entry in self.alive.items() if not entry[0].expired()}
        for leaf in tree_leaves(made):
            if isinstance(leaf, Tensor):
                storage = leaf.untyped_storage()
                if storage._cdata not in given and storage._cdata not in self.alive:
                    self.alive[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self.peak = max(self.peak, sum(size for _, size in self.alive.values()))
        return made


def in_place() -> SimpleNamespace:
    """Kernels that need the memory of ours."""
    return SimpleNamespace(
        norm_modulate=lambda x, shift, scale, eps, dtype: torch.empty_like(x, dtype=dtype),
        layer_norm=lambda x, weight, bias, eps, dtype: torch.empty_like(x, dtype=dtype),
        normed=lambda x, weight, eps: x,
        norm_rotate=lambda x, weight, eps, rotations: x.unflatten(-1, (-1, 2 * rotations.shape[-1])),
        add_gated=lambda x, y, gate: x,
        add=lambda x, y: x,
        quantise_tokens=pointwise.quantise_tokens,
    )


@pytest.fixture(params=["plain", "fused"])
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())  # the meta device has none
    if request.param == "fused":
        monkeypatch.setattr(fused, "_kernels", lambda x, step: in_place())
    yield request.param


def peak(
    shape: tuple[int, ...], branches: int, *, sequential_cfg: bool, cache_text_kv: bool, quantised: bool = False
) -> int:
    with torch.device("meta"):
        dit = WanDiT(DiTConfig(num_layers=LAYERS), self_attention=lambda q, k, v: torch.empty_like(q)).eval()
        dit.requires_grad_(False).cast(torch.bfloat16)
        if quantised:
            names = [name for name, p in dit.named_parameters() if is_expert_matrix(name, tuple(p.shape))]
            swap_linears(dit, dict.fromkeys(names, torch.float8_e4m3fn))
            for name, parameter in dit.named_parameters():
                if name.endswith("bias"):
                    parameter.data = parameter.data.to(parameter_dtype(name, torch.bfloat16))
        latents, prompt = torch.empty(shape), torch.empty(512, 4096)
    dit.cross_attention = lambda q, k, v: torch.empty_like(q)
    dit.sequential_cfg, dit.cache_text_kv = sequential_cfg, cache_text_kv
    with torch.inference_mode(), PeakMemory() as memory:
        dit(latents, 900.0, [dit.encode_text(prompt) for _ in range(branches)])
    return memory.peak


@pytest.mark.slow
@pytest.mark.parametrize(
    ("size", "branches", "sequential_cfg"),
    [("720p", 1, False), ("720p", 2, False), ("720p", 2, True), ("480p", 2, False), ("480p, 33 frames", 2, False)],
)
def test_a_forward_takes_what_is_counted(kernels: str, size: str, branches: int, sequential_cfg: bool) -> None:
    counted = denoise_bytes(
        BF16,
        Workload.of(SHAPES[size], guided=branches == 2),
        sequential_cfg=sequential_cfg,
        cache_text_kv=not sequential_cfg,
    )
    taken = peak(SHAPES[size], branches, sequential_cfg=sequential_cfg, cache_text_kv=not sequential_cfg)
    assert 0.97 * counted <= taken <= 1.02 * counted, (taken / GIB, counted / GIB)


@pytest.mark.slow
def test_8_bit_weights_that_are_widened_take_no_more_than_is_counted(kernels: str) -> None:
    counted = denoise_bytes(ModelSize(dit=BF16.dit, weight=1), Workload.of(SHAPES["720p"], guided=True))
    taken = peak(SHAPES["720p"], 2, sequential_cfg=False, cache_text_kv=True, quantised=True)
    assert 0.9 * counted <= taken <= counted


@pytest.mark.slow
@pytest.mark.parametrize(("height", "width"), [(720, 1280), (480, 832), (32, 48)])
def test_rife_takes_what_is_counted(height: int, width: int) -> None:
    counted = rife_bytes(Workload.of((16, 1, height // 8, width // 8), guided=False))
    padded = [-(-side // 64) * 64 for side in (height, width)]
    with torch.device("meta"), torch.inference_mode(), PeakMemory() as memory:
        rife, first, second = Rife(), torch.empty(1, 3, *padded), torch.empty(1, 3, *padded)
        rife(first, second, rife.features(first), rife.features(second), 0.5)
    assert 0.97 * counted <= memory.peak <= 1.03 * counted, (memory.peak / GIB, counted / GIB)
