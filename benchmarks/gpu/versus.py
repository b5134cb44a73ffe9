"""One forward against diffusers' WanTransformer3DModel: the same weights and inputs, taking turns.

diffusers runs as it comes, and once more with the attention kernel that we use. Its weights are bf16 with the parts in
float32 that its own loader keeps there. It embeds the prompt inside the forward, we once for all steps.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightx2v.models.dit import WanDiT
from lightx2v.weights.naming import wan_to_diffusers

from .bench import Bench, forward_flops
from .model import expert


@torch.inference_mode()
def run(bench: Bench) -> None:
    config = bench.sizes.dit
    ours = expert(bench, config)
    for name, parameter in ours.named_parameters():
        if "modulation" in name:
            parameter.mul_(0.1)  # gates of size one would add up 40 blocks' rounding
    theirs = diffusers_twin(bench, ours)
    prompt = torch.randn(bench.sizes.prompt, config.text_dim, device=bench.device).to(bench.compute)
    padded = F.pad(prompt, (0, 0, 0, config.text_len - len(prompt)))[None]
    text = ours.encode_text(prompt)
    timestep = torch.tensor([900.0], device=bench.device)
    for number, clip in enumerate(bench.sizes.clips):
        latents = torch.randn(bench.sizes.latent(clip), device=bench.device)
        flops = forward_flops(config, bench.sizes.tokens(clip))

        def run_ours(latents: Tensor) -> Tensor:
            return ours(latents, 900.0, [text])[0]

        def run_theirs(latents: Tensor) -> Tensor:
            return theirs(latents[None].to(bench.compute), timestep, padded, return_dict=False)[0][0]

        ways = [("defaults", "native")] + ([("cuDNN attention", "_native_cudnn")] if bench.cuda else [])
        for way, backend in ways:
            theirs.set_attention_backend(backend)
            found, made = {}, {}
            for who, call in (("ours", run_ours), ("diffusers", run_theirs)):

                def once(who: str = who, call: Callable[[Tensor], Tensor] = call) -> None:
                    made[who] = call(latents).float()  # noqa: B023

                with bench.peak() as peak:
                    found[who] = bench.timed(once, 1 if number else 2, warm_up=1 - number)
                found[who] |= peak | bench.rate(flops, found[who]["seconds"])
            difference = ((made["diffusers"] - made["ours"]).norm() / made["ours"].norm()).item()
            for who, numbers in found.items():
                bench.write(f"{clip}, {who}, diffusers with {way}", clip=clip, who=who, way=way, **numbers)
            ratio = found["ours"]["seconds"] / found["diffusers"]["seconds"]
            bench.write(f"{clip}, ratio, {way}", clip=clip, way=way, ratio=ratio, difference=difference)


def diffusers_twin(bench: Bench, ours: WanDiT) -> nn.Module:
    """Their model over our tensors, which are shared where the dtype is the same."""
    from diffusers import WanTransformer3DModel

    config = replace(ours.config)
    with torch.device("meta"):
        theirs = WanTransformer3DModel(
            num_attention_heads=config.num_heads,
            attention_head_dim=config.head_dim,
            text_dim=config.text_dim,
            freq_dim=config.freq_dim,
            ffn_dim=config.ffn_dim,
            num_layers=config.num_layers,
            eps=config.eps,
        )
    kept = tuple(theirs._keep_in_fp32_modules or ())
    weights = {}
    for name, tensor in ours.state_dict().items():
        called = wan_to_diffusers(name)
        weights[called] = tensor.float() if any(part in called for part in kept) else tensor.to(bench.compute)
    theirs.load_state_dict(weights, assign=True)
    theirs.rope = type(theirs.rope)(config.head_dim, theirs.config.patch_size, theirs.config.rope_max_seq_len)
    return theirs.to(bench.device).eval()
