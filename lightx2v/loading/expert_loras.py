"""The LoRAs on one expert: put on when it is loaded, and exchanged between videos without loading it again.

Merged: the weights hold base + LoRAs. An exchange reads from the base model's files the tensors that the old or the
new LoRAs change and merges again, so nothing accumulates and going back gives the same bits.
Dynamic: the weights stay the base model's; each linear layer with a LoRA adds its low-rank product as it runs. What is
no linear layer (biases, norms, modulation, the patch embedding) is small: its original is kept and put back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config.engine_config import EngineConfig
from ..config.lora_names import expert_of, task_of
from ..config.request import Expert, LoraSpec
from ..errors import LoraError, short_path
from ..hub import find_lora
from ..models.dit import WanDiT
from ..models.quant_linear import QuantLinear
from ..weights.lora import LoraReport, MatchedLora, match_lora, partner_of
from ..weights.model_weights import ModelWeights
from ..weights.module_loader import TensorStream


@dataclass(frozen=True, slots=True, kw_only=True)
class AppliedLora:
    """One LoRA on one expert, for reports."""

    expert: Expert
    report: LoraReport

    def to_json(self) -> dict[str, Any]:
        return {"expert": self.expert, **self.report.to_json()}


def match_loras(
    specs: Iterable[LoraSpec], which: Expert, weights: ModelWeights, config: EngineConfig
) -> list[MatchedLora]:
    """The LoRAs among `specs` that are for this expert, found and matched. LoraError where one does not fit."""
    found = []
    for spec, path in files_for(specs, which, config):
        lora = match_lora(path, weights.plain_shapes, strength=spec.strength, allow_partial=config.lora_allow_partial)
        warnings = []
        if lora.report.unmatched:
            warnings.append(
                f"{short_path(path)} fits in part: {lora.report.applied} of {lora.report.total} layers were applied."
            )
        if (says := expert_of(path)) not in (None, which):  # by lora_allow_partial, see files_for
            warnings.append(f"{short_path(path)} is used for the {which}-noise expert, its name says {says} noise.")
        if (task := task_of(path)) and (task == "t2v") != (config.task == "t2v"):  # it may be meant
            warnings.append(f"{short_path(path)} is used for {config.task}, its name says {task}.")
        if spec.expert == "auto" and says == which and partner_of(path) is None:
            warnings.append(f"{short_path(path)} is for one expert, and its other half is not beside it.")
        found.append(replace(lora, report=replace(lora.report, warnings=tuple(warnings))))
    return found


def files_for(specs: Iterable[LoraSpec], which: Expert, config: EngineConfig) -> list[tuple[LoraSpec, Path]]:
    """The files that `specs` put on this expert. LoraError where a name says that it is for the other one.

    A file whose other half is for this expert brings that, unless it is given too.
    """
    given = [(spec, find_lora(spec.path, config)) for spec in specs if spec.expert in (which, "auto")]
    here = {path.resolve() for _, path in given}
    found = []
    for spec, path in given:
        says = expert_of(path)
        if says in (None, which) or (spec.expert == which and config.lora_allow_partial):
            found.append((spec, path))
        elif spec.expert == "auto":
            partner = partner_of(path)
            found += [(spec, partner)] if partner is not None and partner.resolve() not in here else []
        else:
            raise LoraError(
                f"{short_path(path)} is given for the {which}-noise expert; by its name it is for the {says}-noise "
                "one. Exchange the two files. If the name is wrong, rename it, or set lora_allow_partial to true."
            )
    return found


class ExpertLoras:
    """What is on one loaded expert. `use` exchanges it."""

    def __init__(
        self,
        dit: WanDiT,
        which: Expert,
        weights: ModelWeights,
        loras: Sequence[MatchedLora],
        config: EngineConfig,
        device: torch.device | None = None,
        through: Callable[[TensorStream], TensorStream] = iter,
        *,
        lazy: bool = False,
    ) -> None:
        """`dit` was loaded from `weights.with_loras(loras)`, or from `weights` where LoRAs are dynamic.

        `device` is where it will run, if its weights are elsewhere now. With `lazy` they are on disk.
        """
        self.which: Expert = which
        self._lazy = lazy
        self._dit, self._weights, self._config = dit, weights, config
        self._device, self._through = device, through
        self._merged: list[MatchedLora] = []
        self._touched: set[str] = set()
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []
        self._kept: dict[str, Tensor] = {}
        self.on_disk = weights
        """To be read where weights stay on disk: with all that the LoRAs change, or where they run beside the weights
        with what they change besides matrices."""
        self.applied: tuple[AppliedLora, ...] = ()
        self.specs: tuple[LoraSpec, ...] | None = ()
        if self.dynamic(weights, config, lazy):
            self._attach(loras)
        else:
            self._merged, self._touched = list(loras), _names(loras)
            self.on_disk = weights.with_loras(loras)
        self._note(loras, config.lora_configs)

    @staticmethod
    def dynamic(weights: ModelWeights, config: EngineConfig, lazy: bool = False) -> bool:
        """Whether LoRAs run beside the weights. Always where the weights come quantised, since merging would round
        twice, and where they stay on disk."""
        return config.lora_dynamic_apply or (config.build is None and (weights.quantised or lazy))

    def use(self, specs: Sequence[LoraSpec]) -> None:
        """Exchanges the LoRAs for those of `specs` that are for this expert. After a LoraError the old ones are on.

        After any other error, such as no memory, `specs` is None: the next exchange begins with the base model.
        """
        wanted = self._for_this(specs)
        if wanted == self.specs:
            return
        loras = match_loras(wanted, self.which, self._weights, self._config)
        before, self.specs = self.specs, None
        try:
            with torch.inference_mode(False), torch.no_grad():
                self._exchange(loras)
        except LoraError:
            self.specs = before
            raise
        self._note(loras, wanted)

    def _exchange(self, loras: list[MatchedLora]) -> None:
        if self.dynamic(self._weights, self._config, self._lazy):
            self._attach(loras)
        elif self._lazy:
            raise LoraError(
                "The LoRAs are part of the weights that were built, and these stay on disk: they cannot be "
                "exchanged. Set lazy_load to false, or take a preset that does not build its model."
            )
        else:
            self._merge(loras)

    def _for_this(self, specs: Iterable[LoraSpec]) -> tuple[LoraSpec, ...]:
        return tuple(spec for spec in specs if spec.expert in (self.which, "auto"))

    def _note(self, loras: Sequence[MatchedLora], specs: Iterable[LoraSpec]) -> None:
        self.specs = self._for_this(specs)
        self.applied = tuple(AppliedLora(expert=self.which, report=lora.report) for lora in loras)

    def _merge(self, loras: list[MatchedLora]) -> None:
        self._touched |= _names(loras)
        try:
            self._overwrite(self._weights.with_loras(loras))
        except LoraError:
            self._overwrite(self._weights.with_loras(self._merged))
            raise
        self._merged, self._touched = loras, _names(loras)

    def _overwrite(self, weights: ModelWeights) -> None:
        # Added up and rounded where the load does it: on the device that will compute, wherever the weight is now.
        for name, tensor in self._through(weights.tensors(self._touched, device=self._device or "cpu")):
            parameter = self._dit.get_parameter(name)
            parameter.copy_(tensor.to(parameter.dtype))

    def _attach(self, loras: Sequence[MatchedLora]) -> None:
        """The new side branches and small tensors are made first, then everything is exchanged."""
        small = {name for name in _names(loras) if self._matrix(name) is None}
        weights = self._weights.with_loras([lora.only(small) for lora in loras])
        branches: dict[str, dict[str, Tensor]] = {}
        changed: dict[str, Tensor] = {}
        for key, tensor in self._through(self._additions(loras, weights, small)):
            name, _, part = key.partition("|")
            if part:
                branches.setdefault(name, {})[part] = tensor
            else:
                changed[name] = tensor
        self._detach()
        self.on_disk = weights
        for name, total in changed.items():
            parameter = self._dit.get_parameter(name)
            if not parameter.is_meta:
                self._kept[name] = parameter.detach().clone()
                parameter.copy_(total)
        self._hooks = [
            self._dit.get_submodule(name.rpartition(".")[0]).register_forward_hook(_side_branch(**parts))
            for name, parts in branches.items()
        ]

    def _additions(
        self, loras: Sequence[MatchedLora], weights: ModelWeights, small: set[str]
    ) -> Iterator[tuple[str, Tensor]]:
        """What these LoRAs add: of a linear layer's weight "name|down" and "name|up" or "name|delta", of anything else
        its new value. That is read even where it stays on disk, so that what is wrong with it shows now."""
        layers: dict[str, list[MatchedLora]] = {}
        for lora in loras:
            for name in lora.patches:
                layers.setdefault(name, []).append(lora)
        for name, group in layers.items():
            if (layer := self._matrix(name)) is not None:
                yield from self._branch(name, group, layer)
        yield from weights.tensors(small)

    def _matrix(self, name: str) -> nn.Linear | QuantLinear | None:
        """The linear layer whose weight this is."""
        owner = self._dit.get_submodule(name.rpartition(".")[0])
        return owner if name.endswith(".weight") and isinstance(owner, nn.Linear | QuantLinear) else None

    def _detach(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        for name, original in self._kept.items():
            self._dit.get_parameter(name).copy_(original)
        self._kept.clear()

    def _branch(
        self, name: str, loras: Sequence[MatchedLora], layer: nn.Linear | QuantLinear
    ) -> Iterator[tuple[str, Tensor]]:
        """The matrices of Σ up · down, in which several LoRAs become one pair."""
        device = self._device or layer.weight.device
        dtype = self._dit.compute_dtype if isinstance(layer, QuantLinear) else layer.weight.dtype
        downs, ups, whole = [], [], None
        for lora in loras:
            pair = lora.low_rank(name)
            if pair is None:
                whole = torch.zeros(layer.out_features, layer.in_features) if whole is None else whole
                lora.add_to(name, whole)
            else:
                downs.append(pair[0])
                ups.append(pair[1])
        if downs:
            yield f"{name}|down", torch.cat(downs).to(device, dtype)
            yield f"{name}|up", torch.cat(ups, dim=1).t().contiguous().to(device, dtype)
        if whole is not None:
            yield f"{name}|delta", whole.to(device, dtype)


def _names(loras: Iterable[MatchedLora]) -> set[str]:
    return {name for lora in loras for name in lora.patches}


def _side_branch(
    down: Tensor | None = None, up: Tensor | None = None, delta: Tensor | None = None
) -> Callable[..., Tensor]:
    """A forward hook that adds x · (Σ up · down)^T to a layer's output."""

    def add_branch(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        x = inputs[0]
        if down is not None and up is not None:
            rows_MR = F.linear(x.to(down.dtype), down).flatten(0, -2)
            output.view(-1, output.shape[-1]).addmm_(rows_MR, up)
        return output if delta is None else output.add_(F.linear(x.to(delta.dtype), delta))

    return add_branch
