"""FP8 queries and keys straight from a block's projections: norm, position, rotation and 8 bits in one kernel.

attention/fp8.py says what FP8 attention needs. Its kernel for all of this replaces the plain functions on CUDA once it
has agreed with them on this device.

Legend: B batch, L tokens, D width, N heads, H head dim, P = H/2 pairs.
"""

from functools import cache
from types import ModuleType

import torch
from torch import Tensor

from ..attention.fp8 import LARGEST, SMALLEST_SCALE, Fp8, rotated
from ..attention.fp8_inputs import FAILURES, SAMPLED, TOLERANCE, difference_of, kernels_for
from .fused import WIDEST, norm_rotate


def rotary_fp8(x_BLD: Tensor, weight_D: Tensor, eps: float, rotations_L1P: Tensor, *, centre: bool = False) -> Fp8:
    """RMSNorm over the width and the rotary position, as FP8 queries or, with `centre`, keys. It may overwrite x.

    No row of a head is longer than √D times its largest weight, and no rotation makes it longer, so the scale comes
    from the weights; less their mean, keys are at most twice as long.
    """
    head_dim = 2 * rotations_L1P.shape[-1]
    largest_N = weight_D.float().abs().unflatten(0, (-1, head_dim)).amax(1)
    scale_N = (largest_N * ((1 + centre) * weight_D.numel() ** 0.5 / LARGEST)).clamp_min_(SMALLEST_SCALE)
    scale_BN = scale_N.expand(len(x_BLD), -1)
    shift_BNH = None
    if centre:
        sample_BLD, places = x_BLD[:, ::SAMPLED].contiguous(), rotations_L1P[::SAMPLED]
        shift_BNH = norm_rotate(sample_BLD, weight_D, eps, places).float().mean(1)
    args = (x_BLD, weight_D, eps, rotations_L1P, scale_BN, shift_BNH)
    fused = _kernels(x_BLD, head_dim)
    return Fp8(fused.norm_rotate_fp8(*args) if fused else norm_rotate_fp8(*args), scale_BN)


def norm_rotate_fp8(
    x_BLD: Tensor, weight_D: Tensor, eps: float, rotations_L1P: Tensor, scale_BN: Tensor, shift_BNH: Tensor | None
) -> Tensor:
    """RMSNorm, rotary position and `rotated`: e4m3 (B, L, N, H)."""
    return rotated(norm_rotate(x_BLD, weight_D, eps, rotations_L1P), scale_BN, shift_BNH)


def _kernels(x_BLD: Tensor, head_dim: int) -> ModuleType | None:
    if x_BLD.device.type != "cuda" or torch.is_grad_enabled() or x_BLD.stride(-1) != 1:
        return None
    if head_dim < 16 or x_BLD.shape[-1] > WIDEST:
        return None
    return tested_kernels(x_BLD.device)


@cache
def tested_kernels(device: torch.device) -> ModuleType | None:
    """The kernels of FP8 attention if this one is correct on the device too, else None."""
    found = kernels_for(device)
    try:
        return None if found is None or why_not(found, device) else found
    except FAILURES:
        return None


@torch.no_grad()
def why_not(kernels: ModuleType, device: torch.device) -> str:
    """Why the kernel is not right on this device, or ""."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device)

    batch, length, heads, head_dim = 2, 331, 3, 128
    width = heads * head_dim
    x_BLD = draw(batch, length, width + 8).bfloat16()[..., :width]  # with gaps between its rows
    weight_D, shift_BNH, scale_BN = draw(width), draw(batch, heads, head_dim), draw(batch, heads).abs() / 50 + 0.01
    rotations_L1P = torch.polar(torch.ones(length, 1, head_dim // 2), draw(length, 1, head_dim // 2).cpu()).to(device)
    for shift in (None, shift_BNH):
        args = (weight_D, 1e-6, rotations_L1P, scale_BN, shift)
        got = kernels.norm_rotate_fp8(x_BLD, *args)
        if not (difference := difference_of(got, norm_rotate_fp8(x_BLD.clone(), *args))) <= TOLERANCE:
            return f"norm_rotate_fp8 is off by {difference:.1e}"
    return ""
