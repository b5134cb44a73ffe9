"""MatchedLora: a LoRA file matched to a model's tensors, and its addition to them in float32.

    lora = match_lora(path, shapes, strength=1.0)     reads headers: either all fits, or LoraError
    lora.patches                                      the tensors that change, in Wan's names
    add_loras(weight, name, [lora], dtype)            weight + strength * alpha / rank * up @ down
    lora.report                                       how many layers apply, and which do not

`lora_keys.py` knows the dialects.
"""

from __future__ import annotations

import math
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import LoraError, short_path
from .checkpoint import Checkpoint, open_checkpoint
from .dit_names import diffusers_to_wan, strip_prefix
from .lora_keys import LayerFinder, is_foreign, is_harmless, parse_key

Shapes = Mapping[str, tuple[int, ...]]

Keys = dict[str, str]
"""One layer's keys in the file, by kind ("up", "down", "alpha", "diff", …)."""

ROWS = 256
"""Rows of a weight that a CPU adds a LoRA to at once: 5 MB of float32 at full width."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraReport:
    """What one file changes. `unmatched` are keys that have no place in this model."""

    path: str
    strength: float
    applied: int
    total: int
    harmless: int
    unmatched: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"unmatched": list(self.unmatched[:20]), "warnings": list(self.warnings)}


@dataclass(frozen=True, slots=True)
class LoraPatch:
    """The change of one tensor, by the file's keys: a low-rank pair, or a plain difference (`down` is None)."""

    up: str
    down: str | None
    scale: float


@dataclass(frozen=True, slots=True)
class LoraDelta:
    """A patch with its tensors: scale * up @ down, or for a plain difference scale * up."""

    up: Tensor
    down: Tensor | None
    scale: float

    def to(self, dtype: torch.dtype) -> LoraDelta:
        return LoraDelta(self.up.to(dtype), None if self.down is None else self.down.to(dtype), self.scale)

    def add_to(self, rows: Tensor, start: int = 0) -> None:
        """Add it in place to some rows of the tensor; `start` is the index of the first one."""
        if self.down is None:
            part = self.up.reshape(-1, *rows.shape[1:])[start : start + len(rows)]
            rows.add_(part, alpha=self.scale)
        else:
            rows.view(len(rows), -1).addmm_(self.up[start : start + len(rows)], self.down, alpha=self.scale)


@dataclass(frozen=True, slots=True, kw_only=True)
class MatchedLora:
    """One file that fits one model."""

    checkpoint: Checkpoint
    patches: dict[str, LoraPatch]
    report: LoraReport

    @property
    def elements(self) -> int:
        """The number of values in its matrices and differences."""
        keys = (key for patch in self.patches.values() for key in (patch.up, patch.down) if key)
        return sum(math.prod(self.checkpoint.shapes[key]) for key in keys)

    def only(self, names: Container[str]) -> MatchedLora:
        """The same LoRA restricted to these tensors."""
        return replace(self, patches={name: patch for name, patch in self.patches.items() if name in names})

    def delta(self, name: str, device: torch.device | str, dtype: torch.dtype) -> LoraDelta:
        """Read the change of the tensor `name`."""
        patch = self.patches[name]
        up = self._read(patch.up, device).to(dtype)
        if patch.down is None:
            return LoraDelta(up, None, patch.scale)
        return LoraDelta(up.flatten(1), self._read(patch.down, device).to(dtype).flatten(1), patch.scale)

    def _read(self, key: str, device: torch.device | str) -> Tensor:
        """Cast to float32 and check on `device`: a CPU with many cores is slow at so many small tensors."""
        tensor = self.checkpoint.tensor(key)
        if tensor.dtype is torch.float64:  # not every device has float64
            tensor = tensor.float()
        tensor = tensor.to(device).float()
        if not bool(torch.isfinite(tensor).all()):
            raise LoraError(
                f"{short_path(self.checkpoint.path)}: {key} holds NaN or infinity. The file is damaged: get it again."
            )
        return tensor


