"""The cost of streaming blocks from host memory: the same forwards in turns, with all blocks on the device and with
fewer.

A GPU's clock changes with its temperature, and streaming costs little. So every round runs all ways, once in each
order, and ratios are taken within a round. `waited` is how long the computation waited for copies in one forward.
"""

from __future__ import annotations

import statistics
import time

import torch

from lightx2v.cost.memory_ladder import MemoryPlanner
from lightx2v.cost.memory_plan import ModelSize, OffloadOptions, Workload
from lightx2v.offload.device_copies import copies_for
from lightx2v.offload.weight_streamer import StreamedModule, WeightStreamer

from .bench import Bench
from .model import attention, expert
from .offload import Watched

CARD = 24e9
"""Bytes that are free on a small card: so many blocks are kept, once, as the planner would, but not more than half."""


def run(bench: Bench) -> None:
    measure(bench, "480p", rounds=3, forwards=2, text_too=True)


@torch.inference_mode()
def measure(bench: Bench, clip: str, *, rounds: int, forwards: int, text_too: bool) -> None:
    layers = bench.sizes.dit.num_layers
    latents = torch.randn(bench.sizes.latent(clip), device=bench.device)
    states = torch.randn(bench.sizes.prompt, bench.sizes.dit.text_dim, device=bench.device).to(bench.compute)
    planner = MemoryPlanner(vram=int(CARD), ram=2**62, model=ModelSize(), options=OffloadOptions())
    planned = planner.plan(Workload.of(latents.shape, guided=False))
    kept = min(planned.resident_blocks, layers // 2)
    ways = {"all blocks kept": (layers, True), "no block kept": (0, False), f"{kept} blocks kept": (kept, False)}
    if text_too:
        ways["no block kept, but the text's keys and values"] = (0, True)
    dit = expert(bench, bench.sizes.dit)
    copies = Watched(bench.device) if bench.cuda else copies_for(bench.device)
    began = time.perf_counter()
    streamer = WeightStreamer(
        {"high": StreamedModule(module=dit, blocks=list(dit.blocks))}, copies, bench.device, resident=layers
    )
    bench.write(f"{clip}, weights packed into host memory", packing=time.perf_counter() - began)
    bench.clear()
    taken: dict[str, list[float]] = {way: [] for way in ways}
    waited: dict[str, list[float]] = {way: [] for way in ways}
    for number in range(rounds):
        for way in list(ways)[:: -1 if number % 2 else 1]:
            blocks, keep = ways[way]
            streamer.resize(blocks)
            with streamer.use("high"):
                text = [dit.encode_text(states, keep=keep)]
                dit(latents, 900.0, text)  # from here on each forward finds its first blocks there
                if isinstance(copies, Watched):
                    copies.waits.clear()
                times = bench.timed(lambda text=text: dit(latents, 900.0, text), forwards, warm_up=0)
                taken[way].append(times["seconds"])
                if isinstance(copies, Watched):
                    waited[way].append(copies.exposed().get("experts", 0.0) / times["repeats"])
            del text
    streamer.close()
    for way, seconds in taken.items():
        ratios = [mine / whole for mine, whole in zip(seconds, taken["all blocks kept"], strict=True)]
        bench.write(
            f"{clip}, {way}",
            clip=clip,
            way=way,
            attention=attention(bench).name,
            seconds=statistics.median(seconds),
            rounds=seconds,
            ratio=statistics.median(ratios),
            least=min(ratios),
            most=max(ratios),
            **({"waited": statistics.median(waited[way])} if waited[way] else {}),
        )
