"""The element-wise steps between the DiT's matrix products, one function each, computed in float32.

They are memory-bound: `fused` replaces each by one kernel where a device has it. The functions here run everywhere,
also with gradients, and are the reference for the kernels. With gradients disabled, they make float32 copies of a long
video's tokens ROWS at a time: rows do not depend on each other, so the numbers are the same.

Legend: B batch (1 in the modulation when all rows share it), L tokens, D width, N heads, H head dim, P = H/2 pairs,
F feed-forward width.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ..weights.quantization import LARGEST, SMALLEST_ROW
from .rope import rotate

ROWS = 4096
"""Tokens with float32 copies at once: 84 MB at full width. All tokens at 720p would take 1.5 GB."""


def norm_modulate(x_BLD: Tensor, shift_BD: Tensor, scale_BD: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    """LayerNorm(x)·(1 + scale) + shift, rounded to `dtype` at the end."""
    if scale_BD.shape[0] == 1:  # one modulation for all rows: one pass instead of three
        return layer_norm(x_BLD, 1 + scale_BD[0], shift_BD[0], eps, dtype)
    normed = F.layer_norm(x_BLD, x_BLD.shape[-1:], None, None, eps)
    return torch.addcmul(shift_BD.unsqueeze(1), normed, 1 + scale_BD.unsqueeze(1)).to(dtype)


def layer_norm(x_BLD: Tensor, weight_D: Tensor, bias_D: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    """LayerNorm(x)·weight + bias, rounded to `dtype`."""
    if dtype != x_BLD.dtype and (parts := _parts(x_BLD)):
        out_BLD = torch.empty_like(x_BLD, dtype=dtype)
        for where in parts:
            out_BLD[:, where] = layer_norm(x_BLD[:, where], weight_D, bias_D, eps, dtype)
        return out_BLD
    return F.layer_norm(x_BLD, weight_D.shape, weight_D, bias_D, eps).to(dtype)


def normed(x_BLD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """RMSNorm over the whole width, in x's dtype. With gradients disabled, it may overwrite x."""
    if parts := _parts(x_BLD):
        for where in parts:
            x_BLD[:, where] = normed(x_BLD[:, where], weight_D, eps)
        return x_BLD
    return rms_norm(x_BLD, weight_D, eps).to(x_BLD.dtype)


def rms_norm(x_BLD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """RMSNorm over the whole width, float32."""
    if torch.is_grad_enabled() or not x_BLD.is_cpu:
        return F.rms_norm(x_BLD.float(), weight_D.shape, weight_D, eps)
    # torch has no fused kernel for this on CPUs: three passes instead of its five.
    length_BL1 = torch.linalg.vector_norm(x_BLD, dim=-1, keepdim=True, dtype=torch.float32)
    scale_BL1 = length_BL1.square_().div_(x_BLD.shape[-1]).add_(eps).rsqrt_()
    return torch.mul(x_BLD, scale_BL1).mul_(weight_D)


def norm_rotate(x_BLD: Tensor, weight_D: Tensor, eps: float, rotations_L1P: Tensor) -> Tensor:
    """RMSNorm over the whole width, then the rotary position of every head; (B, L, N, H) in x's dtype.

    With gradients disabled, it may overwrite x.
    """
    head_dim = 2 * rotations_L1P.shape[-1]
    if parts := _parts(x_BLD):
        for where in parts:
            x_BLD[:, where] = norm_rotate(x_BLD[:, where], weight_D, eps, rotations_L1P[where]).flatten(2)
        return x_BLD.unflatten(-1, (-1, head_dim))
    normed = rms_norm(x_BLD, weight_D, eps).unflatten(-1, (-1, head_dim))
    return rotate(normed, rotations_L1P).to(x_BLD.dtype)


def _parts(x_BLD: Tensor) -> list[slice]:
    """How to cut the tokens; empty if all are computed at once."""
    tokens = x_BLD.shape[1]
    if tokens <= ROWS or torch.is_grad_enabled():
        return []
    return [slice(start, min(start + ROWS, tokens)) for start in range(0, tokens, ROWS)]


def gelu(x_BLF: Tensor) -> Tensor:
    """GELU in its tanh form. With gradients disabled, it may overwrite x."""
    if torch.is_grad_enabled() or not x_BLF.is_cpu or x_BLF.dtype != torch.float32:
        return F.gelu(x_BLF, approximate="tanh")
    # ½(1 + tanh u) is sigmoid(2u), and on CPUs torch's sigmoid costs a third of its tanh: 9 ms against 16 for 4 million
    # numbers on one core, in pieces that stay in its cache. 2u = x·(linear + cubic·x²).
    linear = 2 * math.sqrt(2 / math.pi)
    start = x_BLF.new_tensor(linear)
    for piece in x_BLF.view(-1).split(1 << 17):
        piece.mul_(torch.addcmul(start, piece, piece, value=0.044715 * linear).mul_(piece).sigmoid_())
    return x_BLF


def add_gated(x_BLD: Tensor, y_BLD: Tensor, gate_BD: Tensor) -> Tensor:
    """x + gate·y in float32. With gradients disabled, it writes the sum into x, which saves 1.5 GB at 720p."""
    if torch.is_grad_enabled():
        return torch.addcmul(x_BLD, y_BLD.float(), gate_BD.unsqueeze(1))
    return x_BLD.addcmul_(y_BLD, gate_BD.unsqueeze(1))


def add(x_BLD: Tensor, y_BLD: Tensor) -> Tensor:
    """x + y in float32. With gradients disabled, it writes the sum into x."""
    return x_BLD + y_BLD if torch.is_grad_enabled() else x_BLD.add_(y_BLD)


def avoid(p_BLD: Tensor, n_BLD: Tensor, scale: float, tau: float, alpha: float) -> Tensor:
    """Normalised attention guidance: away from what a token reads in the negative prompt, n, in p's dtype.

    alpha g + (1 - alpha) p, where g = scale p - (scale - 1) n is made shorter if its sum of absolute values is more
    than tau times that of p (arXiv 2505.21179). With gradients disabled, it may overwrite p.
    """
    if parts := _parts(p_BLD):
        for where in parts:
            p_BLD[:, where] = avoid(p_BLD[:, where], n_BLD[:, where], scale, tau, alpha)
        return p_BLD
    p, n = p_BLD.float(), n_BLD.float()
    g = scale * p - (scale - 1) * n
    most, length = tau * p.abs().sum(-1, keepdim=True), g.abs().sum(-1, keepdim=True)
    g = torch.where(length > most, g * (most / length), g)
    return (alpha * g + (1 - alpha) * p).to(p_BLD.dtype)


def quantise_tokens(x_MI: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The rows in 8 bits and the scale (M, 1) of each, for products with 8-bit weights."""
    largest = LARGEST[dtype]
    scale_M1 = x_MI.abs().amax(1, keepdim=True).float().clamp_(min=SMALLEST_ROW).div_(largest)
    values = (x_MI.float() / scale_M1).clamp_(-largest, largest)
    return (values.round_() if dtype == torch.int8 else values).to(dtype), scale_M1
