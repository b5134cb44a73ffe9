"""Describe a model file by its header: what it is, for which task and expert, how its weights are stored.

Nothing is read but headers, with the readers that also load the files. Only this file of the package imports torch.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch

from ..config.architecture import INPUT_CHANNELS
from ..config.gguf_formats import mix_of
from ..config.lora_names import expert_by_metadata, expert_in, expert_of, noise_of, task_of
from ..config.phases import Expert
from ..config.request import Task
from ..errors import CheckpointError, short_path
from ..models.vae_config import VAEConfig
from ..weights.checkpoint import Checkpoint, open_checkpoint
from ..weights.dit_names import wan_names
from ..weights.lora_forms import RANKS
from ..weights.lora_keys import LayerFinder, experts_of, parse_key
from ..weights.model_weights import ModelWeights
from ..weights.other_models import other_model
from ..weights.safetensors_reader import header_text
from ..weights.umt5_names import TABLE, is_text_encoder, wan_name
from ..weights.vae_names import vae_names
from .found_file import FoundFile
from .lora_notes import lora_notes

TASKS: dict[int, Task] = {INPUT_CHANNELS[task]: task for task in ("i2v", "t2v")}
"""The task of an expert with this number of input channels."""
DTYPES = {
    torch.float8_e4m3fn: "fp8",
    torch.float8_e5m2: "fp8",
    torch.int8: "int8",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float32: "fp32",
}
ENOUGH_LAYERS, ENOUGH_STRANGERS = 12, 400
"""Layers that tell a LoRA's rank and width, and layers without one of ours that tell that it is for another model."""
MAX_BLOCKS = 60
"""Blocks for whose layers a LoRA is looked through; A14B has 40."""
MAX_SIDE = 1 << 31
"""Longer sides of a tensor are nonsense."""
KINDS = frozenset(("down", "diff", "diff_b", "lokr_w2", *RANKS["hadamard"], *RANKS["kronecker"]))
"""Of parse_key's kinds one for each layer of a LoRA, whose shape tells the rank where there is one."""
METADATA = '"__metadata__"'
_BEFORE_NAME, _BEFORE_VALUE = re.compile(r"[\s{,]*"), re.compile(r"[\s:]*")
HALVES = re.compile(r"transformer|dit|_noise")
"""What the names of tensors hold in a LoRA that may be for one expert, or hold a half for each."""
DISTILLED = re.compile(
    r"lightx2v|distill|lightning|[0-9][ _-]?steps?(?![a-z])|rapid|turbo|dmd|lcm|causvid", re.IGNORECASE
)
"""Words in the names of distilled models and of the LoRAs that distil one."""


def describe(path: Path, size: int) -> FoundFile | None:
    """What the file or the folder of shards at `path` is; None for something that has no place in a model here."""
    try:
        return recognise(path, size)
    except (CheckpointError, OSError):
        return None


def recognise(path: Path, size: int) -> FoundFile | None:
    """The same for a file that a person named: CheckpointError or OSError says why it cannot be read."""
    if (lora := _lora(path, size)) is not None:
        return lora
    checkpoint = open_checkpoint(path)
    for look in (_expert, _text_encoder, _vae):
        if (found := look(checkpoint, path, size)) is not None:
            return found
    return None


def _header(path: Path) -> tuple[Iterator[tuple[str, tuple[int, ...]]], Mapping[str, Any]]:
    """Names with shapes, and metadata. Of a safetensors file only as far as it is looked at, and without the checks of
    loading: of thousands of LoRAs only the few that are used have to be whole."""
    if path.suffix.lower() != ".safetensors" or not path.is_file():
        checkpoint = open_checkpoint(path)
        return iter(checkpoint.shapes.items()), checkpoint.metadata
    text = header_text(path)[0].decode("utf-8", "replace")
    place = text.find(METADATA)
    _, metadata = next(_members(text, place), ("", None)) if place >= 0 else ("", None)
    return _shapes(text), metadata if isinstance(metadata, dict) else {}


def _shapes(text: str) -> Iterator[tuple[str, tuple[int, ...]]]:
    for name, entry in _members(text, 0):
        shape = entry.get("shape") if isinstance(entry, dict) else None
        if isinstance(shape, list) and all(type(side) is int and 0 <= side < MAX_SIDE for side in shape):
            yield name, tuple(shape)


def _members(text: str, place: int) -> Iterator[tuple[str, Any]]:
    """The members of the JSON object that `text` is, from the one at `place`, as far as they can be read."""
    decode = json.JSONDecoder().raw_decode
    try:
        while text.startswith('"', place := _after(_BEFORE_NAME, text, place)):
            name, place = decode(text, place)
            value, place = decode(text, _after(_BEFORE_VALUE, text, place))
            yield name, value
    except (ValueError, RecursionError):
        return


def _after(pattern: re.Pattern[str], text: str, place: int) -> int:
    match = pattern.match(text, place)
    return match.end() if match else place


def _expert(checkpoint: Checkpoint, path: Path, size: int) -> FoundFile | None:
    try:
        names = {wan: name for name, wan in wan_names(checkpoint.shapes).items()}
    except CheckpointError:
        return None
    shapes = {wan: checkpoint.shapes[name] for wan, name in names.items()}
    patch = shapes.get("patch_embedding.weight", ())
    whole = len(patch) == 5 and "blocks.0.self_attn.q.weight" in shapes
    if not whole and not other_model(shapes):
        return None
    return FoundFile(
        path=path,
        kind="expert",
        size=size,
        task=TASKS.get(patch[1]) if whole else None,
        expert=_expert_of(checkpoint.metadata, path),
        quantisation=_quantisation(checkpoint, path),
        distilled=_says_distilled(checkpoint, path),
        width=patch[0] if whole else 0,
        text_width=shapes.get("text_embedding.0.weight", (0, 0))[-1],
        problem=_problem(lambda: ModelWeights.of_expert(checkpoint)),
    )


