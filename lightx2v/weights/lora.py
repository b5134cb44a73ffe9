"""MatchedLora: a LoRA file matched to a model's tensors, and its addition to them in float32.

    lora = match_lora(path, shapes, strength=1.0)     reads headers: either all fits, or LoraError
    lora.patches                                      the tensors that change, in Wan's names
    add_loras(weight, name, [lora], dtype)            the weight with its changes, rounded once
    lora.report                                       how many layers apply, which do not, and what the file says

`lora_keys.py` knows the dialects, `lora_alpha.py` where alpha is written, `lora_delta.py` the formulas.
"""

from __future__ import annotations

import math
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from ..errors import LoraError, short_path
from .checkpoint import Checkpoint, open_checkpoint
from .dit_names import diffusers_to_wan
from .lora_alpha import LoraScales
from .lora_delta import Delta, Difference, Dora, Hadamard, Kronecker, Pair, add_deltas, contracted
from .lora_forms import MAGNITUDES, NAMES, Form, Keys, Shapes, changes, misfit, rank_of
from .lora_keys import LayerFinder, experts_of, foreign_kind, is_harmless, parse_key
from .quant_layout import PLAIN
from .tensor_file import FLOATS
from .wrapper_prefixes import unwrap_dit

ROWS = 256
"""Rows of a weight that a CPU adds a LoRA to at once: 5 MB of float32 at full width."""

LARGEST_CHANGE = 1e6
"""No weight that a network has learnt is nearly as large. Beyond it the video would be noise or NaN, and the message
would blame the expert."""

PATCH = "patch_embedding.weight"


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraReport:
    """What one file changes. `unmatched` are keys that have no place in this model; `notes` say how it was read."""

    path: str
    strength: float | tuple[float, ...]
    """One for each phase of the video, if it changes."""
    applied: int
    total: int
    harmless: int
    unmatched: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {
            "strength": list(self.strength) if isinstance(self.strength, tuple) else self.strength,
            "unmatched": list(self.unmatched[:20]),
            "notes": list(self.notes),
            "warnings": list(self.warnings),
        }


@dataclass(frozen=True, slots=True)
class LoraPatch:
    """The change of one tensor, by the file's keys: how they make it (`form`) and what it is multiplied with.

    With a "magnitude" or "dora_scale" among the keys it is a DoRA: `scale` is inside of it, `strength` outside.
    """

    form: Form
    keys: Keys
    scale: float
    strength: float = 1.0

    @property
    def is_dora(self) -> bool:
        return not self.keys.keys().isdisjoint(MAGNITUDES)

    @property
    def runs_beside(self) -> bool:
        """Whether its product can be computed beside the weight, without the matrix that it adds."""
        return self.form != "hadamard" and not self.is_dora


