"""A Triton kernel that computes the weights of GGUF blocks: the same bits as `weights.gguf_blocks.dequantise`.

Each program computes `WEIGHTS` values of consecutive blocks. A value needs a few bytes of its block; neighbours share
them, so they come from the L1 cache. Importing this file imports triton.
"""

# pyright: reportCallIssue=false, reportIndexIssue=false
# A launch takes options of the compiler (num_warps) beside the kernel's own arguments; triton.jit has no type for that.

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..weights.gguf_blocks import IQ4_VALUES, BlockFormat

WEIGHTS = 1024


def dequantise(blocks: Tensor, form: BlockFormat, dtype: torch.dtype) -> Tensor:
    """Weights [rows, columns] in `dtype` from dense uint8 `blocks` [rows, bytes] on a CUDA device."""
    rows, width = blocks.shape
    result = torch.empty(rows, width // form.nbytes * form.size, dtype=dtype, device=blocks.device)
    table = torch.tensor(IQ4_VALUES, dtype=torch.int8, device=blocks.device) if "IQ4" in form.name else blocks
    _dequantise[(triton.cdiv(result.numel(), WEIGHTS),)](
        blocks, table, result, result.numel(), NUMBER=form.number, SIZE=form.size, NBYTES=form.nbytes, COUNT=WEIGHTS,
        num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip
    return result


@triton.jit
def _byte(base, at, valid):
    return tl.load(base + at, mask=valid, other=0).to(tl.int32)


@triton.jit
def _half(base, at, valid):
    return tl.load((base + at).to(tl.pointer_type(tl.float16)), mask=valid, other=0.0).to(tl.float32)


@triton.jit
def _signed(byte):
    """A byte read as int8."""
    return tl.where(byte > 127, byte - 256, byte)


@triton.jit
def _dequantise(
    blocks, table, result, total, NUMBER: tl.constexpr, SIZE: tl.constexpr, NBYTES: tl.constexpr, COUNT: tl.constexpr
):
    place = tl.program_id(0).to(tl.int64) * COUNT + tl.arange(0, COUNT)
    v = place < total
    b = blocks + place // SIZE * NBYTES
    j = (place % SIZE).to(tl.int32)
    if NUMBER == 8:  # Q8_0
        w = _signed(_byte(b, 2 + j, v)).to(tl.float32) * _half(b, 0, v)
    elif NUMBER == 2 or NUMBER == 3:  # Q4_0, Q4_1
        q = (_byte(b, NBYTES - 16 + j % 16, v) >> (j // 16 * 4)) & 15
        if NUMBER == 2:
            w = (q - 8).to(tl.float32) * _half(b, 0, v)
        else:
            w = q.to(tl.float32) * _half(b, 0, v) + _half(b, 2, v)
    elif NUMBER == 6 or NUMBER == 7:  # Q5_0, Q5_1
        q = (_byte(b, NBYTES - 16 + j % 16, v) >> (j // 16 * 4)) & 15
        q = q | (((_byte(b, NBYTES - 20 + j // 8, v) >> (j % 8)) & 1) << 4)
        if NUMBER == 6:
            w = (q - 16).to(tl.float32) * _half(b, 0, v)
        else:
            w = q.to(tl.float32) * _half(b, 0, v) + _half(b, 2, v)
    elif NUMBER == 10:  # Q2_K
        q = (_byte(b, 16 + j // 128 * 32 + j % 32, v) >> (j % 128 // 32 * 2)) & 3
        s = _byte(b, j // 16, v)
        w = (_half(b, 80, v) * (s & 15).to(tl.float32)) * q.to(tl.float32) - _half(b, 82, v) * (s >> 4).to(tl.float32)
    elif NUMBER == 11:  # Q3_K
        q = (_byte(b, 32 + j // 128 * 32 + j % 32, v) >> (j % 128 // 32 * 2)) & 3
        q = q - 4 * (1 - ((_byte(b, j % 32, v) >> (j // 32)) & 1))
        g = j // 16
        s = ((_byte(b, 96 + g % 8, v) >> (g // 8 * 4)) & 15) | (((_byte(b, 104 + g % 4, v) >> (g // 4 * 2)) & 3) << 4)
        w = (_half(b, 108, v) * (s - 32).to(tl.float32)) * q.to(tl.float32)
    elif NUMBER == 12 or NUMBER == 13:  # Q4_K, Q5_K
        q = (_byte(b, NBYTES - 128 + j // 64 * 32 + j % 32, v) >> (j // 32 % 2 * 4)) & 15
        g = j // 32
        if NUMBER == 13:
            q = q | (((_byte(b, 16 + j % 32, v) >> g) & 1) << 4)
        first = _byte(b, 4 + g % 4, v)
        second = _byte(b, 8 + g % 4, v)
        third = _byte(b, 12 + g % 4, v)
        s = tl.where(g < 4, first & 63, (third & 15) | ((first >> 6) << 4))
        m = tl.where(g < 4, second & 63, (third >> 4) | ((second >> 6) << 4))
        w = (_half(b, 0, v) * s.to(tl.float32)) * q.to(tl.float32) - _half(b, 2, v) * m.to(tl.float32)
    elif NUMBER == 14:  # Q6_K
        q = (_byte(b, j // 128 * 64 + j % 64, v) >> (j % 128 // 64 * 4)) & 15
        q = q | (((_byte(b, 128 + j // 128 * 32 + j % 32, v) >> (j % 128 // 32 * 2)) & 3) << 4)
        s = _signed(_byte(b, 192 + j // 16, v))
        w = (_half(b, 208, v) * s.to(tl.float32)) * (q - 32).to(tl.float32)
    else:  # IQ4_NL, IQ4_XS
        q = (_byte(b, NBYTES - SIZE // 2 + j // 32 * 16 + j % 16, v) >> (j % 32 // 16 * 4)) & 15
        q = tl.load(table + q, mask=v, other=0).to(tl.float32)
        if NUMBER == 20:
            w = q * _half(b, 0, v)
        else:
            g = j // 32
            s = ((_byte(b, 4 + g // 2, v) >> (g % 2 * 4)) & 15) | (((_byte(b, 2 + g // 4, v) >> (g % 4 * 2)) & 3) << 4)
            w = (_half(b, 0, v) * (s - 32).to(tl.float32)) * q
    tl.store(result + place, w, mask=v)
