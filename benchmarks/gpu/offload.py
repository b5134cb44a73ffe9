"""Whole runs of four steps with the weights on the device, swapped in place, or streamed block by block.

The cost of a plan is its denoising time minus that of the resident run: hidden copies cost nothing. The stall of the
switch of experts is the time of its step minus that of the same step in the resident run. Writing the video is not
included.
"""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import torch

from lightx2v.config.request import Request
from lightx2v.cost.memory_bytes import stage_bytes
from lightx2v.cost.memory_ladder import MemoryLadder
from lightx2v.cost.memory_plan import MemoryPlan, ModelSize, Workload
from lightx2v.engine.engine import LoadedEngine
from lightx2v.engine.run import Run
from lightx2v.offload.device_copies import Copies, CudaCopies, Slot, copies_for
from lightx2v.offload.offloaded import Offloaded
from lightx2v.offload.packed_weights import PackedWeights

from .bench import Bench
from .model import Model, engine

STEPS = {"denoising_step_list": (1000, 750, 500, 250), "boundary_step_index": 2, "enable_cfg": False, "steps": 4}


def run(bench: Bench) -> None:
    measure(bench, fp8=False)


def measure(bench: Bench, *, fp8: bool) -> None:
    linears = "FP8" if fp8 else "bf16"
    model = Model(bench, "t2v", fp8=fp8)
    layers = bench.sizes.dit.num_layers
    clip = next(iter(bench.sizes.clips))
    base = run_all(bench, engine(bench, model, "t2v"), clip, f"{linears}, resident", None, fp8)
    if not fp8:
        naive_switch(bench, model)
    swap = MemoryPlan(mode="swap", resident_blocks=layers, text="move", vae="move")
    stream = replace(swap, mode="stream", resident_blocks=0)
    began = time.perf_counter()
    with torch.inference_mode():
        copies = Watched(bench.device) if bench.cuda else copies_for(bench.device)
        placement = Offloaded(model, ladder=MemoryLadder(swap), device=bench.device, copies=copies)
    bench.write(f"{linears}, weights packed into host memory", linears=linears, seconds=time.perf_counter() - began)
    bench.clear()
    copy_rate(bench, placement, linears)
    for name, plan in (("model offload (swap in place)", swap), ("block offload (streamed)", stream)):
        placement._ladder.plan = plan
        placement._apply_plan()
        run_all(bench, engine(bench, placement, "t2v"), clip, f"{linears}, {name}", plan, fp8, base, copies)
    placement.close()


class Watched(CudaCopies):
    """Copies that measure how long the computation waited for them."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self.waits: list[tuple[str, Any, Any]] = []

    def acquire(self, slot: Slot) -> None:
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        before.record()
        super().acquire(slot)
        after.record()
        part = slot.item[0] if isinstance(slot.item, tuple) else "given back"
        self.waits.append(("experts" if part in ("high", "low") else part, before, after))

    def exposed(self) -> dict[str, float]:
        """Seconds by part: the experts, text, vae."""
        torch.cuda.synchronize()
        found: dict[str, float] = {}
        for part, before, after in self.waits:
            found[part] = found.get(part, 0.0) + before.elapsed_time(after) / 1000
        return found


def request(bench: Bench, clip: str) -> Request:
    height, width, frames = bench.sizes.clips[clip]
    return Request(prompt="a red ball rolls left", height=height, width=width, frames=frames, seed=1, **STEPS)


def run_all(
    bench: Bench,
    made: LoadedEngine,
    clip: str,
    name: str,
    plan: MemoryPlan | None,
    fp8: bool,
    base: dict[str, Any] | None = None,
    copies: Copies | None = None,
) -> dict[str, Any]:
    """Run twice; the second run is the warm one."""
    video = request(bench, clip)
    with torch.inference_mode():
        for _ in range(2):
            made.prompts.clear()
            if isinstance(copies, Watched):
                copies.waits.clear()
            result = Run(made, video).video(None, False, False, False, False)
    timings = result.timings
    steps = [step.seconds for step in timings.steps]
    numbers: dict[str, Any] = {
        "clip": clip,
        "attention": made.self_attention.name,
        "total": timings.total,
        "stages": timings.seconds,
        "steps_seconds": steps,
    }
    if timings.peak_vram is not None:
        peaks = {stage: peak.allocated for stage, peak in timings.peak_vram.items()}
        reserved = max(peak.reserved for peak in timings.peak_vram.values())
        numbers |= {"peak_allocated": max(peaks.values()), "peak_reserved": reserved, "peaks": peaks}
        counted = plan or MemoryPlan(mode="resident", resident_blocks=bench.sizes.dit.num_layers)
        need = Workload.of(video.latent_shape, guided=False)
        numbers["counted"] = stage_bytes(counted, ModelSize(weight=1.0 if fp8 else 2.0), need)
    if base is not None:
        numbers["denoise_over_resident"] = sum(steps) / sum(base["steps_seconds"]) - 1
        numbers["switch_stall"] = steps[2] - base["steps_seconds"][2]
    if isinstance(copies, Watched):
        numbers["exposed"] = copies.exposed()
    bench.write(name, **numbers)
    return numbers


def copy_rate(bench: Bench, placement: Offloaded, linears: str) -> None:
    """Time copies of blocks from pinned host memory: the first, the slowest and the fastest."""
    packed = [weights for (_, index), weights in placement._streamers["experts"].packed.items() if index >= 0]
    assert packed[0].host is not None
    target = torch.empty(len(packed[0].host), dtype=torch.uint8, device=bench.device)

    def seconds(weights: PackedWeights) -> dict[str, Any]:
        return bench.timed(lambda: target.copy_(weights.host, non_blocking=True), 2)

    times = [seconds(weights) for weights in packed]
    rates = [round(packed[0].nbytes / each["seconds"] / 1e9, 1) for each in times]
    pinned = bench.cuda and torch.from_numpy(packed[0].host.numpy()).is_pinned()
    name = f"{linears}, one block to the device"
    bench.write(name, linears=linears, gbytes_per_second=rates[0], rates=rates, pinned=pinned, **times[0])


def naive_switch(bench: Bench, model: Model) -> None:
    """Exchange the experts with `.to()` while nothing runs, measured on a few blocks and scaled to all."""
    layers, few = bench.sizes.dit.num_layers, bench.sizes.few_layers
    blocks = model._experts["high"].blocks[:few]
    if bench.cuda:
        torch.cuda.synchronize()
    began = time.perf_counter()
    blocks.to("cpu")
    left = time.perf_counter()
    blocks.to(bench.device)
    if bench.cuda:
        torch.cuda.synchronize()
    came = time.perf_counter()
    scale = layers / few
    bench.write(
        "naive switch by .to()",
        seconds=(came - began) * scale,
        leave=(left - began) * scale,
        come=(came - left) * scale,
        measured_blocks=few,
    )