@dataclass(frozen=True, slots=True, kw_only=True)
class MatchedLora:
    """One file that fits one model. `shapes` are the model's of the tensors that change."""

    checkpoint: Checkpoint
    patches: dict[str, LoraPatch]
    shapes: Shapes
    report: LoraReport
    strengths: tuple[float, ...] = ()
    """Of each phase, if the strength changes. The patches have the largest of them."""
    sizes: dict[str, float] = field(default_factory=dict)
    """How large the changes read so far are: the product of the largest values of their factors."""
    zero: set[str] = field(default_factory=set)
    """The tensors among those read so far whose change is zero."""

    @property
    def elements(self) -> int:
        """The number of values in its matrices and differences."""
        keys = (key for patch in self.patches.values() for key in patch.keys.values())
        return sum(math.prod(self.checkpoint.shapes[key]) for key in keys)

    def only(self, names: Container[str]) -> MatchedLora:
        """The same LoRA restricted to these tensors."""
        return replace(self, patches={name: patch for name, patch in self.patches.items() if name in names})

    @property
    def shares(self) -> tuple[float, ...]:
        """The strength of each phase as a share of that of the patches."""
        largest = max(self.strengths, key=abs)
        return tuple(strength / largest for strength in self.strengths)

    def in_phase(self, phase: int) -> MatchedLora:
        """The same LoRA with its strength of one phase."""
        if not self.strengths or self.shares[phase] == 1:
            return self
        share = self.shares[phase]
        patches = {name: replace(patch, scale=share * patch.scale) for name, patch in self.patches.items() if share}
        return replace(self, patches=patches)

    def delta(self, name: str, device: torch.device | str, dtype: torch.dtype) -> Delta:
        """Read the change of the tensor `name`."""
        return self.build(name, {kind: part.to(dtype) for kind, part in self.parts(name, device).items()})

    def parts(self, name: str, device: torch.device | str) -> dict[str, Tensor]:
        """Read what makes the change of the tensor `name`: {kind: tensor in float32}."""
        return {kind: self._read(key, device) for kind, key in self.patches[name].keys.items()}

    def build(self, name: str, parts: Mapping[str, Tensor]) -> Delta:
        """The change of the tensor `name` from its parts."""
        patch, shape = self.patches[name], self.shapes[name]
        delta, changes = _delta(patch, parts, shape)
        magnitude = next((parts[kind] for kind in MAGNITUDES if kind in parts), None)
        if magnitude is not None:
            per_input = "dora_scale" in parts and len(magnitude) != shape[0]
            return Dora(delta, magnitude.flatten(), per_input, patch.strength)
        sizes = [float(torch.stack(torch.aminmax(part)).abs().amax()) if part.numel() else 0.0 for part in changes]
        self.sizes[name] = abs(patch.scale) * math.prod(sizes)
        if not all(sizes):
            self.zero.add(name)
        return delta

    def require_possible(self, name: str) -> None:
        """LoraError if the change of the tensor `name`, which was read, is larger than any that was trained."""
        if self.sizes.get(name, 0.0) > LARGEST_CHANGE:
            raise LoraError(
                f"{self.report.path} changes {name} by about {self.sizes[name]:.3g}; expected less than "
                f"{LARGEST_CHANGE:g}. Lower the strength; if that does not help, its alpha or values are damaged: "
                "get it again."
            )

    def _read(self, key: str, device: torch.device | str) -> Tensor:
        """Cast to float32 and check on `device`: a CPU with many cores is slow at so many small tensors."""
        tensor = self.checkpoint.tensor(key)
        if tensor.dtype is torch.float64:  # not every device has float64
            tensor = tensor.float()
        tensor = tensor.to(device).float()
        require_finite(tensor, f"{short_path(self.checkpoint.path)}: {key:.100}", "The file is damaged: get it again.")
        return tensor


def require_finite(tensor: Tensor, what: str, then: str) -> None:
    if not bool(torch.isfinite(tensor).all()):
        raise LoraError(f"{what} holds NaN or infinity. {then}")


def _delta(patch: LoraPatch, parts: Mapping[str, Tensor], shape: tuple[int, ...]) -> tuple[Delta, list[Tensor]]:
    """The change, and the tensors of which it is a product: if one of them is zero, nothing changes."""
    if patch.form == "difference":
        (values,) = (part for kind, part in parts.items() if kind not in MAGNITUDES)
        values = _for_more_channels(values, shape)
        return Difference(values, patch.scale), [values]
    if patch.form == "pair":
        up, down = (
            parts["up"].flatten(1),
            _for_more_channels(parts["down"], (len(parts["down"]), *shape[1:])).flatten(1),
        )
        return Pair(up, down, patch.scale), [up, down]
    if patch.form == "kronecker":
        w1, w2 = (_factor(parts, f"lokr_w{index}", parts.get("lokr_t2") if index == 2 else None) for index in (1, 2))
        return Kronecker(w1, w2, patch.scale), [w1, w2]
    sides = [[parts[f"hada_w{index}_{side}"].flatten(1) for side in "ab"] for index in (1, 2)]
    cores = [parts.get(f"hada_t{index}") for index in (1, 2)]
    whole = [contracted(t, *side) for t, side in zip(cores, sides, strict=True) if t is not None]
    if whole:
        return Difference(whole[0] * whole[1], patch.scale), whole
    (w1_a, w1_b), (w2_a, w2_b) = sides
    return Hadamard(w1_a, w1_b, w2_a, w2_b, patch.scale), [w1_a, w1_b, w2_a, w2_b]


