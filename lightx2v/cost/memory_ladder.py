"""The one ladder of memory plans, from the fastest to the smallest, and the place of a loaded model on it.

The rungs: both experts on the device; one expert, with the other swapped in place; the first blocks of one expert,
with the rest streamed; all blocks streamed. A run takes the first plan that fits, and after an out-of-memory error the
next one that needs less in the stage that failed.
"""

from dataclasses import dataclass, replace

from .memory_bytes import expert_bytes, stage_bytes
from .memory_plan import GIB, PREFETCH_SLOTS, MemoryPlan, ModelSize, OffloadOptions, Part, Stage, Workload

RESERVE = GIB * 3 // 4
"""Device memory that no plan uses: for the workspaces of cuBLAS and cuDNN, and for other programs that grow."""

DRIVER_BYTES = GIB
"""What the driver and the CUDA context take from a GPU's nominal size."""

USUAL = Workload(tokens=32_760, height=60, width=104)
"""The video that a model is loaded for: 832x480, 81 frames, with guidance."""


def ladder(layers: int, options: OffloadOptions, *, host_fits: bool = True) -> list[MemoryPlan]:
    """All plans within `options` for experts of `layers` blocks, from the fastest to the smallest.

    Streaming is free where a block computes longer than its copy takes; elsewhere more resident blocks make it faster.
    Tiles are not exact, so they are the last resort.
    """
    both = MemoryPlan(
        mode="resident",
        resident_blocks=layers,
        tiling=options.tiling is True,
        tiling_allowed=options.tiling is not False,
        from_disk=options.from_disk or not host_fits,
    )
    swap = replace(both, mode="swap", text="move", vae="move")
    streamed = [replace(swap, mode="stream", resident_blocks=n) for n in range(layers - PREFETCH_SLOTS - 1, -1, -1)]
    least = replace(swap, mode="stream", resident_blocks=0)
    smallest = [replace(least, sequential_cfg=True), replace(least, sequential_cfg=True, prefetch_slots=2)]
    if options.cpu_offload is False:
        modes = [both]
    elif options.cpu_offload is True and options.granularity == "block":
        modes = [least, *smallest]
    else:
        modes = [swap, *streamed, *smallest]
        if options.cpu_offload == "auto" and not options.from_disk:
            modes.insert(0, both)
    rungs = [rung for plan in modes for rung in _with_parts(plan, options)]
    if options.tiling == "auto":
        rungs += [replace(rung, tiling=True) for rung in rungs]
    return rungs


def _with_parts(plan: MemoryPlan, options: OffloadOptions) -> list[MemoryPlan]:
    """One plan for each allowed place of the text encoder and the VAE, from the fastest to the smallest."""
    texts: list[Part] = ["resident"] if options.text_offload is False else ["move", "stream"]
    if options.text_offload == "auto" and plan.mode == "resident":
        texts.insert(0, "resident")
    vae = plan.vae if options.vae_offload == "auto" else "move" if options.vae_offload else "resident"
    keeps = (True, False) if plan.mode != "resident" else (True,)
    return [replace(plan, text=text, vae=vae, keep_experts=keep) for text in texts for keep in keeps]


def next_plan(plan: MemoryPlan, stage: Stage, layers: int) -> MemoryPlan | None:
    """The next plan on the ladder that needs less in `stage`, which ran out of memory; None if there is none.

    Only two options still count: tiles, and weights on disk. Denoising gives up half of the resident blocks at a time.
    For the other stages the text encoder and the VAE leave the device first, and then the experts.
    """
    stuck = plan.mode == "resident" and plan.from_disk  # host memory has no room for the experts
    options = OffloadOptions(
        cpu_offload=False if stuck else "auto",
        vae_offload="auto" if plan.vae == "resident" else True,
        tiling="auto" if plan.tiling_allowed else False,
        from_disk=plan.from_disk,
    )
    for rung in ladder(layers, options):
        if rung.limited_to(plan) != rung or rung.share(stage) == plan.share(stage):
            continue
        if stage == "denoise":
            possible = rung.resident_blocks == plan.resident_blocks or rung.resident_blocks <= plan.resident_blocks // 2
        else:
            possible = not rung.keep_experts or (rung.mode == plan.mode and rung.text != "stream")
        if possible:
            return rung
    return None


