"""Triton kernels for the element-wise steps of the DiT: each reads its input once and writes its result once.

Same names, arguments and results as in pointwise.py, up to the order of float32 sums; no gradients, and only tensors
with dense rows. Steps that may overwrite x do. `fused` tests them on a device before it uses them, and is the only
module that imports this file and with it triton.

One program computes one row of D values in registers: widths up to 16384.
"""

# pyright: reportCallIssue=false
# A launch takes compiler options (num_warps) beside the kernel's own arguments; triton.jit has no type for that.

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..weights.quantization import LARGEST, SMALLEST_ROW


def norm_modulate(x_BLD: Tensor, shift_BD: Tensor, scale_BD: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    return _norm(x_BLD, 1 + scale_BD, shift_BD, eps, dtype)


def layer_norm(x_BLD: Tensor, weight_D: Tensor, bias_D: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    return _norm(x_BLD, weight_D[None], bias_D[None], eps, dtype)


def _norm(x_BLD: Tensor, weight_BD: Tensor, bias_BD: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    """Weight and bias have one row for all of x or one for each."""
    batch, length, width = x_BLD.shape
    out_BLD = torch.empty(x_BLD.shape, dtype=dtype, device=x_BLD.device)
    each = 0 if weight_BD.shape[0] == 1 else width
    _layer_norm[(length, batch)](
        x_BLD, weight_BD.contiguous(), bias_BD.contiguous(), out_BLD, x_BLD.stride(0), x_BLD.stride(1),
        out_BLD.stride(0), each, width, eps, WIDTH=triton.next_power_of_2(width), num_warps=8,
    )  # fmt: skip
    return out_BLD


def normed(x_BLD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    batch, length, width = x_BLD.shape
    _rms_norm[(length, batch)](
        x_BLD, weight_D, x_BLD, x_BLD.stride(0), x_BLD.stride(1), width, 2, eps, ROTATE=False,
        WIDTH=triton.next_power_of_2(width), num_warps=8,
    )  # fmt: skip
    return x_BLD


def norm_rotate(x_BLD: Tensor, weight_D: Tensor, eps: float, rotations_L1P: Tensor) -> Tensor:
    batch, length, width = x_BLD.shape
    head_dim = 2 * rotations_L1P.shape[-1]
    _rms_norm[(length, batch)](
        x_BLD, weight_D, torch.view_as_real(rotations_L1P.contiguous()), x_BLD.stride(0), x_BLD.stride(1), width,
        head_dim, eps, ROTATE=True, WIDTH=triton.next_power_of_2(width), num_warps=8,
    )  # fmt: skip
    return x_BLD.unflatten(-1, (-1, head_dim))


def add(x_BLD: Tensor, y_BLD: Tensor) -> Tensor:
    return add_gated(x_BLD, y_BLD, None)


def add_gated(x_BLD: Tensor, y_BLD: Tensor, gate_BD: Tensor | None) -> Tensor:
    batch, length, width = x_BLD.shape
    each = 0 if gate_BD is None or gate_BD.shape[0] == 1 else width
    gate = x_BLD if gate_BD is None else gate_BD.contiguous()
    _add_gated[(length, batch)](
        x_BLD, y_BLD, gate, x_BLD.stride(0), x_BLD.stride(1), y_BLD.stride(0), y_BLD.stride(1), each, width,
        GATED=gate_BD is not None, WIDTH=triton.next_power_of_2(width), num_warps=8,
    )  # fmt: skip
    return x_BLD


def avoid(p_BLD: Tensor, n_BLD: Tensor, scale: float, tau: float, alpha: float) -> Tensor:
    batch, length, width = p_BLD.shape
    _avoid[(length, batch)](
        p_BLD, n_BLD, p_BLD.stride(0), p_BLD.stride(1), n_BLD.stride(0), n_BLD.stride(1), width, scale, tau, alpha,
        WIDTH=triton.next_power_of_2(width), num_warps=8,
    )  # fmt: skip
    return p_BLD


def quantise_tokens(x_MI: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    rows, width = x_MI.shape
    q_MI = torch.empty(x_MI.shape, dtype=dtype, device=x_MI.device)
    scale_M1 = torch.empty(rows, 1, dtype=torch.float32, device=x_MI.device)
    _quantise[(rows,)](
        x_MI, q_MI, scale_M1, x_MI.stride(0), width, LARGEST[dtype], SMALLEST_ROW, WHOLE=dtype == torch.int8,
        WIDTH=triton.next_power_of_2(width), num_warps=8 if width <= 8192 else 16,
    )  # fmt: skip
    return q_MI, scale_M1


@triton.jit
def _layer_norm(x, weight, bias, out, x_batch, x_row, out_batch, each, width, eps, WIDTH: tl.constexpr):
    row, batch = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    at = tl.arange(0, WIDTH)
    inside = at < width
    value = tl.load(x + batch * x_batch + row * x_row + at, mask=inside, other=0.0).to(tl.float32)
    centred = tl.where(inside, value - tl.sum(value) / width, 0.0)
    normed = centred * tl.rsqrt(tl.sum(centred * centred) / width + eps)
    w = tl.load(weight + batch * each + at, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(bias + batch * each + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + batch * out_batch + row * width + at, (normed * w + b).to(out.dtype.element_ty), mask=inside)


@triton.jit
def _rms_norm(x, weight, rotations, x_batch, x_row, width, head_dim, eps, ROTATE: tl.constexpr, WIDTH: tl.constexpr):
    row, batch = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    at = tl.arange(0, WIDTH)
    inside = at < width
    start = x + batch * x_batch + row * x_row
    value = tl.load(start + at, mask=inside, other=0.0).to(tl.float32)
    value = value * tl.rsqrt(tl.sum(value * value) / width + eps)
    value = value * tl.load(weight + at, mask=inside, other=0.0).to(tl.float32)
    if ROTATE:  # neighbours are real and imaginary parts, of the head's values and of the rotations
        turn = tl.load(rotations + row * head_dim + at % head_dim, mask=inside, other=0.0)
        real, imaginary = tl.split(tl.reshape(value, (WIDTH // 2, 2)))
        cosine, sine = tl.split(tl.reshape(turn, (WIDTH // 2, 2)))
        turned = tl.join(real * cosine - imaginary * sine, real * sine + imaginary * cosine)
        value = tl.reshape(turned, (WIDTH,))
    tl.store(start + at, value.to(x.dtype.element_ty), mask=inside)


@triton.jit
def _add_gated(x, y, gate, x_batch, x_row, y_batch, y_row, each, width, GATED: tl.constexpr, WIDTH: tl.constexpr):
    row, batch = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    at = tl.arange(0, WIDTH)
    inside = at < width
    target = x + batch * x_batch + row * x_row + at
    value = tl.load(y + batch * y_batch + row * y_row + at, mask=inside, other=0.0).to(tl.float32)
    if GATED:
        value = value * tl.load(gate + batch * each + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(target, tl.load(target, mask=inside, other=0.0) + value, mask=inside)


@triton.jit
def _avoid(p, n, p_batch, p_row, n_batch, n_row, width, scale, tau, alpha, WIDTH: tl.constexpr):
    row, batch = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    at = tl.arange(0, WIDTH)
    inside = at < width
    target = p + batch * p_batch + row * p_row + at
    value = tl.load(target, mask=inside, other=0.0).to(tl.float32)
    other = tl.load(n + batch * n_batch + row * n_row + at, mask=inside, other=0.0).to(tl.float32)
    away = scale * value - (scale - 1.0) * other
    most, length = tau * tl.sum(tl.abs(value)), tl.sum(tl.abs(away))
    away = away * tl.where(length > most, most / length, 1.0)
    tl.store(target, (alpha * away + (1.0 - alpha) * value).to(p.dtype.element_ty), mask=inside)


@triton.jit
def _quantise(x, q, scales, x_row, width, largest, smallest, WHOLE: tl.constexpr, WIDTH: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, WIDTH)
    inside = at < width
    value = tl.load(x + row * x_row + at, mask=inside, other=0.0).to(tl.float32)
    scale = tl.maximum(tl.max(tl.abs(value)), smallest) / largest
    value = tl.minimum(tl.maximum(value / scale, -largest), largest)
    if WHOLE:  # to the nearest whole number, ties to even: 1.5 x 2^23 leaves no bits for a fraction
        value = (value + 12582912.0) - 12582912.0
    tl.store(q + row * width + at, value.to(q.dtype.element_ty), mask=inside)
    tl.store(scales + row, scale)
