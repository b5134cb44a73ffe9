"""QuantNote: what a file says about how one of its weights is quantised.

ComfyUI writes it as JSON, in a tensor `X.comfy_quant` of bytes beside each weight or in the header entry
`_quantization_metadata` for all. What is not understood there is refused by its name: read without it, such weights
would make noise.

Formats that are recognised and not supported are called what they are, also where only their tensors show it.
"""

import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ..errors import CheckpointError, quoted
from .checkpoint import Checkpoint

NOTE, HEADER = ".comfy_quant", "_quantization_metadata"
FORMATS = {"float8_e4m3fn": torch.float8_e4m3fn, "float8_e5m2": torch.float8_e5m2, "int8_tensorwise": torch.int8}
_OTHER_HEADER = re.compile(r"(?!_quantization_metadata$)_?quanti[sz]ation(_\w+)?|quant_(config|method|format|type)")
GROUPS = (4, 16, 64, 256)
"""Sizes of the rotations of ConvRot: powers of 4."""
DEFAULT_GROUP = 256
MAX_NOTE = 1 << 16

_TAKE = "Take the bf16 or fp16 file, or one with fp8_scaled or int8 in its name."
OTHER_FORMATS = {
    "nvfp4": "NVFP4, 4-bit weights for Blackwell GPUs",
    "mxfp8": "MXFP8, 8-bit weights with a scale for each 32 values, for Blackwell GPUs",
    "svdquant": "SVDQuant (Nunchaku), 4-bit weights with low-rank parts",
    "awq": "AWQ, 4-bit weights",
    "w4a4": "4-bit weights and activations (ConvRot W4A4)",
    "w4a8": "4-bit weights with 8-bit activations (W4A8)",
    "blockwise": "8-bit weights with a scale for each block",
}
"""Formats that are not supported, by a part of their names."""
_SIGNS = (
    (re.compile(r".*\.(weight_scale_2|weight_global_scale)"), "nvfp4"),
    (
        re.compile(r".*\.(wscales|wcscales|wtscale|smooth_factor|smooth_factor_orig|proj_down|proj_up|lora_down)"),
        "svdquant",
    ),
    (re.compile(r".*\.(qweight|qzeros|g_idx|wzeros)"), "awq"),
    (re.compile(r".*\.(weight_scale_inv)"), "blockwise"),
)
_BITSANDBYTES = re.compile(r".*\.(absmax|quant_map|nested_absmax|quant_state\..*|SCB)")
_QUANTO_4 = re.compile(r".*\.weight\._(shift|zeropoint)")


@dataclass(frozen=True, slots=True)
class QuantNote:
    """`rotation` is the size of ConvRot's groups of inputs, 0 for none; `full_precision` asks for exact products."""

    dtype: torch.dtype
    rotation: int = 0
    full_precision: bool = False


def read_notes(
    checkpoint: Checkpoint, names: Mapping[str, str], rename: Callable[[Iterable[str]], Mapping[str, str]], source: str
) -> dict[str, QuantNote]:
    """{weight: its note}. `names` maps the file's names to the model's; `rename` does that for names in a header."""
    notes: dict[str, QuantNote] = {}
    weights = set(names.values())
    for name, ours in names.items():
        if ours.endswith(NOTE):
            weight = ours.removesuffix(NOTE) + ".weight"
            shape = checkpoint.shapes[name]
            if checkpoint.dtypes[name] is not torch.uint8 or len(shape) != 1 or not 0 < shape[0] < MAX_NOTE:
                raise CheckpointError(f"{source}: {name:.80} must be a text in bytes. Download the file again.")
            notes[weight] = _note(bytes(checkpoint.tensor(name).tolist()), f"{source}: {name:.80}")
    for word in checkpoint.metadata:
        if _OTHER_HEADER.fullmatch(word):
            raise CheckpointError(
                f"{source}: the header's {word:.80} describes a quantisation in an unknown way. {_TAKE}"
            )
    header = checkpoint.metadata.get(HEADER)
    if header is not None:
        for module, words in _layers(header, source).items():
            weight = next(iter(rename([f"{module}.weight"]).values()), "")
            found = _note(words, f"{source}: {HEADER} for {module:.80}")
            if weight not in weights:
                raise CheckpointError(
                    f"{source}: {HEADER} describes {module:.80}, which is not in the file. It is mixed up."
                )
            if notes.setdefault(weight, found) != found:
                raise CheckpointError(f"{source}: {HEADER} and the note beside {weight} contradict each other.")
    return notes