def usable(free: int, vram_gb: float | None) -> int:
    """Of `free` bytes of a device those that a program may use that takes at most `vram_gb` GB in all."""
    return free if vram_gb is None else min(free, card_bytes(vram_gb))


def card_bytes(size: float) -> int:
    """What a program can allocate on an empty card of `size` GB."""
    return max(0, int(size * GIB) - DRIVER_BYTES)


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryPlanner:
    """Plans for one model on one machine: `vram` and `ram` are the bytes that were free before anything was loaded."""

    vram: int
    ram: int
    model: ModelSize
    options: OffloadOptions

    def plan(self, workload: Workload) -> MemoryPlan:
        """The fastest plan within the options whose every stage fits into the device; the smallest if none does."""
        host_fits = 2 * expert_bytes(self.model) + self.model.text <= self.ram
        rungs = ladder(self.model.dit.num_layers, self.options, host_fits=host_fits)
        counted = [(rung, stage_bytes(rung, self.model, workload)) for rung in rungs]
        room = self.vram - RESERVE
        fitting = ((rung, needed) for rung, needed in counted if max(needed.values()) <= room)
        plan, needed = next(fitting, None) or min(counted, key=lambda each: max(each[1].values()))
        beside = plan.reads_disk and self.model.loras and not self.model.dequantised
        loras = ", the LoRAs run beside the weights" if beside else ""
        reason = f"{self.vram / GIB:.0f} GiB of device memory are free: {plan.summary}{loras}."
        if max(needed.values()) > room:
            reason += " It may not be enough."
        return replace(plan, bytes=needed, reason=reason)


class MemoryLadder:
    """The `plan` of one model: chosen anew for each run by `planner`, and smaller after each out-of-memory error.

    Without a planner only errors change it. Parts that have left the device stay off it. With `retry` False the plan
    never gets smaller: in a group, perhaps only one process has run out of memory.
    """

    def __init__(self, plan: MemoryPlan, planner: MemoryPlanner | None = None, *, retry: bool = True) -> None:
        self.plan, self._planner, self._retry, self._workload = plan, planner, retry, USUAL
        self._layers = planner.model.dit.num_layers if planner else plan.resident_blocks
        self._limit = MemoryPlan(mode="resident", resident_blocks=self._layers)
        self._keep_off_the_device(plan)

    def prepare(self, workload: Workload) -> None:
        """Choose the plan for a video of this size. Earlier errors and the parts that have left the device limit it."""
        self._workload = workload
        if self._planner is None:
            return
        chosen = self._planner.plan(workload)
        allowed = chosen.limited_to(self._limit)
        if self.plan.mode == "resident" and self.plan.from_disk:  # host memory has no room for the experts
            allowed = replace(allowed, mode="resident")
        self.plan = chosen if allowed == chosen else self._counted(allowed, "After an earlier run")
        self._keep_off_the_device(self.plan)

    def reduce(self, stage: Stage) -> str | None:
        """After `stage` ran out of memory: take the next smaller plan and return its summary, or None at the end."""
        smaller = next_plan(self.plan, stage, self._layers) if self._retry else None
        if smaller is None:
            return None
        self._limit = smaller
        self.plan = self._counted(smaller, "After the memory ran out")
        return smaller.summary

    def _counted(self, plan: MemoryPlan, why: str) -> MemoryPlan:
        needed = stage_bytes(plan, self._planner.model, self._workload) if self._planner else {}
        return replace(plan, bytes=needed, reason=f"{why}: {plan.summary}.")

    def _keep_off_the_device(self, plan: MemoryPlan) -> None:
        """Parts that this plan moves to host memory stay there."""
        moved = MemoryPlan(
            mode="resident" if plan.mode == "resident" else "swap",
            resident_blocks=self._layers,
            text="resident" if plan.text == "resident" else "move",
            vae="resident" if plan.vae == "resident" else "move",
        )
        self._limit = self._limit.limited_to(moved)
