"""One forward against diffusers' WanTransformer3DModel: the same weights and inputs, taking turns.

diffusers runs with its defaults, and again with our attention kernel. Its weights are bf16, except the parts that its
own loader keeps in float32. It embeds the prompt in every forward; we do it once for all steps.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ..diffusers_twin import diffusers_twin
from .bench import Bench, forward_flops
from .model import expert

ROUNDS = {"480p": 3, "720p": 2}
WAYS = {"defaults": "native", "cuDNN attention": "_native_cudnn"}


@torch.inference_mode()
def run(bench: Bench) -> None:
    config = bench.sizes.dit
    ours = expert(bench, config)
    for name, parameter in ours.named_parameters():
        if "modulation" in name:
            parameter.mul_(0.1)  # gates of size one would add up 40 blocks' rounding
    theirs = diffusers_twin(ours, bench.compute)
    prompt = torch.randn(bench.sizes.prompt, config.text_dim, device=bench.device).to(bench.compute)
    padded = F.pad(prompt, (0, 0, 0, config.text_len - len(prompt)))[None]
    text = ours.encode_text(prompt)
    timestep = torch.tensor([900.0], device=bench.device)
    ways = WAYS if bench.cuda else {"defaults": "native"}
    for clip in bench.sizes.clips:
        latents = torch.randn(bench.sizes.latent(clip), device=bench.device)

        def run_theirs(latents: Tensor, backend: str) -> Tensor:
            theirs.set_attention_backend(backend)
            return theirs(latents[None].to(bench.compute), timestep, padded, return_dict=False)[0][0]

        calls: dict[str, Callable[[], Tensor]] = {"ours": lambda x=latents: ours(x, 900.0, [text])[0]}
        for way, backend in ways.items():
            calls[way] = lambda x=latents, b=backend: run_theirs(x, b)
        compare(bench, clip, calls)
        bench.clear()


def compare(bench: Bench, clip: str, calls: dict[str, Callable[[], Tensor]]) -> None:
    """Run both in turns; a ratio is the median over rounds. The first clip's first round only warms up."""
    made: dict[str, Tensor] = {}
    peaks: dict[str, dict[str, int]] = {}
    taken: dict[str, list[float]] = {who: [] for who in calls}
    warm_up = clip == next(iter(bench.sizes.clips))
    for number in range(ROUNDS[clip] + warm_up):
        for who, call in calls.items():

            def once(who: str = who, call: Callable[[], Tensor] = call) -> None:
                made[who] = call().float()

            with bench.peak() as peaks[who]:
                seconds = bench.timed(once, 1, warm_up=0)["seconds"]
            if number or not warm_up:
                taken[who].append(seconds)
    flops = forward_flops(bench.sizes.dit, bench.sizes.tokens(clip))
    for who, seconds in taken.items():
        middle = statistics.median(seconds)
        numbers = {"seconds": middle, "least": min(seconds), "most": max(seconds), "repeats": len(seconds)}
        name = f"{clip}, ours" if who == "ours" else f"{clip}, diffusers with {who}"
        bench.write(name, clip=clip, who=who, **numbers, **bench.rate(flops, middle), **peaks[who])
    for way in list(calls)[1:]:
        ratios = [mine / other for mine, other in zip(taken["ours"], taken[way], strict=True)]
        difference = ((made[way] - made["ours"]).norm() / made["ours"].norm()).item()
        spread = {"least": min(ratios), "most": max(ratios), "repeats": len(ratios)}
        ratio = statistics.median(ratios)
        bench.write(f"{clip}, ratio, {way}", clip=clip, way=way, ratio=ratio, **spread, difference=difference)
