"""QuantLayout: where a file keeps the scales of its 8-bit weights, in any dialect.

LightX2V's files keep a scale beside the weight as `X.weight_scale` [out, 1], ComfyUI's as one number `X.scale_weight`;
both become the first. A quantised weight without a valid scale is an error: a scale of 1 would give noise.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import CheckpointError

STORED = (torch.float8_e4m3fn, torch.float8_e5m2, torch.int8)
"""The dtypes of quantised weights in files."""

SCALE = ".weight_scale"
_SCALES = (SCALE, ".scale_weight")
_UNUSED = re.compile(r"(.*\.)?(scaled_fp8|scale_input|input_scale|comfy_quant|spiece_model)")
"""Tensors that other programs keep beside quantised weights. Not needed: activations are scaled as they come."""

_EXPERT_PARTS = ("self_attn", "cross_attn", "ffn")


@dataclass(frozen=True, slots=True)
class QuantLayout:
    """`scales` maps each quantised weight to its scale; `unused` are tensors to ignore."""

    scales: dict[str, str]
    unused: frozenset[str]


def read_layout(shapes: Mapping[str, tuple[int, ...]], dtypes: Mapping[str, torch.dtype], source: str) -> QuantLayout:
    """The layout of a file with these tensors. CheckpointError names the first weight with a missing or odd scale."""
    scales: dict[str, str] = {}
    for name, dtype in dtypes.items():
        if dtype not in STORED or _UNUSED.fullmatch(name):
            continue
        stem = name.removesuffix(".weight")
        candidates = [stem + suffix for suffix in _SCALES if stem != name and stem + suffix in shapes]
        if not candidates:
            raise CheckpointError(
                f"{source}: {name} is stored in {str(dtype).removeprefix('torch.')} without a scale "
                f"(expected {stem}{SCALE}). Use a file with scales, or the bf16 one."
            )
        scale, rows = candidates[0], shapes[name][0] if shapes[name] else 0
        if shapes[scale] not in ((), (1,), (1, 1), (rows,), (rows, 1)):
            raise CheckpointError(
                f"{source}: {scale} has shape {list(shapes[scale])}, expected [{rows}, 1]: one scale per row, or a "
                "single one."
            )
        scales[name] = scale
    if orphans := {name for name in shapes if name.endswith(_SCALES)} - set(scales.values()):
        raise CheckpointError(f"{source}: {min(orphans)} has no quantised weight beside it. The file is mixed up.")
    return QuantLayout(scales, frozenset(name for name in shapes if _UNUSED.fullmatch(name)))


def check_scale(scale: Tensor, rows: int, name: str, source: str) -> Tensor:
    """The scale as float32 [rows, 1]. CheckpointError unless all values are finite and above zero."""
    scale_O1 = scale.float().reshape(-1, 1).expand(rows, 1)
    good = torch.isfinite(scale_O1) & (scale_O1 > 0)
    if not bool(good.all()):
        bad = scale_O1[~good][0].item()
        raise CheckpointError(
            f"{source}: {name} holds {bad}; scales are finite and above zero. The file is damaged: download it again."
        )
    return scale_O1.contiguous()


def is_expert_matrix(name: str, shape: tuple[int, ...]) -> bool:
    """Whether this weight of an expert may be quantised: one of the ten matrices of a block."""
    parts = name.split(".")
    return len(shape) == 2 and parts[-1] == "weight" and parts[0] == "blocks" and parts[2] in _EXPERT_PARTS


def is_text_matrix(name: str, shape: tuple[int, ...]) -> bool:
    """Whether this weight of the text encoder (Wan's name) may be quantised: one of the seven matrices of a block."""
    return len(shape) == 2 and bool(re.fullmatch(r"blocks\.\d+\.(attn\.[qkvo]|ffn\.(gate\.0|fc1|fc2))\.weight", name))