def check_known(names: Iterable[str], dtypes: Mapping[str, torch.dtype], source: str) -> None:
    """CheckpointError that calls a format by its name, where tensors' names show one that is not supported."""
    names = list(names)
    for name in names:
        for sign, kind in _SIGNS:
            if sign.fullmatch(name):
                raise _other(kind, name, source)
        if _BITSANDBYTES.fullmatch(name):
            raise CheckpointError(f"{source}: {name:.80} belongs to bitsandbytes, which is not supported. {_TAKE}")
        if _QUANTO_4.fullmatch(name):
            raise CheckpointError(f"{source}: {name:.80} belongs to 4-bit quanto, which is not supported. {_TAKE}")
        if name.endswith(".weight_scale") and dtypes[name] in (torch.uint8, torch.float8_e8m0fnu):
            raise _other("mxfp8", name, source)


def _other(kind: str, name: str, source: str) -> CheckpointError:
    return CheckpointError(
        f"{source}: {name:.80} belongs to {OTHER_FORMATS[kind]}. This format is not supported here. {_TAKE}"
    )


def _layers(header: Any, source: str) -> Mapping[str, Any]:
    content = _json(header, f"{source}: {HEADER}")
    if unknown := content.keys() - {"format_version", "layers"}:
        raise CheckpointError(f"{source}: {HEADER} has {quoted(min(unknown))}, which is not known here. {_TAKE}")
    if str(content.get("format_version", "1.0")) not in ("1", "1.0"):
        version = quoted(content["format_version"])
        raise CheckpointError(f"{source}: {HEADER} has the version {version}, expected 1.0. {_TAKE}")
    return _json(content.get("layers", {}), f"{source}: the layers of {HEADER}")


def _json(content: Any, what: str) -> dict[str, Any]:
    try:
        found = json.loads(content) if isinstance(content, (str, bytes)) else content
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise CheckpointError(f"{what} is no JSON object. The file is damaged: download it again.")
    return found


def _note(content: Any, what: str) -> QuantNote:
    words = dict(_json(content, what))
    name = words.pop("format", None)
    if not isinstance(name, str) or name not in FORMATS:
        known = next((text for part, text in OTHER_FORMATS.items() if part in str(name).lower()), "")
        said = f"says format {quoted(name)}{f', that is {known}' if known else ''}."
        raise CheckpointError(f"{what} {said} Supported are {', '.join(FORMATS)}. {_TAKE}")
    full = _flag(words, "full_precision_matrix_mult", what)
    rotated = _flag(words, "convrot", what)
    group = words.pop("convrot_groupsize", DEFAULT_GROUP)
    if words:
        raise CheckpointError(f"{what} says {quoted(min(words))}, which is not known here. {_TAKE}")
    if rotated and group not in GROUPS:
        raise CheckpointError(
            f"{what} says convrot_groupsize {quoted(group)}; supported are {', '.join(map(str, GROUPS))}."
        )
    return QuantNote(FORMATS[name], group if rotated else 0, full)


def _flag(words: dict[str, Any], key: str, what: str) -> bool:
    value = words.pop(key, False)
    if not isinstance(value, bool):
        raise CheckpointError(f"{what} says {key} {quoted(value)}, expected true or false.")
    return value


def unrotated(weight: torch.Tensor, group: int) -> torch.Tensor:
    """W from W · H, for each group of inputs. H is ConvRot's Hadamard matrix: symmetric, and its own inverse."""
    four = torch.tensor([[1, 1, 1, -1], [1, 1, -1, 1], [1, -1, 1, 1], [-1, 1, 1, 1]], dtype=weight.dtype) / 2
    hadamard = torch.ones(1, 1, dtype=weight.dtype)
    while len(hadamard) < group:
        hadamard = torch.kron(hadamard, four)
    return (weight.unflatten(-1, (-1, group)) @ hadamard.to(weight.device)).flatten(-2)
