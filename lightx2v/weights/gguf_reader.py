"""GGUFReader: one GGUF file, its tensors read as they lie on disk: float tensors, or the bytes of their blocks."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ..config.architecture import PATCH
from ..config.model_paths import shard_names
from ..errors import CheckpointError, quoted, short_path
from .gguf_header import read_gguf_header
from .tensor_file import TensorEntry, map_tensor

UNKNOWN = (None, "pig", "cow")
"""Values of general.architecture that say nothing about the model, which some converters leave."""


class GGUFReader:
    """A TensorFile."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.header = read_gguf_header(path)
        self.entries = {
            name: _unflattened(name, entry, self.header.tensors) for name, entry in self.header.tensors.items()
        }
        self.metadata = {key: str(value) for key, value in self.header.metadata.items()}

    def memory_map(self, name: str) -> torch.Tensor:
        return map_tensor(self.path, self.entries[name])


def _unflattened(name: str, entry: TensorEntry, tensors: dict[str, TensorEntry]) -> TensorEntry:
    """The patch embedding with its five dimensions: llama.cpp has four at most, and some converters flatten it."""
    bias = tensors.get(name.removesuffix("weight") + "bias")
    shape = entry.blocks.shape if entry.blocks else entry.shape
    if not name.endswith("patch_embedding.weight") or bias is None or len(bias.shape) != 1 or len(shape) >= 5:
        return entry
    dim, (channels, rest) = bias.shape[0], divmod(math.prod(shape), bias.shape[0] * PATCH**2)
    if rest:
        return entry
    whole = (dim, channels, 1, PATCH, PATCH)
    return replace(entry, blocks=replace(entry.blocks, shape=whole)) if entry.blocks else replace(entry, shape=whole)


def open_parts(file: GGUFReader) -> list[GGUFReader]:
    """`file` and the other parts of its model, where it is split. CheckpointError names parts that are missing."""
    names = sorted(shard_names(file.path.name))
    count = file.header.metadata.get("split.count", 0)
    if count not in (0, 1, len(names)):
        raise CheckpointError(
            f"{short_path(file.path)} is one of {quoted(count)} parts, but its name does not say so. Give all parts "
            "the names that they were published with, such as model-00001-of-00002.gguf."
        )
    if not names:
        return [file]
    missing = [name for name in names if not (file.path.parent / name).is_file()]
    if missing:
        raise CheckpointError(
            f"{short_path(file.path)} is one of {len(names)} parts; {len(missing)} are missing: "
            f"{', '.join(missing[:20])}. Put them beside it."
        )
    parts = [file if name == file.path.name else GGUFReader(file.path.parent / name) for name in names]
    found, total = sum(len(part.entries) for part in parts), file.header.metadata.get("split.tensors.count")
    if total not in (None, found):
        raise CheckpointError(
            f"The {len(parts)} parts of {short_path(file.path)} hold {found} tensors, expected {quoted(total)}. Files "
            "of two versions seem mixed; download them again."
        )
    return parts


def check_architecture(metadata: dict[str, str], allowed: tuple[str, ...], source: str) -> None:
    """Refuse a GGUF file that says it holds another kind of model. Files of other formats say nothing."""
    found: Any = metadata.get("general.architecture")
    if found not in (*UNKNOWN, *allowed):
        raise CheckpointError(
            f"{source} is a GGUF file of the architecture {quoted(found)}; expected {' or '.join(allowed)}. "
            "Is it a file of another model?"
        )
