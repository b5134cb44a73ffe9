"""FP8 inputs of attention: queries and keys rotated, keys and values without their mean over the tokens.

As they come, e4m3 values spoil attention: a few large channels take the bits of all others, and Hopper's tensor cores
add up so few bits that values with a mean lose up to half of it. What is done here changes nothing in exact arithmetic:

- Queries and keys are multiplied by the same orthogonal matrix, which spreads large channels over the whole head.
- All keys lose the same vector, which shifts all scores of a query alike.
- The values lose their mean, and the output gets it back, together with the mean of what rounding took.

These functions run everywhere; the kernels of triton_fp8.py are compared with them.

Legend: B batch, L tokens, N heads, H head dim.
"""

from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

E4M3 = torch.float8_e4m3fn
LARGEST = torch.finfo(E4M3).max
SMALLEST_SCALE = 1e-20
"""Zeros get this scale."""


class Fp8(NamedTuple):
    """values · scale, for e4m3 values (B, L, N, H) and a float32 scale (B, N) for each head."""

    values: Tensor
    scale_BN: Tensor


class CentredFp8(NamedTuple):
    """Values without their mean, and the float32 mean (B, N, H) of what the e4m3 values lack."""

    values: Tensor
    scale_BN: Tensor
    lacking_BNH: Tensor


@cache
def rotation(head_dim: int, device: torch.device) -> Tensor:
    """A Hadamard matrix with random signs, (H, H) of float32 ±1: the orthogonal matrix times √H. Always the same."""
    if head_dim & (head_dim - 1):
        raise ValueError(f"heads of {head_dim} have no Hadamard matrix; a power of two is needed")
    made = torch.ones(1, 1)
    while len(made) < head_dim:
        made = torch.cat([torch.cat([made, made], dim=1), torch.cat([made, -made], dim=1)])
    signs = torch.randint(0, 2, (head_dim, 1), generator=torch.Generator("cpu").manual_seed(0)) * 2 - 1
    return (signs * made).to(device)


def rotated(x_BLNH: Tensor, scale_BN: Tensor, shift_BNH: Tensor | None = None) -> Tensor:
    """x, less the shift, rotated and divided by the scale, as e4m3. What is too large for that becomes its largest."""
    head_dim = x_BLNH.shape[-1]
    x_BLNH = x_BLNH.float() if shift_BNH is None else x_BLNH.float() - shift_BNH.unsqueeze(1)
    x_BLNH = x_BLNH @ rotation(head_dim, x_BLNH.device)
    return to_e4m3(x_BLNH.mul_((head_dim**-0.5 / scale_BN)[:, None, :, None]))


def centred(v_BLNH: Tensor) -> CentredFp8:
    mean_BNH = v_BLNH.float().mean(1)
    less_BLNH = v_BLNH.float() - mean_BNH.unsqueeze(1)
    scale_BN = (less_BLNH.abs().amax((1, 3)) / LARGEST).clamp_min_(SMALLEST_SCALE)
    values = to_e4m3(less_BLNH / scale_BN[:, None, :, None])
    lacking_BNH = (v_BLNH.float() - values.float() * scale_BN[:, None, :, None]).mean(1)
    return CentredFp8(values, scale_BN, lacking_BNH)


def add_mean(out_BLNH: Tensor, mean_BNH: Tensor) -> Tensor:
    """Adds to `out` itself, in float32."""
    return out_BLNH.add_(mean_BNH.unsqueeze(1))


def to_e4m3(x: Tensor) -> Tensor:
    return x.clamp(-LARGEST, LARGEST).to(E4M3)
