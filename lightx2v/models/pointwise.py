"""The element-wise steps between the DiT's matrix products, all in float32 inside, each one function.

They are memory-bound: a fused kernel for a device can stand in for any of them, with the same signature and result.
Legend: B batch (1 in the modulation when all rows share it), L tokens, D width, N heads, H head dim, P = H/2 pairs.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .rope import rotate


def norm_modulate(x_BLD: Tensor, shift_BD: Tensor, scale_BD: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    """LayerNorm(x)·(1 + scale) + shift, rounded to `dtype` at the end."""
    if scale_BD.shape[0] == 1:
        # With one modulation for all rows it is a LayerNorm with this weight and bias: one pass instead of three.
        return F.layer_norm(x_BLD, x_BLD.shape[-1:], 1 + scale_BD[0], shift_BD[0], eps).to(dtype)
    normed = F.layer_norm(x_BLD, x_BLD.shape[-1:], None, None, eps)
    return torch.addcmul(shift_BD.unsqueeze(1), normed, 1 + scale_BD.unsqueeze(1)).to(dtype)


def rms_norm(x_BLD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """RMSNorm over the whole width, float32."""
    return F.rms_norm(x_BLD.float(), weight_D.shape, weight_D, eps)


def norm_rotate(x_BLD: Tensor, weight_D: Tensor, eps: float, rotations_L1P: Tensor) -> Tensor:
    """RMSNorm over the whole width, then the rotary position of every head; (B, L, N, H) in x's dtype."""
    head_dim = 2 * rotations_L1P.shape[-1]
    normed = rms_norm(x_BLD, weight_D, eps).unflatten(-1, (-1, head_dim))
    return rotate(normed, rotations_L1P).to(x_BLD.dtype)


def add_gated(x_BLD: Tensor, y_BLD: Tensor, gate_BD: Tensor) -> Tensor:
    """x + gate·y in float32. Without gradients the sum is written into x: at 720p that saves 1.5 GB."""
    if torch.is_grad_enabled():
        return torch.addcmul(x_BLD, y_BLD.float(), gate_BD.unsqueeze(1))
    return x_BLD.addcmul_(y_BLD, gate_BD.unsqueeze(1))


def add(x_BLD: Tensor, y_BLD: Tensor) -> Tensor:
    """x + y in float32. Without gradients the sum is written into x."""
    return x_BLD + y_BLD if torch.is_grad_enabled() else x_BLD.add_(y_BLD)
