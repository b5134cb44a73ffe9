"""Small modules and plans to move weights with."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn

from lightx2v.cost.memory_plan import MemoryPlan
from lightx2v.offload.weight_streamer import StreamedModule, WeightStreamer

LAYERS = 6


CPU = torch.device("cpu")


RESIDENT = MemoryPlan(mode="resident", resident_blocks=LAYERS)


SWAP = MemoryPlan(mode="swap", resident_blocks=LAYERS, text="move", vae="move")


PLANS = {
    "swap": SWAP,
    "swap, experts leave": replace(SWAP, keep_experts=False),
    "prefix": replace(SWAP, mode="stream", resident_blocks=2),
    "prefix, text resident": replace(SWAP, mode="stream", resident_blocks=2, text="resident", vae="resident"),
    "streamed": replace(SWAP, mode="stream", resident_blocks=0, text="stream"),
    "two slots": replace(SWAP, mode="stream", resident_blocks=0, prefetch_slots=2, keep_experts=False),
    "one slot": replace(SWAP, mode="stream", resident_blocks=3, prefetch_slots=1),
    "ring as long as the rest": replace(SWAP, mode="stream", resident_blocks=3, prefetch_slots=3),
}


def toy(names: str, blocks: int) -> dict[str, StreamedModule]:
    streamed = {}
    for seed, name in enumerate(names):
        torch.manual_seed(seed)
        module = nn.Sequential(*[nn.Linear(4, 4) for _ in range(blocks)], nn.Linear(4, 2))
        streamed[name] = StreamedModule(module=module, blocks=list(module)[:blocks])
    return streamed


def forward(streamer: WeightStreamer, name: str, then: str | None = None) -> torch.Tensor:
    with streamer.use(name, then) as module, torch.no_grad():
        return module(torch.ones(1, 4))


class Exhausted:
    """Raises as CUDA does, the first `times` times that it is asked from call number `start` on."""

    def __init__(self, times: int, start: int = 0) -> None:
        self.times, self.start, self.calls = times, start, 0

    def __call__(self, *_: object) -> None:
        self.calls += 1
        if self.calls > self.start and self.times > 0:
            self.times -= 1
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")
