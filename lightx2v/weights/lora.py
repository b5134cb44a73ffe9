"""LoRA files: read in every dialect, matched against a model's tensors, added to them in float32.

    lora = match_lora(path, shapes, strength=1.0)     from the headers: all fits, or LoraError and nothing was touched
    lora.patches                                      the model's names that change
    lora.add_to("blocks.0.ffn.0.weight", weight)      weight += strength * alpha / rank * up @ down, in place
    lora.report                                       applied n of m, what was not and why

Besides low-rank pairs a file may hold differences as they are: `.diff` (weights), `.diff_b` (biases), `.diff_m`
(modulation). Names may be Wan's, diffusers' or kohya's, with any of the known prefixes.
"""

from __future__ import annotations

import math
import re
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..config.lora_names import partner_names
from ..errors import LoraError, short_path
from .checkpoint import Checkpoint, open_checkpoint
from .dit_names import diffusers_to_wan, strip_prefix, wan_to_diffusers

Shapes = Mapping[str, tuple[int, ...]]

_PREFIX = re.compile(r"(base_model\.model\.|model\.|diffusion_model\.|transformer(_2)?\.|unet\.|dit\.)")
_KOHYA = re.compile(r"(lora_unet|lora_transformer|lora_dit|lora|lycoris)_+(?=\w)")
_PAIR = re.compile(
    r"(?P<stem>.+?)(?:"
    r"\.lora_(?P<a>up|down|mid)\.weight"
    r"|[._]lora(?:_linear_layer)?\.(?P<b>up|down)\.weight"
    r"|\.lora_(?P<c>[AB])(?:\.(?!weight$|bias$)\w+)?(?:\.weight)?"
    r")"
)
_PLAIN = re.compile(r"(?P<stem>.+)\.(?P<kind>alpha|diff|diff_b|diff_m)")
_FOREIGN = re.compile(r"dora_scale|magnitude_vector|lokr_|hada_|oft_|boft_|lora_B\.bias")
_HARMLESS = re.compile(
    r"(^|[._])(k_img|v_img|norm_k_img|img_emb|add_k_proj|add_v_proj|norm_added_[kq]|image_embedder)([._]|$)"
)
"""Layers for a CLIP image, which Wan2.1 has and Wan2.2 has not; distilled LoRAs carry them along."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraReport:
    """What became of one file. `unmatched` are names that this model has no place for."""

    path: str
    strength: float
    applied: int
    total: int
    harmless: int
    unmatched: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        return {
            "path": self.path,
            "strength": self.strength,
            "applied": self.applied,
            "total": self.total,
            "harmless": self.harmless,
            "unmatched": list(self.unmatched[:20]),
            "warnings": list(self.warnings),
        }


@dataclass(frozen=True, slots=True)
class LoraPatch:
    """One tensor's change: a low-rank pair, or with `down` None a difference. The keys are the file's."""

    up: str
    down: str | None
    scale: float


Keys = dict[str, str]
"""Of one layer: what it is ("up", "down", "alpha", "diff", …) -> the file's key."""


