"""Block formats of GGUF files: how many bytes each takes, and how its weights are computed.

A row of weights is a sequence of blocks. Each block holds small integers (codes) in groups, and for each group a scale
and, in some formats, an offset:

    weight = scale * code - offset

`dequantise` gives the same float32 bits as llama.cpp's reference (the `gguf` package), so it multiplies and subtracts
in the same order. The layouts are those of ggml's block structs (MIT licence, ggml-org/llama.cpp, ggml-common.h).

Legend: n blocks, g groups in a block, w weights in a group.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..config.gguf_formats import BLOCKS
from .host_memory import use_huge_pages

Codes = tuple[Tensor, Tensor, Tensor | None]
"""(codes ngw, scale ng1 float32, offset ng1 float32 or None)."""


@dataclass(frozen=True, slots=True)
class BlockFormat:
    """One format: `size` weights in `nbytes` bytes. `number` is its id in a file's tensor list."""

    name: str
    number: int
    size: int
    nbytes: int
    unpack: Callable[[Tensor], Codes]

    def row_bytes(self, columns: int) -> int:
        return columns // self.size * self.nbytes


@dataclass(frozen=True, slots=True)
class BlockWeights:
    """Weights of this shape that are stored in blocks of `form`."""

    form: BlockFormat
    shape: tuple[int, ...]


CPU_WEIGHTS = 1 << 19
"""Weights computed at once on a CPU: few enough that their float32 values stay in its caches, which is several times
faster; enough that the threads of each operation have work for longer than they take to start."""


