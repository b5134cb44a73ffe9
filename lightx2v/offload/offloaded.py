"""A model on a device that may be too small for it: each part lives where the plan puts it.

Parts are loaded onto the device or into host memory, as the plan says. A `WeightStreamer` brings the others to the
device when they run. A part that has moved to host memory stays there; the number of resident blocks may change with
every request.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch

from ..config.lora_spec import LoraSpec
from ..config.phases import Expert
from ..cost.memory_ladder import MemoryLadder
from ..cost.memory_plan import Stage, Workload
from ..loading.expert_loras import AppliedLora
from ..loading.networks import whole_float32
from ..models.dit import WanDiT
from ..models.preview import Preview
from ..models.tiling import Tiling
from ..models.umt5 import TextEncoder
from ..models.vae import WanVAE
from .device_copies import Copies
from .host_slabs import HostSlabs
from .kept_parts import KeptParts
from .resident import Resident
from .weight_streamer import StreamedModule, WeightStreamer

log = logging.getLogger("lightx2v.offload")


class Offloaded:
    """Takes over the weights of `loaded`, wherever they are now.

    Experts for which `loaded` has readers stay on disk: they are on the meta device, and another thread reads them
    ahead if `read_ahead` allows it.
    """

    def __init__(
        self,
        loaded: Resident,
        *,
        ladder: MemoryLadder,
        device: torch.device,
        copies: Copies,
        dtype_of: Callable[[str], torch.dtype] | None = None,
        read_ahead: bool = True,
        slabs: HostSlabs | None = None,
    ) -> None:
        """`slabs` is the host memory in which `loaded` has parts already; others go there."""
        self._slabs = slabs or HostSlabs(pin=device.type == "cuda")
        self._loaded = loaded
        self._text: TextEncoder | None = None
        if loaded.has_text:
            with loaded.text() as text:
                self._text = text
        with loaded.expert("high") as high, loaded.expert("low") as low, loaded.vae() as vae:
            self._experts: dict[Expert, WanDiT] = {"high": high, "low": low}
            self._vae: WanVAE | None = vae
        self._loras: tuple[LoraSpec, ...] | None = None
        self._ladder, self._device, self._copies = ladder, device, copies
        self._dtype_of, self._read_ahead = dtype_of, read_ahead
        self._streamers: dict[str, WeightStreamer] = {}
        self._apply_plan()

    # ---- for runs -----------------------------------------------------------------------------------------------

    @contextmanager
    def text(self) -> Iterator[TextEncoder]:
        assert self._text is not None, "the placement is closed"
        with self._visit("text"):
            yield self._text

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
        dit, plan = self._experts[which], self._ladder.plan
        dit.sequential_cfg, dit.cache_text_kv = plan.sequential_cfg, plan.cache_text_kv
        streamer = self._streamers.get("experts")
        self._loaded.select(which, phase, streamer.edit if streamer else nullcontext)
        with streamer.use(which, then, blocks=blocks, then_blocks=then_blocks) if streamer else nullcontext():
            yield dit

    @contextmanager
    def vae(self) -> Iterator[WanVAE]:
        assert self._vae is not None, "the placement is closed"
        with whole_float32(), self._visit("vae"):
            yield self._vae

    @contextmanager
    def _visit(self, name: str) -> Iterator[None]:
        """Have a part on the device for one stage."""
        if "experts" in self._streamers and not self._ladder.plan.keep_experts:
            self._streamers["experts"].free()
        streamer = self._streamers.get(name)
        try:
            with streamer.use(name) if streamer else nullcontext():
                yield
        finally:
            if streamer:
                streamer.free()

    @property
    def reads_together(self) -> bool:
        return bool(self._loaded.readers) and not self._read_ahead

    @property
    def tiling(self) -> Tiling | None:
        return Tiling() if self._ladder.plan.tiling else None

    @property
    def plan(self) -> dict[str, Any]:
        """The plan as JSON types, for reports."""
        return self._ladder.plan.to_json()

    def use_loras(self, specs: Sequence[LoraSpec]) -> None:
        if self._loras == tuple(specs):
            return
        self._loras = None
        streamer = self._streamers.get("experts")
        with streamer.edit() if streamer else nullcontext():
            self._loaded.use_loras(specs)
        self._loras = tuple(specs)

    @property
    def loras(self) -> tuple[AppliedLora, ...]:
        return self._loaded.loras

    # ---- which plan ---------------------------------------------------------------------------------------------

    def prepare(self, workload: Workload) -> None:
        before = self._ladder.plan
        self._ladder.prepare(workload)
        self._apply_plan()
        if self._ladder.plan != before:
            log.info("Placement: %s", self._ladder.plan)

    def reduce_memory(self, stage: Stage) -> str | None:
        summary = self._ladder.reduce(stage)
        if summary is not None:
            self._apply_plan()
        return summary

    def _apply_plan(self) -> None:
        """Move parts towards host memory, and give streamed ones their number of device slots."""
        plan = self._ladder.plan
        if plan.mode != "resident":
            experts = {
                which: StreamedModule(
                    module=dit,
                    blocks=list(dit.blocks),
                    reader=self._loaded.readers.get(which),
                    dtype_of=self._dtype_of,
                    packed=self._loaded.packed.get(which),
                )
                for which, dit in self._experts.items()
            }
            self._stream("experts", experts, plan.resident_blocks)
        if plan.text != "resident" and self._text is not None:
            blocks = list(self._text.stack.block)
            text = StreamedModule(module=self._text, blocks=blocks, packed=self._loaded.packed.get("text"))
            self._stream("text", {"text": text}, len(text.blocks) if plan.text == "move" else 0)
        if plan.vae != "resident" and self._vae is not None:
            self._stream("vae", {"vae": StreamedModule(module=self._vae, packed=self._loaded.packed.get("vae"))}, 0)

    def _stream(self, name: str, modules: dict[Any, StreamedModule], resident: int) -> None:
        slots = self._ladder.plan.prefetch_slots
        if name in self._streamers:
            self._streamers[name].resize(resident, slots)
        else:
            self._streamers[name] = WeightStreamer(
                modules,
                self._copies,
                self._device,
                resident=resident,
                prefetch_slots=slots,
                read_ahead=self._read_ahead,
                slabs=self._slabs,
            )

    @property
    def preview(self) -> Preview:
        return self._loaded.preview

    def release(self) -> KeptParts:
        """Close it, and leave what another engine may use. `loaded` knows what was packed."""
        for name in ("text", "vae"):
            if (streamer := self._streamers.pop(name, None)) is not None:
                [self._loaded.packed[name]] = streamer.release()
        for streamer in self._streamers.values():
            streamer.close()
        self._streamers.clear()
        kept = self._loaded.release()
        self._experts.clear()
        self._text = self._vae = None
        kept.slabs = self._slabs
        return kept

    def close(self) -> None:
        for streamer in self._streamers.values():
            streamer.close()
        self._streamers.clear()
        self._experts.clear()
        self._loaded.close()
        self._text = self._vae = None
        self._slabs.trim()