@dataclass(frozen=True, slots=True)
class LoraDelta:
    """A patch with its tensors: scale * up @ down, or with `down` None scale * up."""

    up: Tensor
    down: Tensor | None
    scale: float

    def add_to(self, rows: Tensor, start: int = 0) -> None:
        """Adds it to these rows of the tensor that it changes, in place; `start` is the first one's index."""
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
        """Of all that it changes by."""
        keys = (key for patch in self.patches.values() for key in (patch.up, patch.down) if key)
        return sum(math.prod(self.checkpoint.shapes[key]) for key in keys)

    def only(self, names: Container[str]) -> MatchedLora:
        """Its changes of these tensors."""
        return replace(self, patches={name: patch for name, patch in self.patches.items() if name in names})

    def low_rank(self, name: str) -> tuple[Tensor, Tensor] | None:
        """(down_RI, up_OR) in float32 with all scales in `up`; None where the change is a difference."""
        patch = self.patches[name]
        if patch.down is None:
            return None
        return self._read(patch.down).flatten(1), self._read(patch.up).flatten(1) * patch.scale

    def add_to(self, name: str, weight: Tensor) -> None:
        """Adds this file's change of the tensor `name` to `weight`, which is float32 (or float64), in place."""
        self.change(name, weight.device, weight.dtype).add_to(weight)

    def change(self, name: str, device: torch.device, dtype: torch.dtype) -> LoraDelta:
        """This file's change of the tensor `name`, read."""
        patch = self.patches[name]
        up = self._read(patch.up, device).to(dtype)
        if patch.down is None:
            return LoraDelta(up, None, patch.scale)
        return LoraDelta(up.flatten(1), self._read(patch.down, device).to(dtype).flatten(1), patch.scale)

    def _read(self, key: str, device: torch.device | str = "cpu") -> Tensor:
        """In float32, and looked at, on `device`: with many cores a CPU is slow at so many small tensors."""
        tensor = self.checkpoint.tensor(key)
        if tensor.dtype is torch.float64:  # not every device has that
            tensor = tensor.float()
        tensor = tensor.to(device).float()
        if not bool(torch.isfinite(tensor).all()):
            raise LoraError(
                f"{short_path(self.checkpoint.path)}: {key} holds NaN or infinity. The file is damaged: get it again."
            )
        return tensor


def match_lora(path: str | Path, shapes: Shapes, *, strength: float = 1.0, allow_partial: bool = False) -> MatchedLora:
    """The LoRA at `path` for a model with tensors of these shapes (in Wan's names).

    LoraError where nothing matches, where a shape is wrong, where a pair lacks a half and, unless `allow_partial`,
    where the model has no place for some of it. Reads the headers and the alphas only.
    """
    checkpoint = open_checkpoint(path)
    source = short_path(path)
    groups, strangers = _gather(checkpoint, source)
    find = _Finder(shapes)
    patches: dict[str, LoraPatch] = {}
    origin: dict[str, str] = {}
    unmatched, wrong, harmless = [*strangers], [], 0
    for stem, of_layer in groups.items():
        for kind, keys in _changes(of_layer, stem, source):
            name = find(stem, kind)
            if name is None and _HARMLESS.search(stem):
                harmless += 1
                continue
            if name is None:
                unmatched.append(keys[0])
                continue
            if name in origin:
                raise LoraError(f"{source} changes {name} twice, as {origin[name]} and as {stem}. It is mixed up.")
            origin[name] = stem
            why = _misfit(checkpoint.shapes, keys, shapes[name])
            if why:
                wrong.append(f"{name} {why}")
                continue
            scale = strength * _scale(checkpoint, of_layer, keys, source)
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


def _gather(checkpoint: Checkpoint, source: str) -> tuple[dict[str, Keys], list[str]]:
    """The file's keys by layer, and those that are of no known kind."""
    groups: dict[str, Keys] = {}
    strangers: list[str] = []
    for key in checkpoint.shapes:
        if _FOREIGN.search(key):
            raise LoraError(f"{source} is no plain LoRA ({key:.100}); DoRA, LoKr, LoHa and OFT are not supported.")
        if match := _PAIR.fullmatch(key):
            kind = match["a"] or match["b"] or {"A": "down", "B": "up"}[match["c"]]
        elif match := _PLAIN.fullmatch(key):
            kind = match["kind"]
        else:
            strangers += [] if _HARMLESS.search(key) else [key]
            continue
        if kind == "mid":
            raise LoraError(f"{source}: {key:.100} belongs to a LoRA of convolutions, which is not supported.")
        stem = match["stem"].replace(".processor.", ".")
        keys = groups.setdefault(stem, {})
        if kind in keys:
            raise LoraError(f"{source} holds {kind} of {stem:.100} twice. It is mixed up.")
        keys[kind] = key
    return groups, strangers


