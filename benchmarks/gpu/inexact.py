"""Attention that is not exact: its errors, and how much faster a block's parts, a forward and a whole video are.

Random values have no structure at all. "like a video" are values whose likeness falls with the distance in time, height
and width, at another length in each head, with a mean and some noise. What real weights lose, neither can tell.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from lightx2v.attention import Choice, resolve_attention
from lightx2v.attention.flash3_fp8 import Flash3Fp8
from lightx2v.attention.fp8_inputs import values_to_fp8
from lightx2v.attention.sdpa import sdpa
from lightx2v.attention.sol import SolAttention
from lightx2v.config.request import Request
from lightx2v.config.sol_attn_setting import SolAttnSetting
from lightx2v.engine.run import Run
from lightx2v.models.dit import WanDiT
from lightx2v.models.fp8_attention import rotary_fp8
from lightx2v.models.fused import norm_rotate

from .bench import Bench, forward_flops
from .forward import call_of
from .model import Model, engine, expert
from .offload import STEPS

WAYS = ("auto", "flash_attn3_fp8", "int8_kitchen", "sol_attn, tau 1", "sol_attn, tau 0.5")
ROWS = 256
"""Queries whose outputs are compared with float32."""


def run(bench: Bench) -> None:
    found = dict(choices(bench))
    with torch.inference_mode():
        for clip in bench.sizes.clips:
            kernels(bench, found, clip)
            bench.clear()
            inputs(bench, found, clip)
            bench.clear()
        for linears in ("bf16", "FP8"):
            forwards(bench, found, linears)
            bench.clear()
        whole(bench, found)


def choices(bench: Bench) -> Iterator[tuple[str, Choice]]:
    """The ways that this device has; a line for each that it lacks."""
    for way in WAYS:
        name, _, tau = way.partition(", tau ")
        setting = SolAttnSetting(tau=float(tau or 1))
        head_dim = bench.sizes.dit.head_dim
        choice = resolve_attention(name, bench.device, bench.compute, head_dim=head_dim, sol_setting=setting)
        if name in ("auto", choice.name):
            yield way, choice
        else:
            bench.write(f"{way} is not here", reason=choice.reason[:200])


def kernels(bench: Bench, found: dict[str, Choice], clip: str) -> None:
    """Self-attention alone, and its errors to float32. Sparse attention in both orders of tokens."""
    config, tokens = bench.sizes.dit, bench.sizes.tokens(clip)
    for values, made in (("random", random_values), ("like a video", video_values)):
        q, k, v = (x.to(bench.compute) for x in made(bench, clip))
        some = slice(None, None, max(1, tokens // ROWS))
        exact = sdpa(q[:, some].float(), k.float(), v.float())
        for way, choice in found.items():
            for order, call in orders(bench, choice, clip):
                out, inverse = call(q, k, v)
                error = ((out[:, inverse][:, some].float() - exact).norm() / exact.norm()).item()
                del out
                times = bench.timed(partial(call, q, k, v), 3) if values == "random" and not order else {}
                rate = bench.rate(4 * tokens**2 * config.dim, times["seconds"]) if times else {}
                shown = {"clip": clip, "tokens": tokens, "way": way, "values": values, "order": order}
                bench.write(f"{clip}, {way}, {values}{order and ', ' + order}", **shown, error=error, **times, **rate)


def orders(bench: Bench, choice: Choice, clip: str) -> Iterator[tuple[str, Callable[..., tuple[Tensor, Tensor]]]]:
    """The attention on tokens as they lie, and for sparse attention also in its own order."""
    plain = torch.arange(bench.sizes.tokens(clip), device=bench.device)
    yield "", lambda *qkv: (choice.fn(*qkv), plain)
    if isinstance(choice.fn, SolAttention):
        order = choice.fn.order(grid_of(bench, clip), bench.device)
        assert order is not None
        yield "Morton order", lambda *qkv: (choice.fn(*(x[:, order] for x in qkv)), order.argsort())


def grid_of(bench: Bench, clip: str) -> tuple[int, int, int]:
    _, frames, height, width = bench.sizes.latent(clip)
    return frames, height // 2, width // 2


def random_values(bench: Bench, clip: str) -> Iterator[Tensor]:
    torch.manual_seed(0)
    shape = (1, bench.sizes.tokens(clip), bench.sizes.dit.num_heads, bench.sizes.dit.head_dim)
    yield from (torch.randn(shape, device=bench.device) for _ in range(3))


def video_values(bench: Bench, clip: str) -> Iterator[Tensor]:
    """Queries and keys are waves of the token's place, so their product falls with the distance as a Gaussian does."""
    torch.manual_seed(0)
    heads, width = bench.sizes.dit.num_heads, bench.sizes.dit.head_dim
    places = torch.meshgrid(*(torch.arange(size, device=bench.device) for size in grid_of(bench, clip)), indexing="ij")
    place_L3 = torch.stack(places, dim=-1).flatten(0, 2).float()
    reach_N = torch.logspace(0.5, 1.5, heads, device=bench.device)  # 3 to 30 tokens
    directions = torch.randn(3, heads, width, device=bench.device) / reach_N[:, None]
    phase = torch.rand(heads, width, device=bench.device) * 6.3
    waves = ((place_L3 @ directions.flatten(1)).unflatten(1, (heads, width)) + phase).cos_().mul_(2**0.5).unsqueeze(0)
    yield from (waves + 0.5 * torch.randn_like(waves) for _ in range(2))
    yield waves.roll(1, dims=3) + torch.randn(heads, width, device=bench.device) + 0.5 * torch.randn_like(waves)


