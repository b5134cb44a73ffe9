"""Triton kernels for FP8 attention: its inputs, also straight from a block's projections, and its output.

Same results as the plain functions of `fp8`. `fp8_inputs` tests them on a device before it uses them, and is the only
module that imports this file and with it triton.

Legend: B batch, L tokens, D width, N heads, H head dim, P = H/2 pairs.
"""

# pyright: reportCallIssue=false, reportPossiblyUnboundVariable=false, reportGeneralTypeIssues=false
# A launch takes compiler options (num_warps) beside the kernel's own arguments; triton.jit has no type for that. A
# compile-time constant decides both where a name is bound and where it is used.

import torch
import triton
import triton.language as tl
from torch import Tensor

from .fp8 import E4M3, LARGEST, SMALLEST_SCALE, CentredFp8, rotation

TILE = 64
"""Tokens of a product: a tensor core takes no fewer."""
HEADS = 20
"""Heads for which a program keeps its tokens' positions."""
CHUNK, ROWS, COLUMNS = 256, 16, 128
"""Tokens of a program that adds up values, those of them at a time, and channels."""


def norm_rotate_fp8(
    x_BLD: Tensor, weight_D: Tensor, eps: float, rotations_L1P: Tensor, scale_BN: Tensor, shift_BNH: Tensor | None
) -> Tensor:
    """RMSNorm over the width, the rotary position, then `rotated`."""
    batch, length, width = x_BLD.shape
    inverse_BL = torch.empty(batch, length, dtype=torch.float32, device=x_BLD.device)
    _inverse_rms[(length, batch)](
        x_BLD, inverse_BL, x_BLD.stride(0), x_BLD.stride(1), length, width, eps, WIDTH=triton.next_power_of_2(width),
        num_warps=8,
    )  # fmt: skip
    x_BLNH = x_BLD.unflatten(-1, (-1, 2 * rotations_L1P.shape[-1]))
    return _rotate_rows(x_BLNH, scale_BN, shift_BNH, (inverse_BL, weight_D, torch.view_as_real(rotations_L1P)))


def rotated(x_BLNH: Tensor, scale_BN: Tensor, shift_BNH: Tensor | None = None) -> Tensor:
    return _rotate_rows(x_BLNH, scale_BN, shift_BNH, None)


def _rotate_rows(
    x_BLNH: Tensor, scale_BN: Tensor, shift_BNH: Tensor | None, norm: tuple[Tensor, Tensor, Tensor] | None
) -> Tensor:
    """`norm` has what makes queries and keys from a projection: the rows' inverse RMS, the weights, the rotations."""
    batch, length, heads, head_dim = x_BLNH.shape
    mixing_HH = rotation(head_dim, x_BLNH.device)
    factor_BN = head_dim**-0.5 / scale_BN
    shift = factor_BN if shift_BNH is None else shift_BNH @ mixing_HH * factor_BN.unsqueeze(-1)
    inverse_BL, weight_D, rotations = norm or (factor_BN, factor_BN, factor_BN)
    out_BLNH = torch.empty(batch, length, heads, head_dim, dtype=E4M3, device=x_BLNH.device)
    _rotate[(triton.cdiv(heads, HEADS), triton.cdiv(length, TILE), batch)](
        x_BLNH, inverse_BL, weight_D, rotations.contiguous(), mixing_HH.half(), factor_BN, shift, out_BLNH,
        *x_BLNH.stride()[:3], length, heads, LARGEST, NORM=norm is not None, SHIFT=shift_BNH is not None, TILE=TILE,
        HEADS=HEADS, HEAD=head_dim, num_warps=4,
    )  # fmt: skip
    return out_BLNH


