"""One block: as a whole with plain, fused and 8-bit steps, and where its time goes."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor

from lightx2v.models import fused, pointwise
from lightx2v.models.block import Block, Pass
from lightx2v.models.dit import WanDiT

from .bench import Bench, forward_flops
from .model import FP8, expert


def plain() -> AbstractContextManager[object]:
    """Use no fused kernel inside the `with`."""
    return patch.object(fused, "kernels_for", return_value=None)


@torch.inference_mode()
def run(bench: Bench) -> None:
    config = replace(bench.sizes.dit, num_layers=1)
    models = {"bf16": expert(bench, config), "FP8": expert(bench, config, fp8=True)}
    for clip in bench.sizes.clips:
        tokens = bench.sizes.tokens(clip)
        flops = forward_flops(config, tokens)
        variants = [("bf16", "plain", plain), ("bf16", "fused", nullcontext)]
        variants += [("FP8", "plain", plain), ("FP8", "fused", nullcontext)]
        for linears, steps, context in variants:
            with context():
                times = bench.timed(once(bench, models[linears], clip), 5)
            name = f"{clip}, {linears} linears, {steps}"
            bench.write(name, clip=clip, linears=linears, steps=steps, **times, **bench.rate(flops, times["seconds"]))
        bench.clear()
        parts(bench, models["bf16"], clip, tokens)
        bench.clear()


def once(bench: Bench, dit: WanDiT, clip: str) -> partial[object]:
    """The block with its own inputs, ready to be called repeatedly."""
    torch.manual_seed(0)
    latents = torch.randn(1, *bench.sizes.latent(clip), device=bench.device)
    x_BLD, rotations = dit.embed(latents)
    _, modulation = dit.embed_time(torch.tensor([900.0], device=bench.device, dtype=torch.float64))
    prompt = torch.randn(bench.sizes.prompt, dit.config.text_dim, device=bench.device).to(bench.compute)
    shared = Pass(
        modulation_B6D=modulation * 0.1,
        rotations_L1P=rotations,
        groups=((dit.encode_text(prompt),),),
        self_attention=dit.self_attention,
        cross_attention=dit.cross_attention,
        dtype=bench.compute,
        chunk=dit.chunk,
    )
    return partial(dit.blocks[0], [x_BLD], 0, shared)


def parts(bench: Bench, dit: WanDiT, clip: str, tokens: int) -> None:
    """Time the steps of a block one by one, with the number of their uses."""
    config, device = dit.config, bench.device
    dim, ffn, heads = config.dim, config.ffn_dim, config.num_heads
    x, y = torch.randn(1, tokens, dim, device=device), torch.randn(1, tokens, dim, device=device).to(bench.compute)
    row, weight = torch.randn(1, dim, device=device) * 0.1, torch.ones(dim, device=device)
    _, rotations = dit.embed(torch.randn(1, *bench.sizes.latent(clip), device=device))
    attn, block = dit.blocks[0].self_attn, dit.blocks[0]
    q = y.unflatten(-1, (heads, -1))
    text = torch.randn(1, config.text_len, heads, config.head_dim, device=device).to(bench.compute)
    steps = {
        "self-attention": (1, lambda: dit.self_attention(q, q, q), 4 * tokens**2 * dim),
        "cross-attention": (1, lambda: dit.cross_attention(q, text, text), 4 * tokens * config.text_len * dim),
        "linear, width to width": (6, lambda: attn.q(y), 2 * tokens * dim * dim),
        "feed-forward in": (1, lambda: block.ffn[0](y), 2 * tokens * dim * ffn),
    }
    for name, (count, call, flops) in steps.items():
        times = bench.timed(call, 5)
        bench.write(
            f"{clip}, {name}", clip=clip, step=name, count=count, **times, **bench.rate(flops, times["seconds"])
        )
    feed_forward(bench, block, y, clip)
    glue = {
        "norm and modulate": (3, lambda: fused.norm_modulate(x, row, row, 1e-6, bench.compute)),
        "norm and rotate": (2, lambda: fused.norm_rotate(y, weight, 1e-6, rotations)),
        "RMS norm": (1, lambda: fused.normed(y, weight, 1e-6)),
        "add, gated": (2, lambda: fused.add_gated(x, y, row)),
        "add": (1, lambda: fused.add(x, y)),
        "quantise to FP8": (0, lambda: fused.quantise_tokens(y[0], FP8)),
    }
    for name, (count, call) in glue.items():
        for how, context in (("plain", plain), ("fused", nullcontext)):
            with context():
                times = bench.timed(call, 5)
            bench.write(f"{clip}, {name}, {how}", clip=clip, step=name, steps=how, count=count, **times)


def feed_forward(bench: Bench, block: Block, y: Tensor, clip: str) -> None:
    """Time the feed-forward, also with the product and GELU fused."""
    inner, outer = block.ffn[0], block.ffn[2]
    wide = inner(y)
    times = bench.timed(lambda: outer(wide), 5)
    rate = bench.rate(2 * outer.weight.numel() * y.shape[1], times["seconds"])
    bench.write(f"{clip}, feed-forward out", clip=clip, step="feed-forward out", count=1, **times, **rate)
    times = bench.timed(lambda: pointwise.gelu(wide), 5)
    bench.write(f"{clip}, GELU", clip=clip, step="GELU", count=1, **times)
    if bench.cuda:
        flat = y.flatten(0, 1)
        times = bench.timed(lambda: F.gelu(inner(y), approximate="tanh"), 5)
        bench.write(f"{clip}, feed-forward in + GELU", clip=clip, step="feed-forward in + GELU", count=0, **times)
        one = lambda: torch._addmm_activation(inner.bias, flat, inner.weight.t(), use_gelu=True)  # noqa: E731
        same = F.gelu(inner(flat), approximate="tanh")
        error = ((one() - same).norm() / same.norm()).item()
        name = "feed-forward in + GELU in one"
        bench.write(f"{clip}, {name}", clip=clip, step=name, count=0, error=error, **bench.timed(one, 5))
