"""Matrices in 8 bits with a scale per output channel: made, read back, and found in files of several dialects.

    W[o, i] ~ q[o, i] * scale[o]        q float8 e4m3 (largest 448) or int8 (127), scale float32

Files of LightX2V keep the scale beside the weight as `X.weight_scale` [out, 1], ComfyUI's as one number
`X.scale_weight`; both become the first here. A quantised weight without a good scale is an error: a scale of 1 would
give noise.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import CheckpointError

FORMATS = {"fp8": torch.float8_e4m3fn, "int8": torch.int8}
QUANTISED = (torch.float8_e4m3fn, torch.float8_e5m2, torch.int8)
LARGEST = {torch.float8_e4m3fn: 448.0, torch.float8_e5m2: 57344.0, torch.int8: 127.0}
GATE = 0.999
"""The least cosine of a layer's quantised weights to the weights themselves; e4m3 gives 0.9996, whatever their size."""
SMALLEST_ROW = 1e-5
"""A row of zeros gets the scale of this largest value, as in LightX2V's converter."""

ROWS = {"cpu": 64}
"""Rows made at once: 64 x 5120 float32 values stay in a processor's cache, which is several times faster."""
MANY_ROWS = 4096
"""The same on accelerators, where it bounds memory only."""

SCALE = ".weight_scale"
_SCALES = (SCALE, ".scale_weight")
_MARKERS = re.compile(r"(.*\.)?(scaled_fp8|scale_input|input_scale|comfy_quant|spiece_model)")
"""What other programs keep beside quantised weights and nobody needs here: activations are scaled as they come."""


def scheme_format(scheme: str | None) -> torch.dtype:
    """The dtype that a scheme such as "fp8-sgl" stores."""
    return FORMATS[(scheme or "fp8").partition("-")[0]]