def centred(v_BLNH: Tensor) -> CentredFp8:
    batch, length, heads, head_dim = v_BLNH.shape
    width, chunks = heads * head_dim, -(-length // CHUNK)
    sums, least, most = torch.empty(3, batch, chunks, width, dtype=torch.float32, device=v_BLNH.device)
    grid, strides = (triton.cdiv(width, COLUMNS), chunks, batch), v_BLNH.stride()[:3]
    sizes = {"CHUNK": CHUNK, "ROWS": ROWS, "COLUMNS": COLUMNS, "HEAD": head_dim, "num_warps": 4}
    _measure[grid](v_BLNH, sums, least, most, *strides, length, width, **sizes)
    mean_BD = sums.sum(1) / length
    reach_BD = torch.maximum(mean_BD - least.amin(1), most.amax(1) - mean_BD)
    scale_BN = (reach_BD.unflatten(1, (heads, head_dim)).amax(2) / LARGEST).clamp_min_(SMALLEST_SCALE)
    out_BLNH = torch.empty(batch, length, heads, head_dim, dtype=E4M3, device=v_BLNH.device)
    _centre[grid](v_BLNH, mean_BD, scale_BN, out_BLNH, sums, *strides, length, width, heads, LARGEST, **sizes)
    return CentredFp8(out_BLNH, scale_BN, (sums.sum(1) / length).unflatten(1, (heads, head_dim)))


def add_mean(out_BLNH: Tensor, mean_BNH: Tensor) -> Tensor:
    batch, length, heads, head_dim = out_BLNH.shape
    width = heads * head_dim
    _add_mean[(triton.cdiv(width, COLUMNS), triton.cdiv(length, CHUNK), batch)](
        out_BLNH, mean_BNH.contiguous(), *out_BLNH.stride()[:3], length, width, CHUNK=CHUNK, ROWS=ROWS,
        COLUMNS=COLUMNS, HEAD=head_dim, num_warps=4,
    )  # fmt: skip
    return out_BLNH


@triton.jit
def _inverse_rms(x, out, x_batch, x_row, length, width, eps, WIDTH: tl.constexpr):
    row, batch = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    at = tl.arange(0, WIDTH)
    value = tl.load(x + batch * x_batch + row * x_row + at, mask=at < width, other=0.0).to(tl.float32)
    tl.store(out + batch * length + row, tl.rsqrt(tl.sum(value * value) / width + eps))


@triton.jit
def _rotate(
    x, inverse, weight, rotations, mixing, factors, shift, out, x_batch, x_row, x_head, length, heads, largest,
    NORM: tl.constexpr, SHIFT: tl.constexpr, TILE: tl.constexpr, HEADS: tl.constexpr, HEAD: tl.constexpr,
):  # fmt: skip
    start, batch = tl.program_id(1).to(tl.int64) * TILE, tl.program_id(2).to(tl.int64)
    rows, at = tl.arange(0, TILE), tl.arange(0, HEAD)
    inside = start + rows < length
    mix = tl.load(mixing + at[:, None] * HEAD + at[None, :])
    if NORM:
        scale = tl.load(inverse + batch * length + start + rows, mask=inside, other=0.0)[:, None]
        turn = tl.load(rotations + (start + rows)[:, None] * HEAD + at[None, :], mask=inside[:, None], other=0.0)
        cosine, sine = tl.split(tl.reshape(turn, (TILE, HEAD // 2, 2)))
    first = tl.program_id(0) * HEADS
    source = x + batch * x_batch + start * x_row + rows[:, None] * x_row + at[None, :]
    target = out + (batch * length + start) * heads * HEAD + rows[:, None] * (heads * HEAD) + at[None, :]
    for head in range(first, min(first + HEADS, heads)):
        # Divided by the scale before the product, no value is too large for fp16.
        factor = tl.load(factors + batch * heads + head)
        value = tl.load(source + head * x_head, mask=inside[:, None], other=0.0).to(tl.float32) * factor
        if NORM:
            value = value * scale * tl.load(weight + head * HEAD + at).to(tl.float32)[None, :]
            real, imaginary = tl.split(tl.reshape(value, (TILE, HEAD // 2, 2)))
            turned = tl.join(real * cosine - imaginary * sine, real * sine + imaginary * cosine)
            value = tl.reshape(turned, (TILE, HEAD))
        mixed = tl.dot(value.to(tl.float16), mix)
        if SHIFT:
            mixed -= tl.load(shift + (batch * heads + head) * HEAD + at)[None, :]
        mixed = tl.minimum(tl.maximum(mixed, -largest), largest)
        tl.store(target + head * HEAD, mixed.to(out.dtype.element_ty), mask=inside[:, None])


@triton.jit
def _measure(
    v, sums, least, most, v_batch, v_row, v_head, length, width,
    CHUNK: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, HEAD: tl.constexpr,
):  # fmt: skip
    start, batch = tl.program_id(1).to(tl.int64) * CHUNK, tl.program_id(2).to(tl.int64)
    rows, column = tl.arange(0, ROWS), tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    source = (
        v + batch * v_batch + start * v_row + rows[:, None] * v_row + (column // HEAD * v_head + column % HEAD)[None]
    )
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    low = tl.full((ROWS, COLUMNS), float("inf"), tl.float32)
    high = tl.full((ROWS, COLUMNS), float("-inf"), tl.float32)
    for step in tl.range(0, CHUNK, ROWS, num_stages=4):
        inside = (start + step + rows < length)[:, None] & (column < width)[None]
        value = tl.load(source + step * v_row, mask=inside, other=0.0).to(tl.float32)
        total += value
        low = tl.minimum(low, tl.where(inside, value, float("inf")))
        high = tl.maximum(high, tl.where(inside, value, float("-inf")))
    place = (batch * tl.num_programs(1) + tl.program_id(1)) * width + column
    tl.store(sums + place, tl.sum(total, 0), mask=column < width)
    tl.store(least + place, tl.min(low, 0), mask=column < width)
    tl.store(most + place, tl.max(high, 0), mask=column < width)


@triton.jit
def _centre(
    v, mean, scales, out, lacking, v_batch, v_row, v_head, length, width, heads, largest,
    CHUNK: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, HEAD: tl.constexpr,
):  # fmt: skip
    start, batch = tl.program_id(1).to(tl.int64) * CHUNK, tl.program_id(2).to(tl.int64)
    rows, column = tl.arange(0, ROWS), tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    source = (
        v + batch * v_batch + start * v_row + rows[:, None] * v_row + (column // HEAD * v_head + column % HEAD)[None]
    )
    target = out + (batch * length + start) * width + rows[:, None] * width + column[None]
    centre = tl.load(mean + batch * width + column, mask=column < width, other=0.0)[None]
    scale = tl.load(scales + batch * heads + column // HEAD, mask=column < width, other=1.0)[None]
    factor = 1.0 / scale
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for step in tl.range(0, CHUNK, ROWS, num_stages=4):
        inside = (start + step + rows < length)[:, None] & (column < width)[None]
        value = tl.load(source + step * v_row, mask=inside, other=0.0).to(tl.float32)
        small = tl.minimum(tl.maximum((value - centre) * factor, -largest), largest).to(out.dtype.element_ty)
        tl.store(target + step * width, small, mask=inside)
        total += tl.where(inside, value - small.to(tl.float32) * scale, 0.0)
    place = (batch * tl.num_programs(1) + tl.program_id(1)) * width + column
    tl.store(lacking + place, tl.sum(total, 0), mask=column < width)


@triton.jit
def _add_mean(
    out, mean, batch_stride, row_stride, head_stride, length, width,
    CHUNK: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, HEAD: tl.constexpr,
):  # fmt: skip
    start, batch = tl.program_id(1).to(tl.int64) * CHUNK, tl.program_id(2).to(tl.int64)
    rows, column = tl.arange(0, ROWS), tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    target = out + batch * batch_stride + start * row_stride + rows[:, None] * row_stride
    target += (column // HEAD * head_stride + column % HEAD)[None]
    more = tl.load(mean + batch * width + column, mask=column < width, other=0.0)[None]
    for step in tl.range(0, CHUNK, ROWS, num_stages=4):
        inside = (start + step + rows < length)[:, None] & (column < width)[None]
        value = tl.load(target + step * row_stride, mask=inside, other=0.0).to(tl.float32) + more
        tl.store(target + step * row_stride, value.to(out.dtype.element_ty), mask=inside)
