"""ExpertLoras: the LoRAs on one expert, added when it loads and exchanged between videos without loading it again.

Merged: the weights hold base + LoRAs. An exchange rereads from the base model's files the tensors that the old or the
new LoRAs change and merges again, so nothing accumulates and going back gives the same bits.
Dynamic: the weights stay the base model's; a forward hook on each linear layer with a LoRA adds its low-rank product,
or LoKr's two small ones. LoHa and DoRA cannot run beside a weight: they are merged.
A LoRA whose strength changes from phase to phase makes all LoRAs of its expert dynamic. `select` gives each its
strength, without reading anything again.
Weights in GGUF blocks stay as they are, too: each layer adds its LoRAs when it dequantises them, which is as exact as
merging, or dynamically if the configuration says so.
Tensors outside linear layers (biases, norms, modulation, the patch embedding) are small: an exchange overwrites them
and restores their originals later.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Self

import torch
from torch import Tensor, nn

from ..config.engine_config import EngineConfig
from ..config.lora_names import task_of
from ..config.lora_spec import LoraSpec
from ..config.phases import Expert
from ..errors import LoraError, short_path
from ..models.dit import WanDiT
from ..models.gguf_linear import GGUFLinear
from ..models.quant_linear import QuantLinear
from ..weights.checkpoint import read_in_order
from ..weights.device_checks import DeviceChecks
from ..weights.lora import LoraReport, MatchedLora, extremes, require_finite_sum, require_numbers
from ..weights.lora_delta import Difference, Kronecker, Pair
from ..weights.lora_match import match_lora
from ..weights.model_weights import ModelWeights
from ..weights.module_loader import TensorStream
from .lora_experts import lora_files
from .side_branch import SideBranch

AnyLinear = nn.Linear | QuantLinear | GGUFLinear
SIXTEEN_BITS = (torch.bfloat16, torch.float16)


@dataclass(frozen=True, slots=True, kw_only=True)
class AppliedLora:
    """One LoRA on one expert, for reports."""

    expert: Expert
    report: LoraReport

    def to_json(self) -> dict[str, Any]:
        return {"expert": self.expert, **self.report.to_json()}


def match_loras(
    specs: Iterable[LoraSpec], expert: Expert, weights: ModelWeights, config: EngineConfig
) -> list[MatchedLora]:
    """Find and match the LoRAs in `specs` that are for this expert. LoraError where one does not fit."""
    matched = []
    for chosen in lora_files(specs, expert, config):
        strengths = chosen.strength if isinstance(chosen.strength, tuple) else (chosen.strength,)
        changes = len(strengths) > 1
        lora = match_lora(
            chosen.path,
            weights.plain_shapes,
            strength=max(strengths, key=abs),
            allow_partial=config.lora_allow_partial,
            expert=expert,
        )
        file, named_task = short_path(chosen.path), task_of(chosen.path)
        if changes and (fixed := next((n for n, patch in lora.patches.items() if not patch.runs_beside), None)):
            raise LoraError(
                f"{file} changes {fixed} as a LoHa or DoRA, which is merged and so has one strength; got "
                f"{', '.join(f'{strength:g}' for strength in strengths)} for the phases. Give it one strength."
            )
        report = replace(lora.report, strength=chosen.strength)
        warnings = list(chosen.warnings)
        if report.unmatched:
            warnings.insert(0, f"{file} fits in part: {report.applied} of {report.total} layers were applied.")
        if not chosen.strength:
            warnings.append(f"{file} has strength 0 and changes nothing.")
        if named_task and (named_task == "t2v") != (config.task == "t2v"):  # may be intended
            warnings.append(f"{file} is used for {config.task}, its name says {named_task}.")
        notes = (f"Used for the {expert}-noise expert: {chosen.reason}.", *report.notes)
        report = replace(report, notes=notes, warnings=tuple(warnings))
        matched.append(replace(lora, report=report, strengths=strengths if changes else ()))
    return matched


class ExpertLoras:
    """The LoRAs on one loaded expert. `use` exchanges them."""

    def __init__(
        self,
        dit: WanDiT,
        expert: Expert,
        weights: ModelWeights,
        loras: Sequence[MatchedLora],
        config: EngineConfig,
        device: torch.device | None = None,
        transform: Callable[[TensorStream], TensorStream] = iter,
        *,
        from_disk: bool = False,
    ) -> None:
        """`dit` was loaded from `weights.with_loras(loras)`, or from `weights` if LoRAs are dynamic.

        `device` is where it will run, if its weights are elsewhere now. `from_disk`: its weights stay on disk.
        `transform` maps each stream of tensors, e.g. broadcasts it to other processes.
        """
        self._expert: Expert = expert
        self._dit, self._weights, self._config = dit, weights, config
        self._device, self._transform, self._from_disk = device, transform, from_disk
        self._merged: list[MatchedLora] = []
        self._dirty: set[str] = set()
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []
        self._originals: dict[str, Tensor] = {}
        self._beside: list[MatchedLora] = []
        self._strengths = _Strengths()
        self.disk_weights = weights
        """The weights to read if they stay on disk: with all changes, or for dynamic LoRAs with the small ones."""
        self.applied: tuple[AppliedLora, ...] = ()
        self.specs: tuple[LoraSpec, ...] | None = ()
        if self.dynamic(weights, config, loras, from_disk):
            with torch.inference_mode(False), torch.no_grad():
                self._put_on(loras)
        else:
            self._merged, self._dirty = list(loras), _names(loras)
            self.disk_weights = weights.with_loras(loras)
        self._record(loras, config.lora_configs)

    @staticmethod
    def dynamic(
        weights: ModelWeights, config: EngineConfig, loras: Iterable[MatchedLora] = (), from_disk: bool = False
    ) -> bool:
        """Whether the weights stay the base model's. Always if they come quantised, since merging would round twice,
        or stay on disk, or if a strength changes."""
        stays = config.build is None and (weights.quantised or from_disk)
        return config.lora_dynamic_apply or stays or any(lora.strengths for lora in loras)

    def use(self, specs: Sequence[LoraSpec]) -> None:
        """Exchange the LoRAs for the `specs` that are for this expert. After a LoraError the old ones are still on.

        After any other error, such as out of memory, `specs` is None: the next exchange starts from the base model.
        """
        wanted = self._own(specs)
        if wanted == self.specs:
            return
        loras = match_loras(wanted, self._expert, self._weights, self._config)
        before, self.specs = self.specs, None
        try:
            with torch.inference_mode(False), torch.no_grad():
                self._exchange(loras)
        except LoraError:
            self.specs = before
            raise
        self._record(loras, wanted)

    def rewrites(self, phase: int) -> bool:
        """Whether `select` changes weights, and not only what runs beside them."""
        return self._strengths.of_phase(phase) != self._strengths.chosen and any(self._strengths.totals)

    def select(self, phase: int) -> None:
        """Give each LoRA its strength of this phase of the video. Reads nothing."""
        index = self._strengths.of_phase(phase)
        if index == self._strengths.chosen:
            return
        for branch, shares in self._strengths.branches:
            branch.share = shares[phase]
        with torch.no_grad():
            self._write(self._strengths.totals[index])
        self.disk_weights = self._strengths.on_disk[index]
        self._strengths.chosen = index

    def _exchange(self, loras: list[MatchedLora]) -> None:
        if self._from_disk and self._config.build is not None:
            raise LoraError(
                "The LoRAs are part of the prebuilt weights, and these stay on disk: they cannot be exchanged. "
                "Set lazy_load to false, or use a preset that does not build its model."
            )
        if self.dynamic(self._weights, self._config, loras, self._from_disk):
            self._put_on(loras)
            return
        beside = self._beside
        if beside:
            self._attach([])
        try:
            self._merge(loras)
        except LoraError:
            if beside:
                self._attach(beside)
            raise

    def _own(self, specs: Iterable[LoraSpec]) -> tuple[LoraSpec, ...]:
        return tuple(spec for spec in specs if spec.expert in (self._expert, "auto"))

    def _record(self, loras: Sequence[MatchedLora], specs: Iterable[LoraSpec]) -> None:
        self.specs = self._own(specs)
        self.applied = tuple(AppliedLora(expert=self._expert, report=_final(lora)) for lora in loras)

    def _put_on(self, loras: Sequence[MatchedLora]) -> None:
        """Merge what cannot run beside the weights, and attach the rest."""
        before = self._merged
        merged = [{name for name in lora.patches if self._must_merge(name, lora)} for lora in loras]
        self._merge([lora.only(names) for lora, names in zip(loras, merged, strict=True) if names])
        try:
            beside = [lora.only(lora.patches.keys() - names) for lora, names in zip(loras, merged, strict=True)]
            self._attach(beside)
        except LoraError:
            self._merge(before)
            raise

    def _must_merge(self, name: str, lora: MatchedLora) -> bool:
        layer = self._linear(name)
        return layer is not None and not isinstance(layer, GGUFLinear) and not lora.patches[name].runs_beside

    def _merge(self, loras: list[MatchedLora]) -> None:
        self._dirty |= _names(loras)
        try:
            self._overwrite(self._weights.with_loras(loras))
        except LoraError:
            self._overwrite(self._weights.with_loras(self._merged))
            raise
        self._merged, self._dirty = loras, _names(loras)

    def _overwrite(self, weights: ModelWeights) -> None:
        # Sums and roundings run on the same device as at load, the one that computes, wherever the weight is now.
        for name, tensor in self._transform(weights.tensors(self._dirty, device=self._device or "cpu")):
            parameter = self._dit.get_parameter(name)
            if not parameter.is_meta:
                parameter.copy_(tensor.to(parameter.dtype))

    def _attach(self, loras: Sequence[MatchedLora]) -> None:
        """Read the new side branches and small tensors first, then exchange everything."""
        small = {name for name in _names(loras) if self._linear(name) is None}
        strengths = _Strengths.of(loras)
        totals = [self._weights.with_loras([lora.only(small) for lora in group]) for group in strengths.loras(loras)]
        strengths.on_disk = [self._weights.with_loras([*self._merged, *each.loras]) for each in totals]
        strengths.totals = [{} for _ in totals]
        branches: dict[str, dict[str, Tensor]] = {}
        for key, tensor in self._transform(self._additions(loras, totals, small)):
            name, _, part = key.partition("|")
            if part.isdecimal():
                strengths.totals[int(part)][name] = tensor
            else:
                branches.setdefault(name, {})[part] = tensor
        self._detach()
        self._strengths, self._beside = strengths, list(loras)
        self.disk_weights = strengths.on_disk[0]
        for name in strengths.totals[0]:
            parameter = self._dit.get_parameter(name)
            if not parameter.is_meta:
                self._originals[name] = parameter.detach().clone()
        self._write(strengths.totals[0])
        for name, parts in branches.items():
            layer = self._dit.get_submodule(name.rpartition(".")[0])
            if isinstance(layer, GGUFLinear):
                layer.merged = [
                    lora.build(name, kinds)
                    for index, lora in enumerate(loras)
                    if (kinds := _of(parts, f"merged{index}."))
                ]
                inside = [lora for lora in loras if name in lora.patches]
                layer.check_sum = partial(require_finite_sum, name=name, loras=inside) if layer.merged else None
            groups = {"fixed": (1.0,)} | {f"{index}": lora.shares for index, lora in enumerate(loras) if lora.strengths}
            for group, shares in groups.items():
                if kinds := _of(parts, f"{group}."):
                    branch = SideBranch(kinds, shares[0])
                    self._hooks.append(layer.register_forward_hook(branch))
                    if len(shares) > 1:
                        strengths.branches.append((branch, shares))

    def _write(self, totals: Mapping[str, Tensor]) -> None:
        for name, total in totals.items():
            parameter = self._dit.get_parameter(name)
            if not parameter.is_meta:
                parameter.copy_(total)

    def _additions(self, loras: Sequence[MatchedLora], totals: Sequence[ModelWeights], small: set[str]) -> TensorStream:
        """For a linear layer's weight "name|fixed.down" and "name|fixed.up" or "name|fixed.delta", with "0." and so on
        for a LoRA whose strength changes, in blocks "name|merged0.down" and so on; for other tensors the new value
        under each of the `totals`, "name|0" and so on.

        Reads that value even if it stays on disk, so that an error in it shows now.
        """
        by_layer: dict[str, list[tuple[int, MatchedLora]]] = {}
        for index, lora in enumerate(loras):
            for name in lora.patches:
                if self._linear(name) is not None:
                    by_layer.setdefault(name, []).append((index, lora))
        wanted = [each for name, group in by_layer.items() for _, lora in group for each in lora.wanted(name)]
        checks = DeviceChecks()
        with closing(read_in_order(wanted)) as reading:
            for name, group in by_layer.items():
                layer, fixed = self._linear(name), []
                assert layer is not None
                for index, lora in group:
                    parts = lora.checked(name, [next(reading)[1] for _ in lora.wanted(name)], checks)
                    if self._inside(name, lora):
                        yield from self._parts(name, index, lora, parts, layer)
                    elif lora.strengths:
                        yield from self._branch(name, f"{index}", [(lora, parts)], layer, checks)
                    else:
                        fixed.append((lora, parts))
                if fixed:
                    yield from self._branch(name, "fixed", fixed, layer, checks)
        checks.finish()
        for index, weights in enumerate(totals):
            for name, tensor in weights.tensors(small):
                yield f"{name}|{index}", tensor

    def _linear(self, name: str) -> AnyLinear | None:
        """The linear layer with this weight."""
        owner = self._dit.get_submodule(name.rpartition(".")[0])
        return owner if name.endswith(".weight") and isinstance(owner, AnyLinear) else None

    def _detach(self) -> None:
        for layer in self._dit.modules():
            if isinstance(layer, GGUFLinear):
                layer.merged, layer.check_sum = [], None
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        for name, original in self._originals.items():
            self._dit.get_parameter(name).copy_(original)
        self._originals.clear()
        self._strengths, self._beside = _Strengths(), []

    def _inside(self, name: str, lora: MatchedLora) -> bool:
        """Whether a layer in GGUF blocks adds this LoRA to its weights, as it does with all that cannot run beside."""
        beside = self._config.lora_dynamic_apply or lora.strengths
        return isinstance(self._linear(name), GGUFLinear) and not (beside and lora.patches[name].runs_beside)

    def _parts(
        self, name: str, index: int, lora: MatchedLora, parts: dict[str, Tensor], layer: AnyLinear
    ) -> TensorStream:
        """The tensors of a LoRA for a layer in blocks, as they are stored: those in 16 bits stay in 16 bits.

        They wait where the weights do: beside weights in host memory they are pinned there, and the layer copies them.
        """
        patch, device = lora.patches[name], layer.weight.device
        waits = device.type != "cuda"
        pin = waits and self._device is not None and self._device.type == "cuda"
        for kind, tensor in parts.items():
            stored = lora.checkpoint.dtypes[patch.keys[kind]]
            keeps = stored in SIXTEEN_BITS and patch.form in ("pair", "difference") and not patch.is_dora
            dtype = stored if keeps else torch.float32
            moved = tensor.to("cpu" if waits else device, dtype)
            yield f"{name}|merged{index}.{kind}", moved.pin_memory() if pin else moved

    def _branch(
        self,
        name: str,
        group: str,
        read: Sequence[tuple[MatchedLora, dict[str, Tensor]]],
        layer: AnyLinear,
        checks: DeviceChecks,
    ) -> TensorStream:
        """The matrices of Σ up · down: several LoRAs become one pair, plain differences one matrix, a LoKr its two."""
        device = self._device or layer.weight.device
        dtype = layer.weight.dtype if isinstance(layer, nn.Linear) else self._dit.compute_dtype
        downs, ups, difference = [], [], None
        parts: dict[str, Tensor] = {}
        for index, (lora, own) in enumerate(read):
            delta = lora.build(name, own)
            if isinstance(delta, Pair):
                downs.append(delta.down_RI)
                ups.append(delta.up_OR * delta.scale)
            elif isinstance(delta, Kronecker):
                parts |= {f"w1.{index}": delta.w1_AB * delta.scale, f"w2.{index}": delta.w2_CD}
            else:
                assert isinstance(delta, Difference), "LoHa and DoRA are merged"
                difference = torch.zeros(layer.out_features, layer.in_features) if difference is None else difference
                delta.add_to(difference)
        if downs:
            parts |= {"down": torch.cat(downs), "up": torch.cat(ups, dim=1).t().contiguous()}
        if difference is not None:
            parts["delta"] = difference
        for part, tensor in parts.items():
            moved = tensor.to(device, dtype)
            files = ", ".join(lora.report.path for lora, _ in read)
            what = f"{files}: the change of {name}, in {str(dtype)[6:]},"
            checks.ask(extremes(moved), partial(require_numbers, what=what, then="Lower the strength."))
            yield f"{name}|{group}.{part}", moved
        for lora, _ in read:
            lora.require_possible(name)


def _names(loras: Iterable[MatchedLora]) -> set[str]:
    return {name for lora in loras for name in lora.patches}


def _of(parts: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in parts.items() if name.startswith(prefix)}


def _final(lora: MatchedLora) -> LoraReport:
    """The report, with what only the tensors' values show."""
    report = lora.report
    if lora.zero and lora.zero >= lora.patches.keys():
        text = f"{report.path} changes nothing: all of its {len(lora.patches)} changes are zero."
    elif lora.zero:
        text = f"{report.path}: {len(lora.zero)} of its {len(lora.patches)} changes are zero."
    else:
        return report
    return replace(report, warnings=(*report.warnings, text))