def add_loras(tensor: Tensor, name: str, loras: Sequence[MatchedLora], dtype: torch.dtype) -> Tensor:
    """`tensor` plus the changes of all `loras`, added in float32 at least and rounded once. May overwrite `tensor`.

    A CPU adds some rows at a time: the wide copies stay in its cache and need no memory.
    """
    wide = torch.promote_types(tensor.dtype, torch.float32)
    deltas = [lora.delta(name, tensor.device, wide) for lora in loras]
    if not deltas or not tensor.dim():
        return tensor.to(dtype)
    result = torch.empty_like(tensor, dtype=dtype)
    rows = ROWS if tensor.device.type == "cpu" else len(tensor)
    for start in range(0, len(tensor), max(rows, 1)):
        part = tensor[start : start + rows].to(wide)
        for delta in deltas:
            delta.add_to(part, start)
        result[start : start + rows] = part
    return result


def match_lora(path: str | Path, shapes: Shapes, *, strength: float = 1.0, allow_partial: bool = False) -> MatchedLora:
    """Match the LoRA at `path` to a model with tensors of these shapes (in Wan's names). Reads headers and alphas.

    LoraError if nothing matches, a shape is wrong, a pair lacks a half, or (unless `allow_partial`) some of it has no
    place in the model.
    """
    checkpoint = open_checkpoint(path)
    source = short_path(path)
    if checkpoint.blocks:
        raise LoraError(
            f"{source} is a GGUF file with {next(iter(checkpoint.blocks.values())).form.name} weights, which is not "
            "supported for LoRAs. Take the LoRA as safetensors, or in F16."
        )
    layers, unmatched = _group_by_layer(checkpoint, source)
    finder = LayerFinder(shapes)
    patches: dict[str, LoraPatch] = {}
    matched_layer: dict[str, str] = {}
    wrong, harmless = [], 0
    for layer, layer_keys in layers.items():
        for part, keys in _changes(layer_keys, layer, source):
            name = finder.find(layer, part)
            if name is None and is_harmless(layer):
                harmless += 1
                continue
            if name is None:
                unmatched.append(keys[0])
                continue
            if name in matched_layer:
                raise LoraError(
                    f"{source} changes {name} twice, as {matched_layer[name]} and as {layer}. It is mixed up."
                )
            matched_layer[name] = layer
            if why := _misfit(checkpoint.shapes, keys, shapes[name]):
                wrong.append(f"{name} {why}")
                continue
            scale = strength * _scale(checkpoint, layer_keys, keys, source)
            patches[name] = LoraPatch(keys[0], keys[1] if len(keys) > 1 else None, scale)
    _require_fit(source, checkpoint, shapes, len(patches), unmatched, wrong, allow_partial=allow_partial)
    report = LoraReport(
        path=source,
        strength=strength,
        applied=len(patches),
        total=len(patches) + len(unmatched),
        harmless=harmless,
        unmatched=tuple(unmatched),
    )
    return MatchedLora(checkpoint=checkpoint, patches=patches if strength else {}, report=report)


def _group_by_layer(checkpoint: Checkpoint, source: str) -> tuple[dict[str, Keys], list[str]]:
    """The file's keys by layer, and the keys of unknown kinds."""
    layers: dict[str, Keys] = {}
    unknown: list[str] = []
    for key in checkpoint.shapes:
        if is_foreign(key):
            raise LoraError(f"{source} is no plain LoRA ({key:.100}); DoRA, LoKr, LoHa and OFT are not supported.")
        parsed = parse_key(key)
        if parsed is None:
            unknown += [] if is_harmless(key) else [key]
            continue
        layer, kind = parsed
        if kind == "mid":
            raise LoraError(f"{source}: {key:.100} belongs to a LoRA of convolutions, which is not supported.")
        keys = layers.setdefault(layer, {})
        if kind in keys:
            raise LoraError(f"{source} holds {kind} of {layer:.100} twice. It is mixed up.")
        keys[kind] = key
    return layers, unknown


