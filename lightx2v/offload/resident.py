"""A model whose parts stay where they were loaded."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Self

import torch
from torch import nn

from ..attention import Choice
from ..config.engine_config import EngineConfig
from ..config.lora_spec import LoraSpec
from ..config.phases import Expert
from ..cost.memory_plan import MemoryPlan, Stage, Workload
from ..errors import CheckpointError, LoraError
from ..loading.beside import Beside
from ..loading.expert_loras import AppliedLora, ExpertLoras, match_loras
from ..loading.model_files import ModelFiles
from ..loading.networks import (
    Precision,
    build_expert,
    expert_dtypes,
    expert_weights,
    load_expert,
    load_text_encoder,
    load_vae,
    prebuilt_weights,
    verify_vae,
    whole_float32,
)
from ..models.dit import WanDiT
from ..models.preview import Preview
from ..models.tiling import Tiling
from ..models.umt5 import TextEncoder
from ..models.vae import WanVAE
from ..parallel.process_group import Group
from ..parallel.single_process import ALONE
from ..progress import UNWATCHED, LoadWatch
from ..weights.checkpoint import Checkpoint, open_checkpoint
from ..weights.lora import MatchedLora
from ..weights.model_weights import ModelWeights
from ..weights.module_loader import DtypeOf, InHost
from ..weights.umt5_names import TABLE
from ..weights.value_check import ValueCheck
from .host_slabs import HostSlabs
from .kept_parts import KeptPart, KeptParts, text_key, vae_key
from .packed_weights import PackedModule, Reader

EXPERTS: tuple[Expert, Expert] = ("high", "low")


@dataclass(frozen=True, slots=True)
class LoadInputs:
    """What a process of `group` loads a model from, and how it computes with it.

    `use_text` is called in a thread while the experts are read, if the text encoder is on the device to stay. `kept`
    are parts of the last engine.
    """

    files: ModelFiles
    config: EngineConfig
    precision: Precision
    self_attention: Choice
    cross_attention: Choice
    watch: LoadWatch = UNWATCHED
    group: Group = ALONE
    use_text: Callable[[TextEncoder], None] | None = None
    kept: KeptParts = field(default_factory=KeptParts)


class Resident:
    """All parts loaded to their devices, to stay there.

    Parts that a `plan` will move or stream are loaded to host memory. If it reads weights from disk, the experts are on
    the meta device, and `readers` read their weights. `tiling` has the VAE's tiles, or None for the whole picture;
    `plan` is the memory plan for reports, None where there is no choice. `preview` shows latents. `reads_together`:
    processes read the weights of a block together while they run it.
    """

    plan = None
    reads_together = False

    def __init__(self, inputs: LoadInputs, plan: MemoryPlan | None = None, slabs: HostSlabs | None = None) -> None:
        """Parts in host memory are loaded to `slabs`, if there are any: `packed` has them."""
        files, group = inputs.files, inputs.group
        self.tiling = Tiling() if inputs.config.use_tiling_vae is True else None
        self.readers: dict[Expert, Reader] = {}
        self.packed: dict[str, PackedModule] = {}
        self._experts: dict[Expert, WanDiT] = {}
        self._loras: dict[Expert, ExpertLoras] = {}
        self._text: TextEncoder | None = None
        self._vae: WanVAE | None = None
        self._preview: Preview | None = None
        self._keys = {"vae": vae_key(files, inputs.precision)}
        if group.is_rank0:  # the others receive what it encodes
            self._keys["text"] = text_key(files, inputs.config, inputs.precision)
        places = {"text": plan.text, "vae": plan.vae} if plan is not None else {}
        in_host = {name: places.get(name, "resident") != "resident" for name in ("text", "vae")}
        kept = {name: inputs.kept.take(name, key, in_host=in_host[name]) for name, key in self._keys.items()}
        from_disk = plan is not None and plan.reads_disk
        experts = [_ExpertFiles.of(inputs, which, from_disk=from_disk) for which in EXPERTS]
        missing = {name for name, part in kept.items() if part is None}
        vae = open_checkpoint(files.vae)
        inputs.watch.on_total(_bytes_to_read(files, vae, [] if from_disk else experts, missing))
        # The text encoder comes first and the VAE second: threads work with them while the experts are read.
        with Beside(inputs.precision.device) as beside:
            if group.is_rank0:
                text = self._load_text(inputs, kept["text"], slabs if in_host["text"] else None, in_host["text"])
                if inputs.use_text is not None and not in_host["text"]:
                    beside.start(partial(inputs.use_text, text))
            self._load_vae(inputs, vae, kept["vae"], beside)
            for expert in experts:
                self._load_expert(inputs, expert, plan, slabs)
            beside.finish()
        if self._experts["high"].config != self._experts["low"].config:
            raise CheckpointError(
                "The two experts have different architectures. Use the high-noise and low-noise files of one model."
            )

    def _load_text(
        self, inputs: LoadInputs, kept: KeptPart | None, slabs: HostSlabs | None, in_host_memory: bool
    ) -> TextEncoder:
        if kept is not None:
            assert isinstance(kept.module, TextEncoder)
            self._text = kept.module
            if kept.packed is not None:
                self.packed["text"] = kept.packed
            return self._text
        where = _on_host(inputs.precision) if in_host_memory else inputs.precision
        watch = replace(inputs.watch, cancel=inputs.group.local_cancel(inputs.watch.cancel))
        self._text = load_text_encoder(inputs.files, inputs.config, where, watch, self._in_host("text", slabs))
        return self._text

    def _load_vae(self, inputs: LoadInputs, checkpoint: Checkpoint, kept: KeptPart | None, beside: Beside) -> None:
        if kept is not None:
            assert isinstance(kept.module, WanVAE)
            self._vae, self._preview = kept.module, kept.extra
            if kept.packed is not None:
                self.packed["vae"] = kept.packed
            return
        if inputs.group.is_rank0:
            beside.start(partial(verify_vae, checkpoint))
        self._vae = load_vae(checkpoint, inputs.precision, inputs.group, inputs.watch)

        def fit() -> None:
            with torch.inference_mode(), self.vae() as vae:
                self._preview = Preview.for_vae(vae, checkpoint.path)

        beside.start(fit)

    def _load_expert(
        self, inputs: LoadInputs, expert: _ExpertFiles, plan: MemoryPlan | None, slabs: HostSlabs | None
    ) -> None:
        which, group, config, device = expert.which, inputs.group, inputs.config, inputs.precision.device
        attention = inputs.self_attention, inputs.cross_attention
        resident = plan is None or plan.mode == "resident"
        precision = inputs.precision if resident else _on_host(inputs.precision)
        if expert.from_disk:
            dit = build_expert(inputs.files, expert.read, precision, *attention)
        else:
            dit = load_expert(
                *(inputs.files, expert.read, precision, *attention),
                watch=inputs.watch,
                group=group,
                compute_device=device,
                in_host=None if resident else self._in_host(which, slabs),
            )
        weights, loras, broadcast = expert.weights, expert.loras, group.broadcast_stream
        added = ExpertLoras(dit, which, weights, loras, config, device, broadcast, from_disk=expert.from_disk)
        if expert.from_disk:
            self.readers[which] = _reader(expert.prebuilt, added, precision, group)
        self._experts[which], self._loras[which] = dit, added

    def _in_host(self, name: str, slabs: HostSlabs | None) -> InHost | None:
        """How the part `name` gets memory of the slabs."""
        if slabs is None:
            return None

        def place(module: nn.Module, blocks: nn.ModuleList, dtype_of: DtypeOf) -> None:
            self.packed[name] = PackedModule(module, blocks, dtype_of=dtype_of)
            self.packed[name].place(slabs)

        return place

    @contextmanager
    def text(self) -> Iterator[TextEncoder]:
        assert self._text is not None, "the placement is closed, or not of rank 0"
        yield self._text

    @property
    def preview(self) -> Preview:
        assert self._preview is not None, "the placement is closed"
        return self._preview

    @property
    def has_text(self) -> bool:
        """Only rank 0 of several processes has the text encoder."""
        return self._text is not None

    @contextmanager
    def expert(
        self,
        which: Expert,
        then: Expert | None = None,
        phase: int = 0,
        *,
        blocks: bool = True,
        then_blocks: Expert | None = None,
    ) -> Iterator[WanDiT]:
        """`then` is the expert of the next step, `then_blocks` that of the next step that runs blocks, as far as they
        are known. Without `blocks` none of this expert's run. The LoRAs have their strengths of the `phase`."""
        self.select(which, phase)
        yield self._experts[which]

    def select(
        self, which: Expert, phase: int, editing: Callable[[], AbstractContextManager[None]] = nullcontext
    ) -> None:
        """Give the LoRAs of an expert their strengths of a phase, inside `editing` if that changes weights."""
        loras = self._loras[which]
        with editing() if loras.rewrites(phase) else nullcontext():
            loras.select(phase)

    @contextmanager
    def vae(self) -> Iterator[WanVAE]:
        assert self._vae is not None, "the placement is closed"
        with whole_float32():
            yield self._vae

    def prepare(self, workload: Workload) -> None:
        """Choose the plan for the next run."""

    def reduce_memory(self, stage: Stage) -> str | None:
        """After `stage` ran out of memory: take the next smaller plan. Its summary, or None if there is none."""

    def use_loras(self, specs: Sequence[LoraSpec]) -> None:
        """Exchange the LoRAs of both experts. After a LoraError the old ones are still in use."""
        before = {which: loras.specs for which, loras in self._loras.items()}
        try:
            for loras in self._loras.values():
                loras.use(specs)
        except LoraError:
            for which, loras in self._loras.items():
                loras.use(before[which] or ())
            raise

    @property
    def loras(self) -> tuple[AppliedLora, ...]:
        return tuple(applied for loras in self._loras.values() for applied in loras.applied)

    def release(self) -> KeptParts:
        """Close it, and leave what another engine may use."""
        modules = {"text": self._text, "vae": self._vae}
        extra = {"vae": self._preview}
        parts = {
            name: KeptPart(self._keys[name], module, self.packed.get(name), extra.get(name))
            for name, module in modules.items()
            if module is not None
        }
        self.close()
        return KeptParts(parts)

    def close(self) -> None:
        """Drop all weights."""
        self._text = self._vae = self._preview = None
        self._experts.clear()
        self._loras.clear()
        self.packed.clear()