def _changes(keys: Keys, stem: str, source: str) -> Iterable[tuple[str, tuple[str, ...]]]:
    """What one layer's keys ask for: ("weight" | "bias" | "modulation", keys)."""
    halves = [kind for kind in ("up", "down") if kind in keys]
    if len(halves) == 1:
        raise LoraError(f"{source}: {stem:.100} has only its {halves[0]} half. The file is incomplete: get it again.")
    if halves and "diff" in keys:
        raise LoraError(f"{source}: {stem:.100} has both a low-rank pair and a difference. It is mixed up.")
    if halves:
        yield "weight", (keys["up"], keys["down"])
    for kind, part in (("diff", "weight"), ("diff_b", "bias"), ("diff_m", "modulation")):
        if kind in keys:
            yield part, (keys[kind],)


def _scale(checkpoint: Checkpoint, of_layer: Keys, keys: Sequence[str], source: str) -> float:
    """alpha / rank for a pair. No alpha, or one of 0 as some trainers write it, means alpha = rank."""
    if len(keys) == 1 or "alpha" not in of_layer:
        return 1.0
    key = of_layer["alpha"]
    tensor = checkpoint.tensor(key)
    alpha = float(tensor) if tensor.numel() == 1 else float("nan")
    if not abs(alpha) < float("inf"):
        raise LoraError(f"{source}: {key:.100} is no finite number. The file is damaged: get it again.")
    return alpha / checkpoint.shapes[keys[1]][0] if alpha else 1.0


def _misfit(found: Shapes, keys: Sequence[str], expected: tuple[int, ...]) -> str:
    """Why these tensors do not make a change of a tensor of shape `expected`, or ""."""
    if len(keys) == 1:
        shape = found[keys[0]]
        fits = shape == expected or math.prod(shape) == math.prod(expected) and shape[:1] == expected[:1]
        return "" if fits else f"has a difference of {list(shape)}, the model {list(expected)}"
    up, down = found[keys[0]], found[keys[1]]
    fits = (
        len(up) >= 2
        and len(down) >= 2
        and len(expected) >= 2
        and (up[0], math.prod(up[1:])) == (expected[0], down[0])
        and math.prod(down[1:]) == math.prod(expected[1:])
    )
    return "" if fits else f"has up {list(up)} and down {list(down)}, the model {list(expected)}"


class _Finder:
    """The model's name for a LoRA's layer, in whichever dialect it is called."""

    def __init__(self, shapes: Shapes) -> None:
        self.shapes = shapes
        self.flat: dict[str, str] = {}
        for name in shapes:
            stem = name.rpartition(".")[0]
            for spelling in (stem, wan_to_diffusers(stem), name, wan_to_diffusers(name)):
                self.flat.setdefault(spelling.replace(".", "_"), stem)

    def __call__(self, stem: str, part: str) -> str | None:
        while (match := _PREFIX.match(stem)) and not self._direct(stem, part):
            stem = stem[match.end() :]
        found = self._direct(stem, part)
        if found is None and (match := _KOHYA.match(stem)):
            known = self.flat.get(stem[match.end() :])
            found = self._direct(known, part) if known else None
        return found

    def _direct(self, stem: str, part: str) -> str | None:
        for ours in (stem, diffusers_to_wan(stem)):
            if f"{ours}.{part}" in self.shapes:
                return f"{ours}.{part}"
            if ours in self.shapes:  # a bare parameter, such as modulation
                return ours
        return None


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
        raise LoraError(f"{source} is a whole model and no LoRA ({samples}). Give it as the expert's checkpoint.")
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


def partner_of(path: str | Path) -> Path | None:
    """The LoRA for the other expert that belongs to `path` by its name, if it is there."""
    return next((Path(name) for name in partner_names(Path(path).as_posix()) if Path(name).is_file()), None)