def _text_encoder(checkpoint: Checkpoint, path: Path, size: int) -> FoundFile | None:
    """UMT5: unlike T5, each of its blocks has a position bias of its own."""
    if not is_text_encoder(checkpoint.shapes):
        return None
    names = {wan_name(name): name for name in checkpoint.shapes}
    if "blocks.1.pos_embedding.embedding.weight" not in names:
        return None
    return FoundFile(
        path=path,
        kind="text encoder",
        size=size,
        quantisation=_quantisation(checkpoint, path),
        text_width=checkpoint.shapes[names[TABLE]][-1],
        problem=_problem(lambda: ModelWeights.of_text_encoder(checkpoint)),
    )


def _vae(checkpoint: Checkpoint, path: Path, size: int) -> FoundFile | None:
    try:
        shapes = {wan: checkpoint.shapes[name] for name, wan in vae_names(checkpoint.shapes).items()}
    except CheckpointError:
        return None
    if not {"encoder.conv1.weight", "decoder.conv1.weight", "conv2.weight"} <= shapes.keys():
        return None
    quantisation, width, problem = _quantisation(checkpoint, path), 0, ""
    try:
        width = VAEConfig.from_shapes(shapes).dim
    except CheckpointError as error:
        problem = f"{short_path(path)}: {error}"
    except (LookupError, ZeroDivisionError):
        return None
    return FoundFile(path=path, kind="VAE", size=size, quantisation=quantisation, width=width, problem=problem)


def _lora(path: Path, size: int) -> FoundFile | None:
    shapes, metadata = _header(path)
    finder, ranks, widths = _layers(), Counter[int](), Counter[int]()
    found, strangers = list[str](), 0
    for key, shape in shapes:
        layer, kind = parse_key(key) or ("", "")
        if kind not in KINDS:
            continue
        if finder.find(layer, "weight") is None:
            strangers += 1
            if strangers >= ENOUGH_STRANGERS and not found:
                break
            continue
        found.append(layer)
        if any(kind in kinds for kinds in RANKS.values()) and len(shape) >= 2:
            ranks[shape[0]] += 1
        if kind == "down" and len(shape) >= 2:
            widths[math.prod(shape[1:])] += 1
        if ranks.total() >= ENOUGH_LAYERS:
            break
    if not found:
        return None
    if HALVES.search(found[0]):
        found += [parsed[0] for key, _ in shapes if (parsed := parse_key(key))]
    experts = set(experts_of(found).values())
    notes = lora_notes(path, metadata)
    text = " ".join([path.name, *map(str, metadata.values())])
    return FoundFile(
        path=path,
        kind="LoRA",
        size=size,
        task=_task_of(path, notes.trained_for),
        expert=next(iter(experts)) if len(experts) == 1 else None if experts else _said_expert(metadata, path),
        halves=len(experts) == 2,
        distilled=bool(DISTILLED.search(text[:2000])),
        width=widths.most_common(1)[0][0] if widths else 0,
        rank=ranks.most_common(1)[0][0] if ranks else 0,
        triggers=notes.triggers,
        trained_for=notes.trained_for,
        thumbnail=notes.thumbnail,
    )


@cache
def _layers() -> LayerFinder:
    leaves = [f"{attention}.{leaf}" for attention in ("self_attn", "cross_attn") for leaf in "qkvo"] + [
        "ffn.0",
        "ffn.2",
    ]
    return LayerFinder([f"blocks.{block}.{leaf}.weight" for block in range(MAX_BLOCKS) for leaf in leaves])


def _expert_of(metadata: Mapping[str, Any], path: Path) -> Expert | None:
    """By the name of the file or its folder, or by its metadata. In diffusers transformer_2 is the low-noise one."""
    if path.is_dir() and path.name in ("transformer", "transformer_2"):
        both = (path.parent / "transformer").is_dir() and (path.parent / "transformer_2").is_dir()
        return ("high" if path.name == "transformer" else "low") if both else None
    named: Any = expert_of(path) or expert_in(" ".join(map(str, metadata.values())))
    return named


def _said_expert(metadata: Mapping[str, Any], path: Path) -> Expert | None:
    """As loading/lora_experts.py decides it: by the metadata, by "high noise" in a name. Other words for high or low
    count in pairs only, which `pairs.py` finds."""
    return expert_by_metadata(metadata) or noise_of(path)


def _task_of(path: Path, trained_for: str) -> Task | None:
    named: Any = task_of(path) or task_of(trained_for.replace("/", " "))
    return "i2v" if named == "flf2v" else named


def _says_distilled(checkpoint: Checkpoint, path: Path) -> bool:
    texts = [path.name, *(str(checkpoint.metadata.get(key, "")) for key in ("general.name", "modelspec.title"))]
    return any(DISTILLED.search(text) for text in texts)


def _quantisation(checkpoint: Checkpoint, path: Path) -> str:
    """How most bytes are stored: a name of DTYPES; of a GGUF file the mix in its name, or else a format of blocks."""
    if checkpoint.blocks and (mix := mix_of(path)):
        return mix
    sizes = Counter[str]()
    for _, entry in checkpoint.entries():
        sizes[entry.blocks.form.name if entry.blocks else DTYPES.get(entry.dtype, "")] += entry.nbytes
    return sizes.most_common(1)[0][0] if sizes else ""


def _problem(check: Callable[[], Any]) -> str:
    try:
        check()
    except CheckpointError as error:
        return str(error)
    return ""