def dequantise(blocks: Tensor, form: BlockFormat, dtype: torch.dtype = torch.float32) -> Tensor:
    """Weights [rows, columns] in `dtype` from uint8 `blocks` [rows, bytes], computed in float32 and rounded once."""
    rows, width = blocks.shape
    columns = width // form.nbytes * form.size
    result = torch.empty(rows, columns, dtype=dtype, device=blocks.device)
    use_huge_pages(result)
    at_once = max(1, CPU_WEIGHTS // columns) if blocks.device.type == "cpu" else rows
    for target, part in zip(result.split(at_once), blocks.split(at_once), strict=True):
        codes, scale, offset = form.unpack(part.reshape(-1, form.nbytes))
        values = target.view(codes.shape).copy_(codes) if dtype == torch.float32 else codes.float()
        values.mul_(scale)
        if offset is not None:
            values.sub_(offset)
        if dtype != torch.float32:
            target.copy_(values.view(target.shape))
    return result


def _numbers(blocks: Tensor, start: int, stop: int, dtype: torch.dtype) -> Tensor:
    """Bytes `start` to `stop` of every block as numbers of `dtype`, in memory of their own, which is aligned."""
    return blocks[:, start:stop].clone(memory_format=torch.contiguous_format).view(dtype)


def _float16(blocks: Tensor, start: int) -> Tensor:
    """The float16 number at byte `start` of every block, as float32 [n, 1]."""
    return _numbers(blocks, start, start + 2, torch.float16).float()


def _fields(packed_nb: Tensor, run: int, bits: int) -> Tensor:
    """Codes of `bits` bits, uint8 [n, 8 / bits * b / run, run]: in each run first the lowest bits of all its bytes.

    Eight bytes are shifted and masked at a time, as one int64.
    """
    lanes = _numbers(packed_nb, 0, packed_nb.shape[1], torch.int64).unflatten(1, (-1, run // 8))
    mask = 0x0101010101010101 * (2**bits - 1)
    codes = lanes.new_empty(*lanes.shape[:2], 8 // bits, run // 8)
    for place, target in enumerate(codes.unbind(2)):
        torch.bitwise_and(lanes >> (place * bits), mask, out=target)
    return codes.view(torch.uint8).flatten(1, 2)


def _nibbles(packed_nb: Tensor, run: int) -> Tensor:
    """4-bit codes [n, 2 b / run, run]: in each run first all low halves, then all high halves."""
    return _fields(packed_nb, run, 4)


def _fifth_bits(bits_n4: Tensor) -> Tensor:
    """Bit i of the 32-bit number in each row, as 0 or 16: uint8 [n, 2, 16]."""
    places = torch.arange(32, dtype=torch.int32, device=bits_n4.device)
    bits = (_numbers(bits_n4, 0, 4, torch.int32) >> places).bitwise_and_(1).byte()
    return bits.bitwise_left_shift_(4).view(-1, 2, 16)


def _one_group(codes: Tensor) -> Tensor:
    return codes.reshape(len(codes), 1, 32)


def _q8_0(blocks: Tensor) -> Codes:
    return _one_group(blocks[:, 2:].view(torch.int8)), _float16(blocks, 0).unsqueeze(2), None


def _q4_0(blocks: Tensor) -> Codes:
    codes = _nibbles(blocks[:, 2:], 16).view(torch.int8).sub_(8)
    return _one_group(codes), _float16(blocks, 0).unsqueeze(2), None


def _q4_1(blocks: Tensor) -> Codes:
    return _one_group(_nibbles(blocks[:, 4:], 16)), _float16(blocks, 0).unsqueeze(2), -_float16(blocks, 2).unsqueeze(2)


def _q5_0(blocks: Tensor) -> Codes:
    codes = _nibbles(blocks[:, 6:], 16).bitwise_or_(_fifth_bits(blocks[:, 2:6])).view(torch.int8).sub_(16)
    return _one_group(codes), _float16(blocks, 0).unsqueeze(2), None


def _q5_1(blocks: Tensor) -> Codes:
    codes = _nibbles(blocks[:, 8:], 16).bitwise_or_(_fifth_bits(blocks[:, 4:8]))
    return _one_group(codes), _float16(blocks, 0).unsqueeze(2), -_float16(blocks, 2).unsqueeze(2)


def _q2_k(blocks: Tensor) -> Codes:
    packed = blocks[:, :16]
    scale = _float16(blocks, 80) * (packed & 15)
    offset = _float16(blocks, 82) * (packed >> 4)
    codes = _fields(blocks[:, 16:80], 32, 2).view(-1, 16, 16)
    return codes, scale.unsqueeze(2), offset.unsqueeze(2)


def _q3_k(blocks: Tensor) -> Codes:
    packed = blocks[:, 96:108]
    low = torch.cat([packed[:, :8] & 15, packed[:, :8] >> 4], 1)
    high = torch.cat([(packed[:, 8:] >> step) & 3 for step in (0, 2, 4, 6)], 1)
    scale = _float16(blocks, 108) * ((high << 4) | low).view(torch.int8).sub_(32)
    above = _fields(blocks[:, :32], 32, 1).bitwise_xor_(1).bitwise_left_shift_(2)  # a clear bit lowers the code by 4
    codes = _fields(blocks[:, 32:96], 32, 2).view(torch.int8).sub_(above.view(torch.int8))
    return codes.view(-1, 16, 16), scale.unsqueeze(2), None


def _scales_and_offsets(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """The eight scales and offsets of Q4_K and Q5_K: 6 bits each, packed in bytes 4 to 15. Four bytes are shifted and
    masked at a time, as one int32."""
    a, b, c = _numbers(blocks, 4, 16, torch.int32).unbind(1)
    scale = [a & 0x3F3F3F3F, (c & 0x0F0F0F0F) | ((a >> 2) & 0x30303030)]
    offset = [b & 0x3F3F3F3F, ((c >> 4) & 0x0F0F0F0F) | ((b >> 2) & 0x30303030)]
    codes_n28 = torch.stack(scale + offset, 1).view(torch.uint8).unflatten(1, (2, 8))
    scaled_n28 = _numbers(blocks, 0, 4, torch.float16).float().unsqueeze(2) * codes_n28
    return scaled_n28[:, 0].unsqueeze(2), scaled_n28[:, 1].unsqueeze(2)


def _q4_k(blocks: Tensor) -> Codes:
    return _nibbles(blocks[:, 16:], 32), *_scales_and_offsets(blocks)


def _q5_k(blocks: Tensor) -> Codes:
    codes = _nibbles(blocks[:, 48:], 32).bitwise_or_(_fields(blocks[:, 16:48], 32, 1).bitwise_left_shift_(4))
    return codes, *_scales_and_offsets(blocks)


def _q6_k(blocks: Tensor) -> Codes:
    scale = _float16(blocks, 208) * blocks[:, 192:208].view(torch.int8)
    low = _nibbles(blocks[:, :128], 64).view(-1, 8, 32)
    high = _fields(blocks[:, 128:192], 32, 2).bitwise_left_shift_(4)
    codes = low.bitwise_or_(high).view(torch.int8).sub_(32)
    return codes.view(-1, 16, 16), scale.unsqueeze(2), None


IQ4_VALUES = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)


def _iq4_values(codes: Tensor) -> Tensor:
    table = torch.tensor(IQ4_VALUES, dtype=torch.int8, device=codes.device)
    return table.index_select(0, codes.int().flatten()).view(codes.shape)  # several times as fast as table[codes]


def _iq4_nl(blocks: Tensor) -> Codes:
    return _one_group(_iq4_values(_nibbles(blocks[:, 2:], 16))), _float16(blocks, 0).unsqueeze(2), None


def _iq4_xs(blocks: Tensor) -> Codes:
    high = torch.stack([(blocks[:, 2 + group // 4] >> (2 * (group % 4))) & 3 for group in range(8)], 1)
    low = torch.stack([blocks[:, 4:8] & 15, blocks[:, 4:8] >> 4], 2).flatten(1)
    scale = _float16(blocks, 0) * ((high << 4) | low).view(torch.int8).sub_(32)
    codes = _iq4_values(_nibbles(blocks[:, 8:], 16)).view(-1, 8, 32)
    return codes, scale.unsqueeze(2), None


_UNPACK = {
    "Q4_0": _q4_0,
    "Q4_1": _q4_1,
    "Q5_0": _q5_0,
    "Q5_1": _q5_1,
    "Q8_0": _q8_0,
    "Q2_K": _q2_k,
    "Q3_K": _q3_k,
    "Q4_K": _q4_k,
    "Q5_K": _q5_k,
    "Q6_K": _q6_k,
    "IQ4_NL": _iq4_nl,
    "IQ4_XS": _iq4_xs,
}
FORMATS = {name: BlockFormat(name, *BLOCKS[name], unpack) for name, unpack in _UNPACK.items()}
