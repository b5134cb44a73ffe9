"""Where weights live while a run needs them: `with placement.expert("high") as dit`.

The models know nothing of this, and neither does the loop; a placement hands out each part on the device and takes it
back. `Resident` keeps everything on the device; `placement.offloaded` moves what does not fit there in and out.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from functools import partial
from typing import Any, Protocol

import torch

from ..attention import Choice
from ..config.engine_config import EngineConfig
from ..config.request import Expert, LoraSpec
from ..cost.machine import free_ram
from ..cost.memory_plan import FreeMemory, MemoryPlan, MemoryPlanner, ModelSize, OffloadOptions, Stage, Workload
from ..cost.run_time import DiTShape
from ..errors import CheckpointError, LoraError
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
    whole_float32,
)
from ..models.dit import DiTConfig, WanDiT
from ..models.tiling import Tiling
from ..models.umt5 import TextEncoder
from ..models.vae import WanVAE
from ..parallel.process_group import Group
from ..parallel.single_process import ALONE
from ..progress import CancelToken
from ..weights.checkpoint import open_checkpoint
from ..weights.model_weights import ModelWeights
from ..weights.module_loader import TensorStream
from .device_copies import Copies, copies_for
from .offloaded import Offloaded
from .packed_weights import Reader

log = logging.getLogger("lightx2v.offload")

USUAL = Workload(tokens=32_760, height=60, width=104)
"""What is planned for before the first request: 832x480, 81 frames, with guidance."""


class Placement(Protocol):
    """Hands out the parts of a model. A part may be used inside its `with` block only."""

    def text(self) -> AbstractContextManager[TextEncoder]: ...

    def expert(self, which: Expert, then: Expert | None = None) -> AbstractContextManager[WanDiT]:
        """`then` is the expert that will be asked for next, as far as that is known."""
        ...

    def vae(self) -> AbstractContextManager[WanVAE]: ...

    @property
    def tiling(self) -> Tiling | None:
        """The tiles in which the VAE is to work; None for the whole picture."""
        ...

    @property
    def plan(self) -> dict[str, Any] | None:
        """Where the weights live, for reports; None where there is no choice."""
        ...

    def prepare(self, workload: Workload) -> None:
        """Called before each run, with its size."""

    def reduce_memory(self, stage: Stage) -> str | None:
        """After `stage` ran out of memory: takes more off the device, and says what. None if nothing is left."""

    def use_loras(self, specs: Sequence[LoraSpec]) -> None:
        """Exchanges the LoRAs of both experts. LoraError, with the old ones still on, where one does not fit."""

    @property
    def loras(self) -> tuple[AppliedLora, ...]:
        """The LoRAs that are on."""
        ...

    def close(self) -> None:
        """Drops all weights."""


class Resident:
    """Everything loaded, and that is all. `text_home` and `expert_home` load these to where they do not run.

    With `from_disk` the experts are on the meta device, and `readers` read them.
    """

    def __init__(
        self,
        files: ModelFiles,
        config: EngineConfig,
        precision: Precision,
        self_attention: Choice,
        cross_attention: Choice,
        *,
        text_home: torch.device | None = None,
        expert_home: torch.device | None = None,
        from_disk: bool = False,
        cancel: CancelToken | None = None,
        group: Group = ALONE,
    ) -> None:
        self.tiling = Tiling() if config.use_tiling_vae is True else None
        self.plan = None
        self.readers: dict[Expert, Reader] = {}
        at_text, at_expert = (replace(precision, device=home or precision.device) for home in (text_home, expert_home))
        self._experts: dict[Expert, WanDiT] = {}
        self._loras: dict[Expert, ExpertLoras] = {}
        through = group.broadcast_stream
        for which in ("high", "low"):
            weights = expert_weights(files, which, config)
            loras = match_loras(config.lora_configs, which, weights, config)
            made = prebuilt_weights(files, which)
            used = made or (weights if ExpertLoras.dynamic(weights, config, from_disk) else weights.with_loras(loras))
            read = partial(load_expert, cancel=cancel, group=group, compute_device=precision.device)
            load = build_expert if from_disk else read
            dit = load(files, used, at_expert, self_attention, cross_attention)
            on = ExpertLoras(dit, which, weights, loras, config, precision.device, through, lazy=from_disk)
            if from_disk:
                self.readers[which] = _reader(lambda on=on, made=made: made or on.on_disk, at_expert, through)
            self._experts[which], self._loras[which] = dit, on
        if self._experts["high"].config != self._experts["low"].config:
            raise CheckpointError(
                "The two experts have different architectures. Use the high-noise and low-noise files of one model."
            )
        self._vae: WanVAE | None = load_vae(files, precision, group)
        # Last, since its imports take seconds: they go on in another thread while the experts are read.
        self._text: TextEncoder | None = None
        if group.is_rank0:  # the others receive what it encodes
            self._text = load_text_encoder(files, config, at_text, group.local_cancel(cancel))

    @contextmanager
    def text(self) -> Iterator[TextEncoder]:
        assert self._text is not None, "the placement is closed, or not of rank 0"
        yield self._text

    @property
    def has_text(self) -> bool:
        """Of several processes only rank 0 has the text encoder."""
        return self._text is not None

    @contextmanager
    def expert(self, which: Expert, then: Expert | None = None) -> Iterator[WanDiT]:
        yield self._experts[which]

    @contextmanager
    def vae(self) -> Iterator[WanVAE]:
        assert self._vae is not None, "the placement is closed"
        with whole_float32():
            yield self._vae

    def prepare(self, workload: Workload) -> None:
        pass

    def reduce_memory(self, stage: Stage) -> str | None:
        return None

    def use_loras(self, specs: Sequence[LoraSpec]) -> None:
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
        self._text = self._vae = None
        self._experts.clear()
        self._loras.clear()


def _reader(
    weights: Callable[[], ModelWeights], precision: Precision, through: Callable[[TensorStream], TensorStream]
) -> Reader:
    dtype_of = expert_dtypes(precision)
    return lambda names: through(weights().tensors(names, dtype_of=dtype_of))


def planner_for(
    files: ModelFiles, config: EngineConfig, precision: Precision, group: Group = ALONE
) -> MemoryPlanner | None:
    """What plans where this model's weights live; None where the device has no memory of its own to offload from."""
    if precision.device.type != "cuda":
        return None
    # All processes plan alike: for the smallest device, and each for its share of host memory.
    everywhere = group.all_gather_json([torch.cuda.mem_get_info(precision.device)[0], free_ram()])
    free = FreeMemory(vram=min(vram for vram, _ in everywhere), ram=min(ram for _, ram in everywhere) // group.size)
    if files.prebuilt is None and config.build:
        free = replace(free, ram=2**62)  # what could not be kept is in no file, so it cannot stay on disk
    return MemoryPlanner(free=free, model=model_sizes(files, config, precision), options=OffloadOptions.of(config))


def offloaded(
    files: ModelFiles,
    config: EngineConfig,
    precision: Precision,
    self_attention: Choice,
    cross_attention: Choice,
    plan: MemoryPlan,
    *,
    planner: MemoryPlanner | None = None,
    copies: Copies | None = None,
    cancel: CancelToken | None = None,
    group: Group = ALONE,
) -> Offloaded:
    """The model loaded for `plan`: parts that will not stay on the device go to host memory at once."""
    log.info("Placement: %s", plan)
    host = torch.device("cpu")
    loaded = Resident(
        files,
        config,
        precision,
        self_attention,
        cross_attention,
        text_home=None if plan.text == "resident" else host,
        expert_home=None if plan.mode == "resident" else host,
        from_disk=plan.from_disk and plan.mode != "resident",
        cancel=cancel,
        group=group,
    )
    return Offloaded(
        loaded,
        plan=plan,
        device=precision.device,
        copies=copies or copies_for(precision.device),
        planner=planner,
        readers=loaded.readers,
        dtype_of=expert_dtypes(precision),
        read_ahead=group.size == 1,  # of several processes all read together, between their other exchanges
    )


def model_sizes(files: ModelFiles, config: EngineConfig, precision: Precision) -> ModelSize:
    """What the planner needs to know, from the files' headers."""
    weights = expert_weights(files, "high", config)
    dit = DiTConfig.from_checkpoint(files.architecture, weights.shapes)
    blocks = {name: math.prod(shape) for name, shape in weights.shapes.items() if name.startswith("blocks.")}
    stored = sum(
        count * (1 if name in weights.formats else precision.compute.itemsize) for name, count in blocks.items()
    )
    made = files.prebuilt.t5 if files.prebuilt else None
    text, vae = open_checkpoint(made or files.t5), open_checkpoint(files.vae)
    text_sizes = sorted(math.prod(shape) * min(2, text.dtypes[name].itemsize) for name, shape in text.shapes.items())
    return ModelSize(
        dit=DiTShape(
            dim=dit.dim,
            ffn_dim=dit.ffn_dim,
            num_layers=dit.num_layers,
            in_dim=dit.in_dim,
            text_dim=dit.text_dim,
            text_len=dit.text_len,
        ),
        weight=stored / sum(blocks.values()),
        compute=precision.compute.itemsize,
        vae_element=precision.vae.itemsize,
        text=sum(text_sizes[:-1]),  # the largest tensor is the token table, which stays in the file
        vae=sum(map(math.prod, vae.shapes.values())) * precision.vae.itemsize,
        loras=sum(
            lora.elements * precision.compute.itemsize
            for which in ("high", "low")
            for lora in match_loras(config.lora_configs, which, weights, config)
            if not config.build
        ),
        loras_beside=ExpertLoras.dynamic(weights, config),
    )
