"""One forward of an expert, one prompt: seconds, share of the device's peak, memory."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext

import torch
from torch import Tensor

from lightx2v.models.dit import WanDiT

from .bench import Bench, forward_flops
from .block import plain
from .model import attention, expert


def call_of(bench: Bench, dit: WanDiT, clip: str) -> Callable[[], Tensor]:
    torch.manual_seed(0)
    latents = torch.randn(bench.sizes.latent(clip), device=bench.device)
    text = dit.encode_text(torch.randn(bench.sizes.prompt, dit.config.text_dim, device=bench.device).to(bench.compute))
    return lambda: dit(latents, 900.0, [text])[0]


@torch.inference_mode()
def run(bench: Bench) -> None:
    kernel = attention(bench).name
    for linears in ("bf16", "FP8"):
        dit = expert(bench, bench.sizes.dit, fp8=linears == "FP8")
        for number, clip in enumerate(bench.sizes.clips):
            for steps in ("fused", "plain"):
                if steps == "plain" and (number or linears == "FP8" or kernel != "cudnn"):
                    continue
                with nullcontext() if steps == "fused" else plain(), bench.peak() as peak:
                    times = bench.timed(call_of(bench, dit, clip), 2 if number else 3, warm_up=1 - number)
                rate = bench.rate(forward_flops(dit.config, bench.sizes.tokens(clip)), times["seconds"])
                name = f"{clip}, {linears} linears, {steps}, {kernel}"
                shown = {"clip": clip, "linears": linears, "steps": steps, "attention": kernel}
                bench.write(name, **shown, **times, **rate, **peak)
        del dit
        bench.clear()