def _factor(parts: Mapping[str, Tensor], name: str, core: Tensor | None) -> Tensor:
    if name in parts:
        return parts[name].flatten(1)
    a, b = parts[f"{name}_a"].flatten(1), parts[f"{name}_b"]
    return contracted(core, a, b.flatten(1)) if core is not None else a @ b.flatten(1)


def _for_more_channels(values: Tensor, shape: tuple[int, ...]) -> Tensor:
    """A change of a patch embedding for fewer input channels, extended with zeros. Others come back as they are."""
    missing = math.prod(shape) - values.numel()
    if missing <= 0 or len(shape) != 5:
        return values
    values = values.reshape(shape[0], -1, *shape[2:])
    return torch.cat([values, values.new_zeros(shape[0], shape[1] - values.shape[1], *shape[2:])], dim=1)


def add_loras(tensor: Tensor, name: str, loras: Sequence[MatchedLora], dtype: torch.dtype) -> Tensor:
    """`tensor` plus the changes of all `loras`, added in float32 at least and rounded once. May overwrite `tensor`.

    A CPU adds some rows at a time: the wide copies stay in its cache and need no memory.
    """
    wide = torch.promote_types(tensor.dtype, torch.float32)
    deltas = [lora.delta(name, tensor.device, wide) for lora in loras]
    if not deltas or not tensor.dim():
        return tensor.to(dtype)
    result = torch.empty_like(tensor, dtype=dtype)
    rows = max(1, ROWS if tensor.device.type == "cpu" else len(tensor))
    for part in add_deltas(deltas, lambda start: tensor[start : start + rows].to(wide), result, rows):
        require_finite_sum(part, name, loras)
    return result


def require_finite_sum(part: Tensor, name: str, loras: Iterable[MatchedLora]) -> None:
    """LoraError if these weights of the tensor `name`, with the changes of `loras`, are not finite or changed beyond
    reason."""
    # The extremes are finite only if all values are, and a pass for them is far faster than isfinite.
    if not bool(torch.isfinite(torch.stack(torch.aminmax(part))).all()):
        files = ", ".join(lora.report.path for lora in loras)
        raise LoraError(
            f"{name} becomes NaN or infinite with {files}. Lower the strength; if that does not help, one of the "
            "files is damaged: get it again."
        )
    for lora in loras:
        lora.require_possible(name)


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
    found = _Found(unmatched=[key for key in unknown if not _is_of_a_layer(key, finder)])
    for layer, layer_keys in layers.items():
        for part, form, keys in changes(layer_keys, layer, source):
            found.place(finder.find(layer, part), layer, form, keys, checkpoint.shapes, shapes, source)
    understood = [key for key in unknown if key not in found.unmatched]
    _require_fit(source, checkpoint, shapes, found, understood, allow_partial=allow_partial)
    patches = {}
    for name, (layer, form, keys) in found.places.items():
        for key in keys.values():
            if (dtype := checkpoint.dtypes[key]) not in (*FLOATS, *PLAIN):
                raise LoraError(
                    f"{source}: {key:.100} is stored in {str(dtype).removeprefix('torch.')}, which without a scale is "
                    "no weight; expected floats. Get the LoRA in bf16, fp16 or fp32."
                )
        scale = _scale(checkpoint, layers[layer], layer, form, keys, scales, source)
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


def _is_of_a_layer(key: str, finder: LayerFinder) -> bool:
    """Whether the unknown kind of key belongs to a layer of this model, whose meaning it may change."""
    return finder.find(key.rpartition(".")[0], "weight") is not None


def _scale(
    checkpoint: Checkpoint, layer_keys: Keys, layer: str, form: Form, keys: Keys, scales: LoraScales, source: str
) -> float:
    """alpha / rank. An alpha of 0, as some trainers write it, means alpha = rank."""
    if form == "difference" and "up_bias" not in keys:
        return 1.0
    rank = rank_of(layer_keys, form, checkpoint.shapes)
    if "alpha" not in layer_keys:
        return scales.of(unwrap_dit(layer), rank)
    key = layer_keys["alpha"]
    tensor = checkpoint.tensor(key)
    alpha = float(tensor) if tensor.numel() == 1 else float("nan")
    if not abs(alpha) < float("inf"):
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
