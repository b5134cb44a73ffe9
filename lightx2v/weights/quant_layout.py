"""QuantLayout: where a file keeps the scales of its 8-bit weights, in any dialect, and what it says about them.

LightX2V's files keep a scale beside the weight as `X.weight_scale` [out, 1], ComfyUI's as one number `X.scale_weight`,
Wan2GP's (quanto) as `X.weight._scale` beside `X.weight._data`; all become the first. A file of fp8 weights with no
scale at all is a plain cast. Anywhere else a quantised weight without a valid scale is an error: it would be noise.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median

import torch
from torch import Tensor

from ..errors import CheckpointError
from .checkpoint import Checkpoint
from .device_checks import DeviceChecks
from .quant_notes import QuantNote, check_known

PLAIN = (torch.float8_e4m3fn, torch.float8_e5m2)
"""The dtypes that a plain cast may give."""
STORED = (*PLAIN, torch.int8)
"""The dtypes of quantised weights in files."""

SAMPLES, SAMPLE, SCALED = 16, 1 << 16, 4.0
"""How many matrices, and values of each, tell whether they were scaled; and the typical size from which they were."""

SCALE = ".weight_scale"
_SCALES = (SCALE, ".scale_weight")
_MARKER = re.compile(r"(.*\.)?scaled_fp8")
_UNUSED = re.compile(r"(.*\.)?(scaled_fp8|scale_input|input_scale|output_scale|comfy_quant|spiece_model)")
"""Tensors that other programs keep beside quantised weights. Not needed: activations are scaled as they come."""
_QUANTO = {".weight._data": ".weight", ".weight._scale": SCALE}

_EXPERT_PARTS = ("self_attn", "cross_attn", "ffn")


@dataclass(frozen=True, slots=True)
class QuantLayout:
    """`scales` maps each quantised weight to its scale, "" for a plain cast; `unused` are tensors to ignore.

    `rotations` are the weights that ConvRot has rotated, each with the size of its groups of inputs; `full_precision`
    those whose products the file wants exact.
    """

    scales: dict[str, str]
    unused: frozenset[str]
    rotations: dict[str, int]
    full_precision: frozenset[str]


def plain_names(names: Mapping[str, str]) -> dict[str, str]:
    """{the file's name: the model's} with quanto's two tensors under the names of a weight and its scale."""
    found = dict(names)
    for name, ours in names.items():
        for theirs, plain in _QUANTO.items():
            if ours.endswith(theirs):
                found[name] = ours.removesuffix(theirs) + plain
    return found


def read_layout(
    shapes: Mapping[str, tuple[int, ...]],
    dtypes: Mapping[str, torch.dtype],
    source: str,
    notes: Mapping[str, QuantNote] | None = None,
) -> QuantLayout:
    """The layout of a file with these tensors. CheckpointError names the first weight with a missing or odd scale."""
    notes = notes or {}
    check_known(shapes, dtypes, source)
    all_scales = {name for name in shapes if name.endswith(_SCALES)}
    markers = [name for name in shapes if _MARKER.fullmatch(name)]
    unscaled = not all_scales and not markers and not notes
    scales: dict[str, str] = {}
    for name, dtype in dtypes.items():
        if dtype not in STORED or _UNUSED.fullmatch(name) or name in all_scales:
            continue
        scales[name] = "" if unscaled and dtype in PLAIN else _scale_of(name, dtype, shapes, source)
    if orphans := all_scales - set(scales.values()):
        raise CheckpointError(f"{source}: {min(orphans)} has no quantised weight beside it. The file is mixed up.")
    for name, note in notes.items():
        if dtypes.get(name) != note.dtype:
            got = _name(dtypes[name]) if name in dtypes else "not there"
            raise CheckpointError(
                f"{source}: {name} is {got}, its note says {_name(note.dtype)}. The file is mixed up."
            )
        if note.rotation and shapes[name][-1] % note.rotation:
            raise CheckpointError(f"{source}: {name} has {shapes[name][-1]} inputs, no multiple of {note.rotation}.")
    everywhere = any(shapes[name] == (2,) for name in markers)  # ComfyUI: two elements ask for full precision
    return QuantLayout(
        scales,
        frozenset(name for name in shapes if _UNUSED.fullmatch(name)),
        {name: note.rotation for name, note in notes.items() if note.rotation},
        frozenset(name for name in scales if everywhere or (name in notes and notes[name].full_precision)),
    )


def _scale_of(name: str, dtype: torch.dtype, shapes: Mapping[str, tuple[int, ...]], source: str) -> str:
    stem = name.removesuffix(".weight")
    candidates = [stem + suffix for suffix in _SCALES if stem != name and stem + suffix in shapes]
    if not candidates:
        raise CheckpointError(
            f"{source}: {name} is stored in {_name(dtype)} without a scale (expected {stem}{SCALE}). "
            "Use a file with scales, or the bf16 one."
        )
    scale, rows = candidates[0], shapes[name][0] if shapes[name] else 0
    if shapes[scale] not in ((), (1,), (1, 1), (rows,), (rows, 1)):
        raise CheckpointError(
            f"{source}: {scale} has shape {list(shapes[scale])}, expected [{rows}, 1]: one scale per row, or a "
            "single one."
        )
    return scale


def require_plain_cast(checkpoint: Checkpoint, names: Sequence[str], source: str) -> None:
    """CheckpointError if these float8 matrices, which have no scales, were scaled: read as they are they make noise.

    A scale stretches a matrix to the largest float8: the root of the mean square of its values is 28 to 160 in the demo
    model's, and 0.05 to 0.3 in a plain cast. The values at the beginning of some matrices tell.
    """
    some = names[:: len(names) // SAMPLES or 1]
    sizes = [checkpoint.memory_map(name).flatten()[:SAMPLE].float().square().mean().sqrt().item() for name in some]
    if sizes and (typical := median(sizes)) > SCALED:
        raise CheckpointError(
            f"{source}: its float8 weights have a size of {typical:.3g} and no scales; expected less than {SCALED:g}. "
            "The scales were lost: download the file again, or use the bf16 one."
        )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def check_scale(scale: Tensor, rows: int, name: str, source: str, checks: DeviceChecks | None = None) -> Tensor:
    """The scale as float32 [rows, 1]. CheckpointError, at once or from `checks`, unless all values are finite and above
    zero."""
    scale_O1 = scale.float().reshape(-1, 1).expand(rows, 1)
    good = torch.isfinite(scale_O1) & (scale_O1 > 0)

    def judge(all_good: list[float]) -> None:
        if not all_good[0]:
            bad = scale_O1[~good][0].item()
            raise CheckpointError(
                f"{source}: {name} holds {bad}; scales are finite and above zero. The file is damaged: download it "
                "again."
            )

    asked = checks or DeviceChecks()
    asked.ask((good.all(),), judge)
    if checks is None:
        asked.finish()
    return scale_O1.contiguous()


def is_expert_matrix(name: str, shape: tuple[int, ...]) -> bool:
    """Whether this weight of an expert may be quantised: one of the ten matrices of a block."""
    parts = name.split(".")
    return len(shape) == 2 and parts[-1] == "weight" and parts[0] == "blocks" and parts[2] in _EXPERT_PARTS


def is_text_matrix(name: str, shape: tuple[int, ...]) -> bool:
    """Whether this weight of the text encoder (Wan's name) may be quantised: one of the seven matrices of a block."""
    return len(shape) == 2 and bool(
        re.fullmatch(r"blocks\.[0-9]+\.(attn\.[qkvo]|ffn\.(gate\.0|fc1|fc2))\.weight", name)
    )
