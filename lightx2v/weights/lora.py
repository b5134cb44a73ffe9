"""MatchedLora: a LoRA file matched to a model's tensors, and its addition to them in float32.

    lora = match_lora(path, shapes, strength=1.0)     reads headers: either all fits, or LoraError
    lora.patches                                      the tensors that change, in Wan's names
    add_loras(weight, name, [lora], dtype)            the weight with its changes, rounded once
    lora.report                                       how many layers apply, which do not, and what the file says

`lora_match.py` matches, `lora_keys.py` knows the dialects, `lora_alpha.py` where alpha is written, `lora_delta.py` the
formulas.
"""

from __future__ import annotations

import math
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..errors import LoraError, short_path
from .checkpoint import Checkpoint, Wanted, read_in_order
from .device_checks import DeviceChecks
from .lora_delta import Delta, Difference, Dora, Hadamard, Kronecker, Pair, add_deltas, contracted
from .lora_forms import MAGNITUDES, Form, Keys, Shapes

ROWS = 256
"""Rows of a weight that a CPU adds a LoRA to at once: 5 MB of float32 at full width."""

LARGEST_CHANGE = 1e6
"""No weight that a network has learnt is nearly as large. Beyond it the video would be noise or NaN, and the message
would blame the expert."""


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
    largest: dict[tuple[str, str], float] = field(default_factory=dict)
    """The largest value of each part read so far, by tensor and kind."""
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

    def wanted(self, name: str) -> list[Wanted]:
        """What makes the change of the tensor `name`, to be read for `checked`."""
        return [self.checkpoint.wanted(key, torch.float32) for key in self.patches[name].keys.values()]

    def checked(self, name: str, tensors: Iterable[Tensor], checks: DeviceChecks) -> dict[str, Tensor]:
        """The tensors that were read for `wanted`: {kind: tensor in float32}. `checks` finds values that are none."""
        parts = {}
        for (kind, key), tensor in zip(self.patches[name].keys.items(), tensors, strict=True):
            parts[kind] = tensor.float()
            checks.ask(extremes(parts[kind]), partial(self._seen, name, kind, key))
        return parts

    def _seen(self, name: str, kind: str, key: str, ends: list[float]) -> None:
        self.largest[name, kind] = max(map(abs, ends), default=0.0)
        require_numbers(ends, f"{short_path(self.checkpoint.path)}: {key:.100}", "The file is damaged: get it again.")

    def parts(self, name: str, device: torch.device | str) -> dict[str, Tensor]:
        """Read what makes the change of the tensor `name`: {kind: tensor in float32}."""
        checks = DeviceChecks()
        parts = self.checked(name, [tensor for _, tensor in read_in_order(self.wanted(name), device)], checks)
        checks.finish()
        return parts

    def delta(self, name: str, device: torch.device | str, dtype: torch.dtype) -> Delta:
        """Read the change of the tensor `name`."""
        return self.build(name, {kind: part.to(dtype) for kind, part in self.parts(name, device).items()})

    def build(self, name: str, parts: Mapping[str, Tensor], checks: DeviceChecks | None = None) -> Delta:
        """The change of the tensor `name` from its parts. Its size is known after `checks`, or at once without any."""
        patch, shape = self.patches[name], self.shapes[name]
        delta, changes = _delta(patch, parts, shape)
        magnitude = next((parts[kind] for kind in MAGNITUDES if kind in parts), None)
        if magnitude is not None:
            per_input = "dora_scale" in parts and len(magnitude) != shape[0]
            return Dora(delta, magnitude.flatten(), per_input, patch.strength)
        asked = checks or DeviceChecks()
        seen = checks is not None or all((name, kind) in self.largest for kind in patch.keys)
        if seen and patch.form in ("pair", "difference"):  # `checked` has looked at their factors
            asked.ask((), lambda _: self._measured(name, [self.largest[name, kind] for kind in patch.keys]))
        else:
            found = [extremes(part) or (part.new_zeros(()),) * 2 for part in changes]
            asked.ask([end for ends in found for end in ends], partial(self._measured_by_ends, name))
        if checks is None:
            asked.finish()
        return delta

    def _measured_by_ends(self, name: str, ends: list[float]) -> None:
        """`ends` are the smallest and the largest value of each factor."""
        self._measured(name, [max(abs(low), abs(high)) for low, high in zip(ends[::2], ends[1::2], strict=True)])

    def _measured(self, name: str, sizes: list[float]) -> None:
        """`sizes` are the largest values of the factors of the change of the tensor `name`."""
        self.sizes[name] = abs(self.patches[name].scale) * math.prod(sizes)
        if not all(sizes):
            self.zero.add(name)

    def require_possible(self, name: str) -> None:
        """LoraError if the change of the tensor `name`, which was read, is larger than any that was trained."""
        if self.sizes.get(name, 0.0) > LARGEST_CHANGE:
            raise LoraError(
                f"{self.report.path} changes {name} by about {self.sizes[name]:.3g}; expected less than "
                f"{LARGEST_CHANGE:g}. Lower the strength; if that does not help, its alpha or values are damaged: "
                "get it again."
            )


def extremes(tensor: Tensor) -> Sequence[Tensor]:
    """Smallest and largest value; NaN where one is among them. Faster than isfinite; nothing where there is none."""
    return torch.aminmax(tensor) if tensor.numel() else ()


def require_numbers(ends: list[float], what: str, then: str) -> None:
    """LoraError unless these extremes are finite numbers."""
    if not all(map(math.isfinite, ends)):
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


def add_loras(
    tensor: Tensor,
    name: str,
    loras: Sequence[MatchedLora],
    dtype: torch.dtype,
    parts: Sequence[Mapping[str, Tensor]] | None = None,
    checks: DeviceChecks | None = None,
) -> Tensor:
    """`tensor` plus the changes of all `loras`, added in float32 at least and rounded once. May overwrite `tensor`.

    `parts` are those of each LoRA, if they are read already. Errors in values come from `checks`, or at once without
    any. A CPU adds some rows at a time: the wide copies stay in its cache and need no memory.
    """
    wide, asked = torch.promote_types(tensor.dtype, torch.float32), checks or DeviceChecks()
    if parts is None:
        parts = [lora.parts(name, tensor.device) for lora in loras]
    deltas = [
        lora.build(name, {kind: part.to(wide) for kind, part in own.items()}, asked)
        for lora, own in zip(loras, parts, strict=True)
    ]
    if not deltas or not tensor.dim():
        return tensor.to(dtype)
    result = torch.empty_like(tensor, dtype=dtype)
    rows = max(1, ROWS if tensor.device.type == "cpu" else len(tensor))
    for part in add_deltas(deltas, lambda start: tensor[start : start + rows].to(wide), result, rows):
        require_finite_sum(part, name, loras, asked)
    if checks is None:
        asked.finish()
    return result


def require_finite_sum(
    part: Tensor, name: str, loras: Iterable[MatchedLora], checks: DeviceChecks | None = None
) -> None:
    """LoraError if these weights of the tensor `name`, with the changes of `loras`, are not finite or changed beyond
    reason: at once, or from `checks`."""

    def judge(ends: list[float]) -> None:
        if not all(map(math.isfinite, ends)):
            files = ", ".join(lora.report.path for lora in loras)
            raise LoraError(
                f"{name} becomes NaN or infinite with {files}. Lower the strength; if that does not help, one of the "
                "files is damaged: get it again."
            )
        for lora in loras:
            lora.require_possible(name)

    asked = checks or DeviceChecks()
    asked.ask(extremes(part), judge)
    if checks is None:
        asked.finish()
