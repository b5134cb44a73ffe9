"""A model on a device that may be too small for it: each part where a `MemoryPlan` says, and elsewhere once that fails.

Parts are loaded onto the device or into host memory, as the plan says. A `WeightStreamer` brings the others to the
device when they run. A part that has moved to host memory stays there; the number of resident blocks may change with
every request.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import nn

from ..config.request import Expert, LoraSpec
from ..cost.memory_plan import MemoryPlan, MemoryPlanner, Stage, Workload
from ..loading.expert_loras import AppliedLora
from ..loading.networks import whole_float32
from ..models.dit import WanDiT
from ..models.tiling import Tiling
from ..models.umt5 import TextEncoder
from ..models.vae import WanVAE
from .device_copies import Copies
from .packed_weights import Reader
from .weight_streamer import StreamedModule, WeightStreamer

log = logging.getLogger("lightx2v.offload")

MODES = ("resident", "swap", "stream")
PARTS = ("resident", "move", "stream")


class Loaded(Protocol):
    """A loaded model: what `offload.Resident` is."""

    @property
    def has_text(self) -> bool: ...

    def text(self) -> AbstractContextManager[TextEncoder]: ...

    def expert(self, which: Expert) -> AbstractContextManager[WanDiT]: ...

    def vae(self) -> AbstractContextManager[WanVAE]: ...

    def use_loras(self, specs: Sequence[LoraSpec]) -> None: ...

    @property
    def loras(self) -> tuple[AppliedLora, ...]: ...

    def close(self) -> None: ...


class Offloaded:
    """Takes over the weights of `loaded`, wherever they are now.

    `planner` plans anew for every request; without it only out-of-memory errors change the plan. `readers` are given
    for experts that stay on disk; these are on the meta device, and read ahead by another thread if that is allowed.
    """

    def __init__(
        self,
        loaded: Loaded,
        *,
        plan: MemoryPlan,
        device: torch.device,
        copies: Copies,
        planner: MemoryPlanner | None = None,
        readers: Mapping[Expert, Reader] | None = None,
        dtype_of: Callable[[str], torch.dtype] | None = None,
        read_ahead: bool = True,
    ) -> None:
        self._loaded = loaded
        self._text: TextEncoder | None = None
        if loaded.has_text:
            with loaded.text() as text:
                self._text = text
        with loaded.expert("high") as high, loaded.expert("low") as low, loaded.vae() as vae:
            self._experts: dict[Expert, WanDiT] = {"high": high, "low": low}
            self._vae: WanVAE | None = vae
        self._loras: tuple[LoraSpec, ...] | None = None
        self._device, self._copies, self._planner = device, copies, planner
        self._readers, self._dtype_of, self._read_ahead = dict(readers or {}), dtype_of, read_ahead
        self._streamers: dict[str, WeightStreamer] = {}
        self._lowered: MemoryPlan | None = None
        self._workload: Workload | None = None
        self._plan = plan
        self._apply(plan)

    # ---- what runs use ------------------------------------------------------------------------------------------

    @contextmanager
    def text(self) -> Iterator[TextEncoder]:
        assert self._text is not None, "the placement is closed"
        with self._visit("text", self._text):
            yield self._text

    @contextmanager
    def expert(self, which: Expert, then: Expert | None = None) -> Iterator[WanDiT]:
        dit = self._experts[which]
        dit.sequential_cfg, dit.cache_text_kv = self._plan.sequential_cfg, self._plan.cache_text_kv
        streamer = self._streamers.get("experts")
        if streamer is None:
            yield dit
            return
        with streamer.use(which, then):
            yield dit

    @contextmanager
    def vae(self) -> Iterator[WanVAE]:
        assert self._vae is not None, "the placement is closed"
        with whole_float32(), self._visit("vae", self._vae):
            yield self._vae

    @contextmanager
    def _visit(self, name: str, module: nn.Module) -> Iterator[Any]:
        """A part that comes to the device for one stage."""
        if "experts" in self._streamers and not self._plan.keep_experts:
            self._streamers["experts"].free()
        streamer = self._streamers.get(name)
        if streamer is None:
            yield module
            return
        try:
            with streamer.use(name):
                yield module
        finally:
            streamer.free()

    @property
    def tiling(self) -> Tiling | None:
        return Tiling() if self._plan.tiling else None

    @property
    def plan(self) -> dict[str, Any]:
        """The plan as JSON types, for reports."""
        return self._plan.to_json()

    def use_loras(self, specs: Sequence[LoraSpec]) -> None:
        if self._loras == tuple(specs):
            return
        self._loras = None
        with ExitStack() as stack:
            if "experts" in self._streamers:
                stack.enter_context(self._streamers["experts"].edit())
            self._loaded.use_loras(specs)
        self._loras = tuple(specs)

    @property
    def loras(self) -> tuple[AppliedLora, ...]:
        return self._loaded.loras

    # ---- which plan ---------------------------------------------------------------------------------------------

    def prepare(self, workload: Workload) -> None:
        """Before a run: the plan for a video of this size, no larger than what out-of-memory errors left."""
        self._workload, before = workload, self._plan
        if self._planner is not None:
            self._apply(self._planner.plan(workload))
            if self._plan != before:
                log.info("Placement: %s", self._plan)

    def keep_below(self, plan: MemoryPlan) -> None:
        """Later requests get no larger plans than this one."""
        self._lowered = plan

    def reduce_memory(self, stage: Stage) -> str | None:
        """After `stage` ran out of memory: a smaller plan, in words. None if there is none."""
        lower = self._plan.reduce_memory(stage)
        if lower is None:
            return None
        if self._planner is not None and self._workload is not None:
            lower = self._planner.counted(lower, self._workload, f"After the memory ran out: {describe(lower)}.")
        self._lowered = lower
        self._apply(lower)
        return describe(self._plan)

    def _apply(self, plan: MemoryPlan) -> None:
        """Makes it so. Parts only move towards host memory; what has been lowered stays lowered."""
        possible = self._possible(plan)
        if possible != plan and self._planner is not None and self._workload is not None:
            possible = self._planner.counted(possible, self._workload, f"After an earlier run: {describe(possible)}.")
        self._plan = plan = possible
        if plan.mode != "resident":
            self._carry("experts", plan.resident_blocks, plan.prefetch_slots)
        if plan.text != "resident" and self._text is not None:
            blocks = len(self._text.stack.block)
            self._carry("text", blocks if plan.text == "move" else 0, plan.prefetch_slots)
        if plan.vae != "resident":
            self._carry("vae", 0, plan.prefetch_slots)

    def _possible(self, plan: MemoryPlan) -> MemoryPlan:
        low = self._lowered
        if low is not None:
            plan = replace(
                plan,
                mode=MODES[max(MODES.index(plan.mode), MODES.index(low.mode))],
                resident_blocks=min(plan.resident_blocks, low.resident_blocks),
                prefetch_slots=min(plan.prefetch_slots, low.prefetch_slots),
                text=PARTS[max(PARTS.index(plan.text), PARTS.index(low.text))],
                keep_experts=plan.keep_experts and low.keep_experts,
                tiling=plan.tiling or low.tiling,
                sequential_cfg=plan.sequential_cfg or low.sequential_cfg,
            )
        carried = "experts" in self._streamers
        plan = replace(plan, from_disk=bool(self._readers))
        if plan.mode == "resident" and carried:
            plan = replace(plan, mode="swap")
        if plan.mode != "resident" and not (carried or self._readers or plan.host_fits):
            plan = replace(plan, mode="resident")  # host memory could not take the experts
        if plan.text == "resident" and "text" in self._streamers:
            plan = replace(plan, text="move")
        return replace(plan, vae="move") if "vae" in self._streamers else plan

    def _carry(self, name: str, resident: int, prefetch_slots: int) -> None:
        streamer = self._streamers.get(name)
        if streamer is None:
            self._streamers[name] = WeightStreamer(
                self._streamed(name),
                self._copies,
                self._device,
                resident=resident,
                prefetch_slots=prefetch_slots,
                read_ahead=self._read_ahead,
            )
        elif (streamer.resident, streamer.wanted_slots) != (min(resident, streamer.blocks), prefetch_slots):
            streamer.resize(resident, prefetch_slots)

    def _streamed(self, name: str) -> dict[str, StreamedModule]:
        if name == "experts":
            return {
                which: StreamedModule(
                    module=dit, blocks=list(dit.blocks), reader=self._readers.get(which), dtype_of=self._dtype_of
                )
                for which, dit in self._experts.items()
            }
        if name == "text":
            assert self._text is not None
            return {name: StreamedModule(module=self._text, blocks=list(self._text.stack.block))}
        assert self._vae is not None
        return {name: StreamedModule(module=self._vae)}

    def close(self) -> None:
        for streamer in self._streamers.values():
            streamer.close()
        self._streamers.clear()
        self._experts.clear()
        self._loaded.close()
        self._text = self._vae = None


def describe(plan: MemoryPlan) -> str:
    """What a plan does about memory, in a few words."""
    words = {
        "resident": "both experts on the device",
        "swap": "one expert on the device at a time",
        "stream": f"{plan.resident_blocks or 'no'} blocks of the experts on the device, the others streamed",
    }[plan.mode]
    more = [
        *(["the text encoder in host memory"] if plan.text != "resident" else []),
        *(["no expert on the device beside the VAE"] if not plan.keep_experts else []),
        *(["the VAE in tiles"] if plan.tiling else []),
        *(["the prompts one after the other"] if plan.sequential_cfg else []),
    ]
    return ", ".join([words, *more])
