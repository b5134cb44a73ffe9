"""Queries, keys and values in bf16 to the FP8 inputs of attention, by kernels where the device has them.

On CUDA with triton the kernels of triton_fp8.py replace the plain functions of fp8.py once they have agreed with them
on this device.

Legend: B batch, L tokens, N heads, H head dim.
"""

import logging
import math
from functools import cache
from types import ModuleType

import torch
from torch import Tensor

from ..config.folders import use_kernel_cache
from . import fp8
from .fp8 import LARGEST, SMALLEST_SCALE, CentredFp8, Fp8

log = logging.getLogger("lightx2v.fp8_attention")

SAMPLED = 64
"""One key in this many decides what all keys lose. Any vector would be right; the mean is the best."""

TOLERANCE = 0.1
"""The relative difference that one step of e4m3 explains; triton's interpreter rounds to it towards zero."""

FAILURES = (ImportError, OSError, RuntimeError, ValueError, TypeError, AttributeError, AssertionError)
"""What triton raises where it does not fit."""


def rows_to_fp8(x_BLNH: Tensor, *, centre: bool = False) -> Fp8:
    """Queries, or with `centre` keys.

    The scale comes from the longest row: no rotation makes it longer, and less a mean it is at most twice as long.
    """
    shift_BNH = x_BLNH[:, ::SAMPLED].float().mean(1) if centre else None
    longest_BN = torch.linalg.vector_norm(x_BLNH, dim=-1, dtype=torch.float32).amax(1)
    scale_BN = (longest_BN * ((1 + centre) / LARGEST)).clamp_min_(SMALLEST_SCALE)
    return Fp8(kernels(x_BLNH).rotated(x_BLNH, scale_BN, shift_BNH), scale_BN)


def values_to_fp8(v_BLNH: Tensor) -> CentredFp8:
    return kernels(v_BLNH).centred(v_BLNH)


def add_mean(out_BLNH: Tensor, mean_BNH: Tensor) -> Tensor:
    """Adds to `out` itself."""
    return kernels(out_BLNH).add_mean(out_BLNH, mean_BNH)


def kernels(x_BLNH: Tensor) -> ModuleType:
    """The module whose functions suit this tensor: triton_fp8 or fp8."""
    if x_BLNH.device.type != "cuda" or torch.is_grad_enabled() or x_BLNH.stride(-1) != 1 or x_BLNH.shape[-1] < 16:
        return fp8
    return kernels_for(x_BLNH.device) or fp8


@cache
def kernels_for(device: torch.device) -> ModuleType | None:
    """The kernels if they are correct on this device, else None. Logs the reason once."""
    try:
        use_kernel_cache()
        from . import triton_fp8

        why = why_not(triton_fp8, device)
    except FAILURES as failure:
        why = (str(failure).splitlines() or [type(failure).__name__])[0][:120]
        triton_fp8 = None
    log.info("Kernels for the inputs of FP8 attention: %s", f"no ({why})" if why else "triton")
    return None if why else triton_fp8


@torch.no_grad()
def why_not(kernels: ModuleType, device: torch.device) -> str:
    """The kernel that differs from its plain function on this device, or "". Tries gaps between rows and heads."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device)

    batch, length, heads, head_dim = 2, 331, 5, 128
    x_BLNH = draw(batch, length, heads + 1, head_dim + 8).bfloat16()[..., 1:, :head_dim]
    mean_BNH, scale_BN = 2 * draw(batch, heads, head_dim), draw(batch, heads).abs() / 50 + 0.01
    v_BLNH = x_BLNH + mean_BNH.unsqueeze(1).bfloat16()
    for name, x, args in (
        ("rotated", x_BLNH, (scale_BN,)),
        ("rotated", x_BLNH, (scale_BN, mean_BNH)),
        ("centred", v_BLNH, ()),
        ("add_mean", x_BLNH, (mean_BNH,)),
    ):
        results = [getattr(each, name)(x.clone() if name == "add_mean" else x, *args) for each in (kernels, fp8)]
        got, expected = (result if isinstance(result, tuple) else (result,) for result in results)
        for mine, right in zip(got, expected, strict=True):
            if not (difference := difference_of(mine, right)) <= TOLERANCE:
                return f"{name} is off by {difference:.1e}"
    return ""


def difference_of(got: Tensor, expected: Tensor) -> float:
    """Relative; NaN for another shape."""
    if got.shape != expected.shape:
        return math.nan
    return ((got.float() - expected.float()).norm() / expected.float().norm()).item()
