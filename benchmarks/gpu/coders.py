"""The VAE (decode and encode) and the text encoder."""

from __future__ import annotations

import torch

from lightx2v.models.vae import WanVAE

from .bench import Bench
from .model import text_encoder, vae


@torch.inference_mode()
def run(bench: Bench) -> None:
    coder = vae(bench)
    for how in ("weights as they are", "weights channels last"):
        if how == "weights channels last":
            channels_last(coder)
        for clip in reversed(bench.sizes.clips):
            vae_times(bench, coder, clip, how)
            bench.clear()
    del coder
    bench.clear()
    encoder = text_encoder(bench)
    for letters in (60, 500):
        prompt = ("a red ball rolls " * 40)[:letters]
        tokens = encoder.encode(prompt).tokens
        bench.write(f"text, {tokens} tokens", tokens=tokens, **bench.timed(lambda p=prompt: encoder.encode(p), 5))


def channels_last(coder: WanVAE) -> None:
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    for parameter in coder.parameters():
        if parameter.ndim in formats:
            parameter.data = parameter.data.contiguous(memory_format=formats[parameter.ndim])


def vae_times(bench: Bench, coder: WanVAE, clip: str, how: str) -> None:
    height, width, frames = bench.sizes.clips[clip]
    latents = torch.randn(bench.sizes.latent(clip), device=bench.device)
    picture = torch.rand(3, height, width, device=bench.device) * 2 - 1

    def decode() -> None:
        for _ in coder.decode(latents):
            pass

    def encode() -> None:
        coder.encode_condition(frames, picture)

    for name, call in (("decode", decode), ("encode the condition", encode)):
        with bench.peak() as peak:
            times = bench.timed(call, 2)
        bench.write(f"{clip}, {name}, {how}", clip=clip, what=name, how=how, **times, **peak)
