"""torch.compile of each block instead of the fused kernels: time per forward, and the cost of the first one.

The blocks share one compiled graph. Both runs compute the prompt's keys and values again.
"""

from __future__ import annotations

import torch

from .bench import Bench, forward_flops
from .block import plain
from .model import expert


@torch.inference_mode()
def run(bench: Bench) -> None:
    if not bench.cuda:
        return
    torch._dynamo.config.cache_size_limit = 64
    dit = expert(bench, bench.sizes.dit)
    prompt = torch.randn(bench.sizes.prompt, dit.config.text_dim, device=bench.device).to(bench.compute)
    text = dit.encode_text(prompt, keep=False)
    for number, clip in enumerate(bench.sizes.clips):
        torch.manual_seed(0)
        latents = torch.randn(bench.sizes.latent(clip), device=bench.device)
        for steps in ("fused", "compiled"):
            for block in dit.blocks:
                if steps == "compiled":
                    block.compile(dynamic=False)
                else:
                    block._compiled_call_impl = None
            with plain() if steps == "compiled" else torch.inference_mode():
                first = bench.timed(lambda x=latents: dit(x, 900.0, [text]), 1, warm_up=0)["seconds"]
                times = bench.timed(lambda x=latents: dit(x, 900.0, [text]), 1 if number else 2, warm_up=0)
            rate = bench.rate(forward_flops(dit.config, bench.sizes.tokens(clip)), times["seconds"])
            name = f"{clip}, bf16 linears, {steps}"
            bench.write(name, clip=clip, linears="bf16", steps=steps, first=first, **times, **rate)
