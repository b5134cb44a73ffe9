"""A model whose parts stay where they were loaded."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import nn

from ..attention import Choice
from ..config.engine_config import EngineConfig
from ..config.lora_spec import LoraSpec
from ..config.phases import Expert
from ..cost.memory_plan import MemoryPlan, Stage, Workload
from ..errors import CheckpointError, LoraError
from ..loading.expert_loras import AppliedLora, ExpertLoras, match_loras
from ..loading.model_files import ModelFiles, bytes_to_read
from ..loading.networks import (
    Precision,
    build_expert,
    expert_dtypes,
    expert_weights,
    load_expert,
    load_text_encoder,
    load_vae,
    prebuilt_weights,
    whole_float32,
)
from ..models.dit import WanDiT
from ..models.tiling import Tiling
from ..models.umt5 import TextEncoder
from ..models.vae import WanVAE
from ..parallel.process_group import Group
from ..parallel.single_process import ALONE
from ..progress import UNWATCHED, LoadWatch
from ..weights.model_weights import ModelWeights
from ..weights.module_loader import DtypeOf, InHost
from ..weights.value_check import ValueCheck
from .host_slabs import HostSlabs
from .packed_weights import PackedModule, Reader


@dataclass(frozen=True, slots=True)
class LoadInputs:
    """What a process of `group` loads a model from, and how it computes with it."""

    files: ModelFiles
    config: EngineConfig
    precision: Precision
    self_attention: Choice
    cross_attention: Choice
    watch: LoadWatch = UNWATCHED
    group: Group = ALONE


class Resident:
    """All parts loaded to their devices, to stay there.

    Parts that a `plan` will move or stream are loaded to host memory. If it reads weights from disk, the experts are on
    the meta device, and `readers` read their weights. `tiling` has the VAE's tiles, or None for the whole picture;
    `plan` is the memory plan for reports, None where there is no choice. `reads_together`: processes read the weights
    of a block together while they run it.
    """

    plan = None
    reads_together = False

    def __init__(self, inputs: LoadInputs, plan: MemoryPlan | None = None, slabs: HostSlabs | None = None) -> None:
        """Parts in host memory are loaded to `slabs`, if there are any: `packed` has them."""
        files, config, precision, group = inputs.files, inputs.config, inputs.precision, inputs.group
        self.tiling = Tiling() if config.use_tiling_vae is True else None
        self.readers: dict[Expert, Reader] = {}
        self.packed: dict[str, PackedModule] = {}
        in_host_memory = replace(precision, device=torch.device("cpu"))
        text_precision = precision if plan is None or plan.text == "resident" else in_host_memory
        expert_precision = precision if plan is None or plan.mode == "resident" else in_host_memory
        from_disk = plan is not None and plan.reads_disk
        inputs.watch.on_total(bytes_to_read(files, experts=not from_disk, text=group.is_rank0))
        self._experts: dict[Expert, WanDiT] = {}
        self._loras: dict[Expert, ExpertLoras] = {}
        for which in ("high", "low"):
            weights = expert_weights(files, which, config)
            loras = match_loras(config.lora_configs, which, weights, config)
            prebuilt = prebuilt_weights(files, which)
            stays = ExpertLoras.dynamic(weights, config, loras, from_disk)
            merged = weights if stays else weights.with_loras(loras)
            in_host = self._in_host(which, slabs) if expert_precision is in_host_memory else None
            read = partial(
                load_expert, watch=inputs.watch, group=group, compute_device=precision.device, in_host=in_host
            )
            load = build_expert if from_disk else read
            attention = inputs.self_attention, inputs.cross_attention
            dit = load(files, prebuilt or merged, expert_precision, *attention)
            broadcast = group.broadcast_stream
            added = ExpertLoras(dit, which, weights, loras, config, precision.device, broadcast, from_disk=from_disk)
            if from_disk:
                self.readers[which] = _reader(prebuilt, added, expert_precision, group)
            self._experts[which], self._loras[which] = dit, added
        if self._experts["high"].config != self._experts["low"].config:
            raise CheckpointError(
                "The two experts have different architectures. Use the high-noise and low-noise files of one model."
            )
        self._vae: WanVAE | None = load_vae(files, precision, group, inputs.watch)
        # Last, since its imports take seconds: another thread imports while the experts are read.
        self._text: TextEncoder | None = None
        if group.is_rank0:  # the others receive what it encodes
            in_host = self._in_host("text", slabs) if text_precision is in_host_memory else None
            watch = replace(inputs.watch, cancel=group.local_cancel(inputs.watch.cancel))
            self._text = load_text_encoder(files, config, text_precision, watch, in_host)

    def _in_host(self, name: str, slabs: HostSlabs | None) -> InHost | None:
        """How the part `name` gets memory of the slabs."""
        if slabs is None:
            return None

        def place(module: nn.Module, blocks: nn.ModuleList, dtype_of: DtypeOf) -> Callable[[torch.Tensor], None]:
            self.packed[name] = PackedModule(module, blocks, dtype_of=dtype_of)
            self.packed[name].place(slabs)
            return lambda slot: slabs.wait([slot])

        return place

    @contextmanager
    def text(self) -> Iterator[TextEncoder]:
        assert self._text is not None, "the placement is closed, or not of rank 0"
        yield self._text

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

    def close(self) -> None:
        """Drop all weights."""
        self._text = self._vae = None
        self._experts.clear()
        self._loras.clear()


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
