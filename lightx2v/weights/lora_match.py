"""match_lora: find the tensors of a model that a LoRA file changes, and how: either all fits, or LoraError."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Literal

from ..errors import LoraError, short_path
from .checkpoint import Checkpoint, open_checkpoint, read_in_order
from .dit_names import diffusers_to_wan
from .lora import LoraPatch, LoraReport, MatchedLora
from .lora_alpha import LoraScales
from .lora_forms import MAGNITUDES, NAMES, Form, Keys, Shapes, changes, misfit, rank_of
from .lora_keys import LayerFinder, experts_of, foreign_kind, is_harmless, parse_key
from .quant_layout import PLAIN
from .tensor_file import FLOATS
from .wrapper_prefixes import unwrap_dit

PATCH = "patch_embedding.weight"


def match_lora(
    path: str | Path,
    shapes: Shapes,
    *,
    strength: float = 1.0,
    allow_partial: bool = False,
    expert: Literal["high", "low"] | None = None,
) -> MatchedLora:
    """Match the LoRA at `path` to a model with tensors of these shapes (in Wan's names). Reads headers and alphas.

    `expert` chooses the half of a file that holds one for each expert. LoraError if nothing matches, a shape is wrong,
    a layer is incomplete, or (unless `allow_partial`) some of it has no place in the model.
    """
    checkpoint = open_checkpoint(path)
    source = short_path(path)
    if checkpoint.blocks:
        raise LoraError(
            f"{source} is a GGUF file with {next(iter(checkpoint.blocks.values())).form.name} weights, which is not "
            "supported for LoRAs. Take the LoRA as safetensors, or in F16."
        )
    layers, unknown = _group_by_layer(checkpoint, source)
    layers = _one_half(layers, expert, source)
    finder, scales = LayerFinder(shapes), LoraScales(checkpoint, source, expert)
    found = _Found(unmatched=[key for key in unknown if not finder.holds(key)])
    for layer, layer_keys in layers.items():
        if layer_keys.keys() == {"alpha"}:
            found.leave_alpha(finder.find(layer, "weight"), layer, layer_keys["alpha"])
        for part, form, keys in changes(layer_keys, layer, source):
            found.place(finder.find(layer, part), layer, form, keys, checkpoint.shapes, shapes, source)
    understood = [key for key in unknown if key not in found.unmatched]
    _require_fit(source, checkpoint, shapes, found, understood, allow_partial=allow_partial)
    patches, alphas = {}, _alphas(checkpoint, layers.values())
    for name, (layer, form, keys) in found.places.items():
        for key in keys.values():
            if (dtype := checkpoint.dtypes[key]) not in (*FLOATS, *PLAIN):
                raise LoraError(
                    f"{source}: {key:.100} is stored in {str(dtype).removeprefix('torch.')}, which without a scale is "
                    "no weight; expected floats. Get the LoRA in bf16, fp16 or fp32."
                )
        scale = _scale(checkpoint, alphas, layers[layer], layer, form, keys, scales, source)
        dora = not keys.keys().isdisjoint(MAGNITUDES)
        patches[name] = LoraPatch(form, keys, scale if dora else strength * scale, strength)
    if scales.says_dora and not any(patch.is_dora for patch in patches.values()):
        raise LoraError(f"{source} says that it is a DoRA, but holds no magnitudes. It is incomplete: get it again.")
    report = LoraReport(
        path=source,
        strength=strength,
        applied=len(patches),
        total=len(patches) + len(found.unmatched),
        harmless=found.harmless,
        unmatched=tuple(found.unmatched),
        notes=_notes(patches, found, scales),
    )
    shapes_of_patches = {name: shapes[name] for name in patches}
    return MatchedLora(
        checkpoint=checkpoint, patches=patches if strength else {}, shapes=shapes_of_patches, report=report
    )


def _group_by_layer(checkpoint: Checkpoint, source: str) -> tuple[dict[str, Keys], list[str]]:
    """The file's keys by layer, and the keys of unknown kinds."""
    layers: dict[str, Keys] = {}
    unknown: list[str] = []
    for key in checkpoint.shapes:
        parsed = parse_key(key)
        if parsed is None:
            if (kind := foreign_kind(key)) is not None:
                raise LoraError(
                    f"{source} is no LoRA that is supported: {key:.100} belongs to {kind}. Supported are LoRA, DoRA, "
                    "LoKr, LoHa and plain differences. Look for the same file in one of these forms."
                )
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


def _one_half(layers: dict[str, Keys], expert: str | None, source: str) -> dict[str, Keys]:
    """Of a file with a half for each expert, that of `expert`."""
    halves = experts_of(layers)
    if len(set(halves.values())) < 2:
        return layers
    if expert is None:
        raise LoraError(
            f"{source} holds a half for each expert, and nothing says which one is meant. "
            "Name the expert's file so that it says high_noise or low_noise."
        )
    return {layer: keys for layer, keys in layers.items() if halves.get(layer, expert) == expert}


def _alphas(checkpoint: Checkpoint, layers: Iterable[Keys]) -> dict[str, float]:
    """The numbers in all tensors called alpha, by key; NaN for one that is no single number."""
    keys = [keys["alpha"] for keys in layers if "alpha" in keys]
    read = read_in_order([checkpoint.wanted(key) for key in keys if math.prod(checkpoint.shapes[key]) == 1])
    return dict.fromkeys(keys, math.nan) | {key: float(tensor) for key, tensor in read}


def _scale(
    checkpoint: Checkpoint,
    alphas: Mapping[str, float],
    layer_keys: Keys,
    layer: str,
    form: Form,
    keys: Keys,
    scales: LoraScales,
    source: str,
) -> float:
    """alpha / rank. An alpha of 0, as some trainers write it, means alpha = rank."""
    if form == "difference" and "up_bias" not in keys:
        return 1.0
    rank = rank_of(layer_keys, form, checkpoint.shapes)
    if "alpha" not in layer_keys:
        return scales.of(unwrap_dit(layer), rank)
    key = layer_keys["alpha"]
    alpha = alphas[key]
    if not math.isfinite(alpha):
        raise LoraError(f"{source}: {key:.100} must be one finite number. The file is damaged: get it again.")
    return alpha / rank if alpha and rank else 1.0


class _Found:
    """What of a file has a place in the model, and what has not."""

    def __init__(self, unmatched: list[str]) -> None:
        self.places: dict[str, tuple[str, Form, Keys]] = {}
        self.unmatched = unmatched
        self.wrong: list[str] = []
        self.wrong_patch: list[str] = []
        self.harmless = 0
        self.fewer_channels = 0
        self.lone_alphas = 0

    def leave_alpha(self, name: str | None, layer: str, key: str) -> None:
        """Note the alpha of a layer that does not change, or of no layer: whose it is then is not known."""
        if name is None and not is_harmless(layer):
            self.unmatched.append(key)
        else:
            self.lone_alphas += 1

    def place(
        self, name: str | None, layer: str, form: Form, keys: Keys, theirs: Shapes, ours: Shapes, source: str
    ) -> None:
        if name is None and is_harmless(layer):
            self.harmless += 1
            return
        if name is None:
            self.unmatched.append(next(iter(keys.values())))
            return
        if name in self.places:
            raise LoraError(f"{source} changes {name} twice, as {self.places[name][0]} and as {layer}. It is mixed up.")
        why, channels = misfit({kind: theirs[key] for kind, key in keys.items()}, form, ours[name])
        if why:
            (self.wrong_patch if name == PATCH else self.wrong).append(f"{name} {why}")
            if name == PATCH:
                self.unmatched.append(next(iter(keys.values())))
            return
        self.fewer_channels = channels or self.fewer_channels
        self.places[name] = (layer, form, keys)


def _notes(patches: Mapping[str, LoraPatch], found: _Found, scales: LoraScales) -> tuple[str, ...]:
    """What the report says about how the file was read."""
    notes = [f"{count} layers {sentence}." for sentence, count in scales.used.items()]
    forms = [patch.form for patch in patches.values()]
    notes += [f"{forms.count(form)} layers are {name}." for form, name in NAMES.items() if form in forms]
    if dora := sum(patch.is_dora for patch in patches.values()):
        notes.append(f"{dora} layers are DoRA.")
    if found.fewer_channels:
        notes.append(
            f"Its patch embedding is for {found.fewer_channels} input channels; the weights of the others stay."
        )
    if found.lone_alphas:
        notes.append(f"{found.lone_alphas} alphas are of layers that do not change, and are left out.")
    if found.harmless:
        notes.append(f"{found.harmless} layers for a CLIP image, which this model has not, are left out.")
    return tuple(notes)


def _require_fit(
    source: str,
    checkpoint: Checkpoint,
    shapes: Shapes,
    found: _Found,
    understood: Sequence[str],
    *,
    allow_partial: bool,
) -> None:
    wrong = found.wrong if allow_partial else [*found.wrong, *found.wrong_patch]
    if wrong:
        raise LoraError(
            f"{source} does not fit this model: {len(wrong)} of its layers have other sizes. {'; '.join(wrong[:3])}. "
            "Is it a LoRA for another model or task? Nothing of it was applied."
        )
    applied, unmatched = len(found.places), [*found.unmatched, *understood]
    samples = ", ".join(f"{name:.80}" for name in unmatched[:3])
    if not applied and any(diffusers_to_wan(unwrap_dit(name)) in shapes for name in unmatched):
        raise LoraError(f"{source} holds a whole model, not a LoRA ({samples}). Set it as the expert's checkpoint.")
    if not len(checkpoint):
        raise LoraError(f"{source} holds no tensors, so it changes nothing. It is incomplete: get it again.")
    if not applied:
        theirs = samples or ", ".join(f"{name:.80}" for name in list(checkpoint.shapes)[:3])
        raise LoraError(
            f"{source} changes nothing in this model: none of its {len(checkpoint)} tensors has a place. It holds "
            f"{theirs}; the model has {', '.join(list(shapes)[:3])}. Is it a LoRA for another model?"
        )
    if understood:
        raise LoraError(
            f"{source} holds {understood[0]:.100}, whose meaning is not known here. Nothing of it was applied. "
            "Look for the same LoRA in another form."
        )
    if unmatched and not allow_partial:
        raise LoraError(
            f"{source} fits this model only in part: {applied} layers have a place, {len(unmatched)} have none "
            f"({samples}). Is it a LoRA for another model? Nothing of it was applied."
        )
