"""ExpertLoras: the LoRAs on one expert, added when it loads and exchanged between videos without loading it again.

Merged: the weights hold base + LoRAs. An exchange rereads from the base model's files the tensors that the old or the
new LoRAs change and merges again, so nothing accumulates and going back gives the same bits.
Dynamic: the weights stay the base model's; a forward hook on each linear layer with a LoRA adds its low-rank product.
Weights in GGUF blocks stay as they are, too: each layer adds its LoRAs when it dequantises them, which is as exact as
merging, or dynamically if the configuration says so.
Tensors outside linear layers (biases, norms, modulation, the patch embedding) are small: an exchange overwrites them
and restores their originals later.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config.engine_config import EngineConfig
from ..config.lora_names import expert_of, partner_names, task_of
from ..config.request import Expert, LoraSpec
from ..errors import LoraError, short_path
from ..hub import find_lora
from ..models.dit import WanDiT
from ..models.gguf_linear import GGUFLinear
from ..models.quant_linear import QuantLinear
from ..weights.lora import LoraDelta, LoraReport, MatchedLora, match_lora
from ..weights.model_weights import ModelWeights
from ..weights.module_loader import TensorStream

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
    for spec, path in lora_files(specs, expert, config):
        lora = match_lora(path, weights.plain_shapes, strength=spec.strength, allow_partial=config.lora_allow_partial)
        named_expert, named_task, file = expert_of(path), task_of(path), short_path(path)
        warnings = []
        if lora.report.unmatched:
            warnings.append(f"{file} fits in part: {lora.report.applied} of {lora.report.total} layers were applied.")
        if named_expert not in (None, expert):  # lora_allow_partial lets it pass, see lora_files
            warnings.append(f"{file} is used for the {expert}-noise expert, its name says {named_expert} noise.")
        if named_task and (named_task == "t2v") != (config.task == "t2v"):  # may be intended
            warnings.append(f"{file} is used for {config.task}, its name says {named_task}.")
        if spec.expert == "auto" and named_expert == expert and partner_of(path) is None:
            warnings.append(f"{file} is for one expert, and its other half is not beside it.")
        matched.append(replace(lora, report=replace(lora.report, warnings=tuple(warnings))))
    return matched


def lora_files(specs: Iterable[LoraSpec], expert: Expert, config: EngineConfig) -> list[tuple[LoraSpec, Path]]:
    """The files that `specs` put on this expert. LoraError where a file's name says that it is for the other one.

    For a file that is for the other expert, the other half beside it is used, unless `specs` names that too.
    """
    named = [(spec, find_lora(spec.path, config)) for spec in specs if spec.expert in (expert, "auto")]
    resolved = {path.resolve() for _, path in named}
    files = []
    for spec, path in named:
        named_expert = expert_of(path)
        if named_expert in (None, expert) or (spec.expert == expert and config.lora_allow_partial):
            files.append((spec, path))
        elif spec.expert == "auto":
            partner = partner_of(path)
            files += [(spec, partner)] if partner is not None and partner.resolve() not in resolved else []
        else:
            raise LoraError(
                f"{short_path(path)} is given for the {expert}-noise expert; by its name it is for the "
                f"{named_expert}-noise one. Exchange the two files. If the name is wrong, rename it, or set "
                "lora_allow_partial to true."
            )
    return files


def partner_of(path: Path) -> Path | None:
    """The LoRA for the other expert that belongs to `path` by its name, if there is one."""
    return next((Path(name) for name in partner_names(path.as_posix()) if Path(name).is_file()), None)


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
        self.disk_weights = weights
        """The weights to read if they stay on disk: with all changes, or for dynamic LoRAs with the small ones."""
        self.applied: tuple[AppliedLora, ...] = ()
        self.specs: tuple[LoraSpec, ...] | None = ()
        if self.dynamic(weights, config, from_disk):
            self._attach(loras)
        else:
            self._merged, self._dirty = list(loras), _names(loras)
            self.disk_weights = weights.with_loras(loras)
        self._record(loras, config.lora_configs)

    @staticmethod
    def dynamic(weights: ModelWeights, config: EngineConfig, from_disk: bool = False) -> bool:
        """Whether the weights stay the base model's. Always if they come quantised, since merging would round twice,
        or stay on disk."""
        return config.lora_dynamic_apply or (config.build is None and (weights.quantised or from_disk))

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

    def _exchange(self, loras: list[MatchedLora]) -> None:
        if self.dynamic(self._weights, self._config, self._from_disk):
            self._attach(loras)
        elif self._from_disk:
            raise LoraError(
                "The LoRAs are part of the prebuilt weights, and these stay on disk: they cannot be exchanged. "
                "Set lazy_load to false, or use a preset that does not build its model."
            )
        else:
            self._merge(loras)

    def _own(self, specs: Iterable[LoraSpec]) -> tuple[LoraSpec, ...]:
        return tuple(spec for spec in specs if spec.expert in (self._expert, "auto"))

    def _record(self, loras: Sequence[MatchedLora], specs: Iterable[LoraSpec]) -> None:
        self.specs = self._own(specs)
        self.applied = tuple(AppliedLora(expert=self._expert, report=lora.report) for lora in loras)

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
            parameter.copy_(tensor.to(parameter.dtype))

    def _attach(self, loras: Sequence[MatchedLora]) -> None:
        """Read the new side branches and small tensors first, then exchange everything."""
        small = {name for name in _names(loras) if self._linear(name) is None}
        weights = self._weights.with_loras([lora.only(small) for lora in loras])
        branches: dict[str, dict[str, Tensor]] = {}
        changed: dict[str, Tensor] = {}
        for key, tensor in self._transform(self._additions(loras, weights, small)):
            name, _, part = key.partition("|")
            if part:
                branches.setdefault(name, {})[part] = tensor
            else:
                changed[name] = tensor
        self._detach()
        self.disk_weights = weights
        for name, total in changed.items():
            parameter = self._dit.get_parameter(name)
            if not parameter.is_meta:
                self._originals[name] = parameter.detach().clone()
                parameter.copy_(total)
        for name, parts in branches.items():
            layer = self._dit.get_submodule(name.rpartition(".")[0])
            if isinstance(layer, GGUFLinear) and not self._config.lora_dynamic_apply:
                scales = [lora.patches[name].scale for lora in loras if name in lora.patches]
                layer.merged = [
                    LoraDelta(parts[f"up{index}"], parts.get(f"down{index}"), scale)
                    for index, scale in enumerate(scales)
                ]
            else:
                self._hooks.append(layer.register_forward_hook(_side_branch(**parts)))

    def _additions(self, loras: Sequence[MatchedLora], weights: ModelWeights, small: set[str]) -> TensorStream:
        """For a linear layer's weight "name|down" and "name|up" or "name|delta", in blocks "name|down0" and so on; for
        other tensors the new value.

        Reads that value even if it stays on disk, so that an error in it shows now.
        """
        by_weight: dict[str, list[MatchedLora]] = {}
        for lora in loras:
            for name in lora.patches:
                by_weight.setdefault(name, []).append(lora)
        for name, group in by_weight.items():
            layer = self._linear(name)
            if isinstance(layer, GGUFLinear) and not self._config.lora_dynamic_apply:
                yield from self._deltas(name, group, layer)
            elif layer is not None:
                yield from self._branch(name, group, layer)
        yield from weights.tensors(small)

    def _linear(self, name: str) -> AnyLinear | None:
        """The linear layer with this weight."""
        owner = self._dit.get_submodule(name.rpartition(".")[0])
        return owner if name.endswith(".weight") and isinstance(owner, AnyLinear) else None

    def _detach(self) -> None:
        for layer in self._dit.modules():
            if isinstance(layer, GGUFLinear):
                layer.merged = []
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        for name, original in self._originals.items():
            self._dit.get_parameter(name).copy_(original)
        self._originals.clear()

    def _deltas(self, name: str, loras: Sequence[MatchedLora], layer: GGUFLinear) -> TensorStream:
        """The matrices of each LoRA as they are stored: those in 16 bits stay in 16 bits."""
        device = self._device or layer.weight.device
        for index, lora in enumerate(loras):
            delta, patch = lora.delta(name, "cpu", torch.float32), lora.patches[name]
            for part, tensor, key in (("up", delta.up, patch.up), ("down", delta.down, patch.down)):
                if tensor is not None and key is not None:
                    stored = lora.checkpoint.dtypes[key]
                    dtype = stored if stored in SIXTEEN_BITS else torch.float32
                    yield f"{name}|{part}{index}", tensor.to(device, dtype)

    def _branch(self, name: str, loras: Sequence[MatchedLora], layer: AnyLinear) -> TensorStream:
        """The matrices of Σ up · down: several LoRAs become one pair, plain differences one matrix."""
        device = self._device or layer.weight.device
        dtype = layer.weight.dtype if isinstance(layer, nn.Linear) else self._dit.compute_dtype
        downs, ups, difference = [], [], None
        for lora in loras:
            delta = lora.delta(name, "cpu", torch.float32)
            if delta.down is None:
                difference = torch.zeros(layer.out_features, layer.in_features) if difference is None else difference
                delta.add_to(difference)
            else:
                downs.append(delta.down)
                ups.append(delta.up * delta.scale)
        if downs:
            yield f"{name}|down", torch.cat(downs).to(device, dtype)
            yield f"{name}|up", torch.cat(ups, dim=1).t().contiguous().to(device, dtype)
        if difference is not None:
            yield f"{name}|delta", difference.to(device, dtype)


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