def quantise(weight_OI: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(q_OI in `dtype`, scale_O1 float32), a scale per row. ValueError where a weight is not finite."""
    largest = LARGEST[dtype]
    q_OI = torch.empty(weight_OI.shape, dtype=dtype, device=weight_OI.device)
    scale_O1 = torch.empty(weight_OI.shape[0], 1, dtype=torch.float32, device=weight_OI.device)
    rows = ROWS.get(weight_OI.device.type, MANY_ROWS)
    room = torch.empty(min(rows, len(weight_OI)), weight_OI.shape[1], dtype=torch.float32, device=weight_OI.device)
    for values, q, scale in zip(weight_OI.split(rows), q_OI.split(rows), scale_O1.split(rows), strict=True):
        scale.copy_(values.abs().amax(dim=1, keepdim=True)).clamp_(min=SMALLEST_ROW).div_(largest)
        # No clamp: a quotient passes `largest` by a rounding error at most, and both casts bring that back.
        scaled = room[: len(values)].copy_(values).div_(scale)
        q.copy_(scaled.round_() if dtype == torch.int8 else scaled)
    if not bool(torch.isfinite(scale_O1).all()):
        raise ValueError("it holds NaN or infinity")
    return q_OI, scale_O1


def dequantise(q: Tensor, scale_O1: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """The weights in `dtype`, multiplied in float32 and rounded once. `q` has the scales' rows, and any shape."""
    result = torch.empty(q.shape, dtype=dtype, device=q.device)
    rows = ROWS.get(q.device.type, MANY_ROWS)
    scales = scale_O1.view(-1, *[1] * (q.dim() - 1))
    for target, part, scale in zip(result.split(rows), q.split(rows), scales.split(rows), strict=True):
        target.copy_(widen(part).mul_(scale))
    return result


def cosine(weight_OI: Tensor, q_OI: Tensor, scale_O1: Tensor) -> float:
    """How close quantised weights are to what they were made from: 1 is the same direction."""
    rows = ROWS.get(weight_OI.device.type, MANY_ROWS)
    sums = torch.zeros(3, dtype=torch.float64, device=weight_OI.device)
    for values, q, scale in zip(weight_OI.split(rows), q_OI.split(rows), scale_O1.split(rows), strict=True):
        exact, back = values.float().flatten(), widen(q).mul_(scale).flatten()
        sums += torch.stack([exact @ back, exact @ exact, back @ back]).double()
    both, exact_2, back_2 = sums.tolist()
    return both / (exact_2 * back_2) ** 0.5 if exact_2 and back_2 else float(exact_2 == back_2)


def widen(q: Tensor) -> Tensor:
    """8-bit values as float32, exactly, in new memory. On a CPU e4m3 is cast by integer instructions, which is faster.

    e4m3 and float16 differ in the place and the bias of the exponent: move the bits, then multiply by 2^(15 - 7).
    """
    if q.dtype != torch.float8_e4m3fn or q.device.type != "cpu":
        return q.float()
    bits = q.view(torch.int8).to(torch.int16).bitwise_left_shift_(7).bitwise_and_(~0x4000)
    return bits.view(torch.float16).float().mul_(256.0)


@dataclass(frozen=True, slots=True)
class QuantLayout:
    """How a file stores its quantised weights. `scales` maps each such weight to its scale, `extras` serve nobody."""

    scales: dict[str, str]
    extras: frozenset[str]


def read_layout(shapes: Mapping[str, tuple[int, ...]], dtypes: Mapping[str, torch.dtype], source: str) -> QuantLayout:
    """From a file's names, shapes and dtypes. CheckpointError names the first weight whose scale is missing or odd."""
    scales: dict[str, str] = {}
    for name, dtype in dtypes.items():
        if dtype not in QUANTISED or _MARKERS.fullmatch(name):
            continue
        stem = name.removesuffix(".weight")
        found = [stem + suffix for suffix in _SCALES if stem != name and stem + suffix in shapes]
        if not found:
            raise CheckpointError(
                f"{source}: {name} is stored in {str(dtype).removeprefix('torch.')} without a scale "
                f"(expected {stem}{SCALE}). Take a file with scales, or the bf16 one."
            )
        shape, rows = shapes[found[0]], shapes[name][0] if shapes[name] else 0
        if shape not in ((), (1,), (1, 1), (rows,), (rows, 1)):
            raise CheckpointError(
                f"{source}: {found[0]} has shape {list(shape)}, expected [{rows}, 1]: one scale per row, or one in all."
            )
        scales[name] = found[0]
    orphans = {name for name in shapes if name.endswith(_SCALES)} - set(scales.values())
    if orphans:
        name = min(orphans)
        raise CheckpointError(f"{source}: {name} has no quantised weight beside it. The file is mixed up.")
    return QuantLayout(scales, frozenset(name for name in shapes if _MARKERS.fullmatch(name)))


def check_scale(scale: Tensor, rows: int, name: str, source: str) -> Tensor:
    """The scale as float32 [rows, 1]; CheckpointError unless all are finite and above zero."""
    scale_O1 = scale.float().reshape(-1, 1).expand(rows, 1)
    good = torch.isfinite(scale_O1) & (scale_O1 > 0)
    if not bool(good.all()):
        bad = scale_O1[~good][0].item()
        raise CheckpointError(
            f"{source}: {name} holds {bad}; scales are finite and above zero. The file is damaged: download it again."
        )
    return scale_O1.contiguous()


def is_expert_matrix(name: str, shape: tuple[int, ...]) -> bool:
    """The weights of an expert that are quantised: the ten matrices of each block."""
    parts = name.split(".")
    return len(shape) == 2 and parts[-1] == "weight" and parts[0] == "blocks" and parts[2] in _EXPERT_PARTS


def is_text_matrix(name: str, shape: tuple[int, ...]) -> bool:
    """The weights of the text encoder, in Wan's names, that are quantised: the seven matrices of each block."""
    return len(shape) == 2 and bool(re.fullmatch(r"blocks\.\d+\.(attn\.[qkvo]|ffn\.(gate\.0|fc1|fc2))\.weight", name))


_EXPERT_PARTS = ("self_attn", "cross_attn", "ffn")