@dataclass(frozen=True, slots=True)
class _ExpertFiles:
    """What one expert is loaded from: the model's `weights` with `loras`, or a prebuilt file that has both."""

    which: Expert
    weights: ModelWeights
    loras: Sequence[MatchedLora]
    prebuilt: ModelWeights | None
    from_disk: bool
    read: ModelWeights

    @classmethod
    def of(cls, inputs: LoadInputs, which: Expert, *, from_disk: bool) -> Self:
        """From the files' headers."""
        files, config = inputs.files, inputs.config
        weights, prebuilt = expert_weights(files, which, config), prebuilt_weights(files, which)
        loras = match_loras(config.lora_configs, which, weights, config)
        stays = ExpertLoras.dynamic(weights, config, loras, from_disk)
        merged = weights if stays else weights.with_loras(loras)
        return cls(which, weights, loras, prebuilt, from_disk, prebuilt or merged)


def _on_host(precision: Precision) -> Precision:
    return replace(precision, device=torch.device("cpu"))


def _bytes_to_read(files: ModelFiles, vae: Checkpoint, experts: Iterable[_ExpertFiles], others: Container[str]) -> int:
    """The bytes of these experts with their LoRAs, and of "text" and "vae" if they are among `others`."""
    total = sum(expert.read.nbytes() for expert in experts)
    if "vae" in others:
        total += vae.nbytes
    if "text" in others:
        text = ModelWeights.of_text_encoder(open_checkpoint((files.prebuilt and files.prebuilt.t5) or files.t5))
        total += text.nbytes(text.plain_shapes.keys() - {TABLE})  # the token table stays in its file
    return total


def _reader(prebuilt: ModelWeights | None, loras: ExpertLoras, precision: Precision, group: Group) -> Reader:
    """Reads an expert's tensors from the prebuilt file, or else with the LoRAs of the moment. The first time it reads a
    tensor, it checks the values."""
    dtype_of, checked = expert_dtypes(precision), set[str]()

    def read(names: frozenset[str], into: Callable[[str], torch.Tensor | None]) -> Iterator[tuple[str, torch.Tensor]]:
        weights = prebuilt or loras.disk_weights
        check = ValueCheck(weights.source)
        for name, tensor in group.broadcast_stream(weights.tensors(names, dtype_of=dtype_of, into=into)):
            if name not in checked:
                check.see(name, tensor)
                check.finish()
                checked.add(name)
            yield name, tensor

    return read