def inputs(bench: Bench, found: dict[str, Choice], clip: str) -> None:
    """The parts of FP8 attention: what makes its inputs, and the kernel alone."""
    config, device = replace(bench.sizes.dit, num_layers=1), bench.device
    tokens = bench.sizes.tokens(clip)
    x = torch.randn(1, tokens, config.dim, device=device).to(bench.compute)
    weight, heads = torch.ones(config.dim, device=device), x.unflatten(-1, (-1, config.head_dim))
    _, rotations = expert(bench, config).embed(torch.randn(1, *bench.sizes.latent(clip), device=device))
    parts: dict[str, Callable[[], object]] = {
        "queries: norm and rotate, bf16": lambda: norm_rotate(x, weight, 1e-6, rotations),
        "queries: norm and rotate, FP8": lambda: rotary_fp8(x, weight, 1e-6, rotations),
        "keys: norm and rotate, FP8": lambda: rotary_fp8(x, weight, 1e-6, rotations, centre=True),
        "values: FP8 without their mean": lambda: values_to_fp8(heads),
    }
    fp8 = found.get("flash_attn3_fp8")
    if fp8 is not None and isinstance(fp8.fn, Flash3Fp8):
        qkv = rotary_fp8(x, weight, 1e-6, rotations), rotary_fp8(x, weight, 1e-6, rotations), values_to_fp8(heads)
        parts["attention in FP8, mean added"] = partial(fp8.fn.attend, *qkv)
    for part, call in parts.items():
        bench.write(f"{clip}, {part}", clip=clip, part=part, **bench.timed(call, 5))


def forwards(bench: Bench, found: dict[str, Choice], linears: str) -> None:
    """One forward of an expert each way, and how far its velocity is from that of exact attention."""
    dit = expert(bench, bench.sizes.dit, fp8=linears == "FP8")
    for number, clip in enumerate(bench.sizes.clips):
        exact: Tensor | None = None
        for way, choice in found.items():
            if way == "int8_kitchen":  # slower than exact on this device, and takes as long as both others
                continue
            dit.self_attention = choice.fn
            numbers = one_forward(bench, dit, clip, warm_up=1 - number)
            velocity = numbers.pop("velocity")
            exact = velocity if exact is None else exact
            error = ((velocity - exact).norm() / exact.norm()).item()
            shown = {"clip": clip, "linears": linears, "way": way, "attention": choice.name, "error": error}
            bench.write(f"{clip}, {linears} linears, {way}", **shown, **numbers)


def one_forward(bench: Bench, dit: WanDiT, clip: str, *, warm_up: int) -> dict[str, Any]:
    call = call_of(bench, dit, clip)
    made: list[Tensor] = []
    with bench.peak() as peak:
        times = bench.timed(lambda: made.append(call()), 2 if warm_up else 1, warm_up=warm_up)
    rate = bench.rate(forward_flops(dit.config, bench.sizes.tokens(clip)), times["seconds"])
    return {"velocity": made[-1], **times, **rate, **peak}


def whole(bench: Bench, found: dict[str, Choice]) -> None:
    """Image to video in 4 steps at the larger size, from the prompt to the frames."""
    model, clip = Model(bench, "i2v"), list(bench.sizes.clips)[-1]
    made = engine(bench, model, "i2v")
    height, width, frames = bench.sizes.clips[clip]
    with tempfile.TemporaryDirectory() as folder:
        picture = Path(folder) / "picture.png"
        Image.effect_noise((width, height), 60).convert("RGB").save(picture)
        large = Request(
            prompt="a red ball", task="i2v", image_path=str(picture), height=height, width=width, frames=frames, seed=1,
            **STEPS,
        )  # fmt: skip
        Run(made, replace(large, frames=5)).video(None, False, False, False, False)  # compiles
        exact: Tensor | None = None
        for way in ("auto", "sol_attn, tau 1", "flash_attn3_fp8"):
            if way not in found:
                continue
            made.prompts.clear()
            chosen = replace(made, self_attention=found[way])
            result = Run(chosen, large).video(None, False, False, False, True)
            assert result.latents is not None
            exact = result.latents if exact is None else exact
            error = ((result.latents - exact).norm() / exact.norm()).item()
            seconds = [step.seconds for step in result.timings.steps]
            shown = {"clip": clip, "way": way, "error": error, "total": result.timings.total}
            bench.write(f"I2V, 4 steps, {clip}, {way}", **shown, stages=result.timings.seconds, steps_seconds=seconds)