def _changes(keys: Keys, layer: str, source: str) -> Iterable[tuple[str, tuple[str, ...]]]:
    """The changes of one layer: ("weight" | "bias" | "modulation", keys)."""
    halves = [kind for kind in ("up", "down") if kind in keys]
    if len(halves) == 1:
        raise LoraError(f"{source}: {layer:.100} has only its {halves[0]} half. The file is incomplete: get it again.")
    if halves and "diff" in keys:
        raise LoraError(f"{source}: {layer:.100} has both a low-rank pair and a difference. It is mixed up.")
    if halves:
        yield "weight", (keys["up"], keys["down"])
    for kind, part in (("diff", "weight"), ("diff_b", "bias"), ("diff_m", "modulation")):
        if kind in keys:
            yield part, (keys[kind],)


def _scale(checkpoint: Checkpoint, layer_keys: Keys, keys: Sequence[str], source: str) -> float:
    """alpha / rank for a pair. No alpha, or one of 0 as some trainers write it, means alpha = rank."""
    if len(keys) == 1 or "alpha" not in layer_keys:
        return 1.0
    key = layer_keys["alpha"]
    tensor = checkpoint.tensor(key)
    alpha = float(tensor) if tensor.numel() == 1 else float("nan")
    if not abs(alpha) < float("inf"):
        raise LoraError(f"{source}: {key:.100} must be one finite number. The file is damaged: get it again.")
    return alpha / checkpoint.shapes[keys[1]][0] if alpha else 1.0


def _misfit(shapes: Shapes, keys: Sequence[str], expected: tuple[int, ...]) -> str:
    """Why these tensors do not make a change of a tensor of shape `expected`, or ""."""
    if len(keys) == 1:
        shape = shapes[keys[0]]
        fits = shape == expected or math.prod(shape) == math.prod(expected) and shape[:1] == expected[:1]
        return "" if fits else f"has a difference of {list(shape)}, the model {list(expected)}"
    up, down = shapes[keys[0]], shapes[keys[1]]
    fits = (
        len(up) >= 2
        and len(down) >= 2
        and len(expected) >= 2
        and (up[0], math.prod(up[1:])) == (expected[0], down[0])
        and math.prod(down[1:]) == math.prod(expected[1:])
    )
    return "" if fits else f"has up {list(up)} and down {list(down)}, the model {list(expected)}"


def _require_fit(
    source: str,
    checkpoint: Checkpoint,
    shapes: Shapes,
    applied: int,
    unmatched: Sequence[str],
    wrong: Sequence[str],
    *,
    allow_partial: bool,
) -> None:
    if wrong:
        raise LoraError(
            f"{source} does not fit this model: {len(wrong)} of its layers have other sizes. {'; '.join(wrong[:3])}. "
            "Is it a LoRA for another model or task? Nothing of it was applied."
        )
    samples = ", ".join(f"{name:.80}" for name in unmatched[:3])
    if not applied and any(diffusers_to_wan(strip_prefix(name)) in shapes for name in unmatched):
        raise LoraError(f"{source} holds a whole model, not a LoRA ({samples}). Set it as the expert's checkpoint.")
    if not applied:
        theirs = samples or ", ".join(f"{name:.80}" for name in list(checkpoint.shapes)[:3])
        raise LoraError(
            f"{source} changes nothing in this model: none of its {len(checkpoint)} tensors has a place. It holds "
            f"{theirs}; the model has {', '.join(list(shapes)[:3])}. Is it a LoRA for another model?"
        )
    if unmatched and not allow_partial:
        raise LoraError(
            f"{source} fits this model only in part: {applied} layers have a place, {len(unmatched)} have none "
            f"({samples}). Is it a LoRA for another model? Nothing of it was applied."
        )