@dataclass(slots=True)
class _Strengths:
    """The strengths of the LoRAs on an expert: `phases` has for each phase the index of its combination."""

    phases: list[int] = field(default_factory=lambda: [0])
    firsts: list[int] = field(default_factory=lambda: [0])
    """The first phase with each combination."""
    chosen: int = 0
    branches: list[tuple[SideBranch, tuple[float, ...]]] = field(default_factory=list)
    totals: list[dict[str, Tensor]] = field(default_factory=list)
    """Under each combination: the tensors outside linear layers."""
    on_disk: list[ModelWeights] = field(default_factory=list)

    @classmethod
    def of(cls, loras: Sequence[MatchedLora]) -> Self:
        combinations = list(zip(*(lora.strengths for lora in loras if lora.strengths), strict=True)) or [()]
        firsts = [combinations.index(each) for each in dict.fromkeys(combinations)]
        return cls([firsts.index(combinations.index(each)) for each in combinations], firsts)

    def of_phase(self, phase: int) -> int:
        return self.phases[phase if len(self.phases) > 1 else 0]

    def loras(self, loras: Sequence[MatchedLora]) -> list[list[MatchedLora]]:
        """The LoRAs under each combination."""
        return [[lora.in_phase(first) for lora in loras] for first in self.firsts]
