"""Cases for the parallel tests: the DiT and the VAE on several processes, compared with one."""

from __future__ import annotations

from typing import Any

import torch

from lightx2v.config.environment import Environment
from lightx2v.models.dit import DiTConfig, WanDiT
from lightx2v.models.vae import WanVAE
from lightx2v.models.vae_config import VAEConfig
from lightx2v.parallel.mesh import Mesh
from lightx2v.parallel.rendezvous import join


def enter(cfg: int, seq: int) -> Mesh:
    mesh = Mesh(join(Environment.read()), cfg, seq)
    mesh.reset_counts()
    return mesh


def dit_of(seed: int, heads: int) -> WanDiT:
    torch.manual_seed(seed)
    config = DiTConfig(
        in_dim=16,
        dim=12 * heads,
        ffn_dim=96,
        freq_dim=32,
        text_dim=32,
        text_len=24,
        out_dim=16,
        num_heads=heads,
        num_layers=2,
    )
    return WanDiT(config).eval()


@torch.inference_mode()
def dit(cfg: int, seq: int, heads: int, shapes: list[list[int]], prompts: int) -> dict[str, Any]:
    """Largest differences of the velocities of one or two prompts: on the mesh against this process alone."""
    mesh = enter(cfg, seq)
    alone, shared = dit_of(0, heads), dit_of(0, heads)
    shared.split = mesh.token_split(prompts)
    differences = []
    for stack in (2048, 0):
        alone.stack_tokens = shared.stack_tokens = stack
        for number, shape in enumerate(shapes):
            generator = torch.Generator().manual_seed(number)
            latents = torch.randn(16, *shape, generator=generator)
            contexts = [torch.randn(rows, 32, generator=generator) for rows in (5, 24)[:prompts]]
            expected = alone(latents, 700.0, [alone.encode_text(context) for context in contexts])
            mine = mesh.local_branches([shared.encode_text(context) for context in contexts])
            got = mesh.gather_branches(shared(latents, 700.0, mine), prompts)
            differences.append(max(float((a - b).abs().max()) for a, b in zip(got, expected, strict=True)))
    return {"differences": differences, "sent": mesh.sent}


@torch.inference_mode()
def vae(size: int, shapes: list[list[int]]) -> dict[str, Any]:
    """Largest differences of decoding and encoding: in spatial shards against this process alone."""
    mesh = enter(1, size)
    torch.manual_seed(3)
    model = WanVAE(VAEConfig(dim=8, res_blocks=1)).eval()
    decoded, encoded = [], []
    for number, (frames, height, width) in enumerate(shapes):
        split = mesh.spatial_split(height)
        assert split is not None
        generator = torch.Generator().manual_seed(number)
        latents = torch.randn(16, frames, height, width, generator=generator)
        for whole, shard in zip(model.decode(latents), model.decode(latents, split=split), strict=True):
            parts = split.gather(shard.movedim(2, 0).contiguous())
            if parts is not None:
                decoded.append(float((parts.movedim(0, 2) - whole).abs().max()))
        first, last = torch.rand(2, 3, 8 * height, 8 * width, generator=generator) * 2 - 1
        for end in (None, last) if frames > 1 else (None,):
            whole = model.encode_condition(4 * frames - 3, first, end)
            again = model.encode_condition(4 * frames - 3, first, end, split=split)
            encoded.append(float((whole - again).abs().max()))
    return {"decoded": decoded, "encoded": encoded, "sent": mesh.sent}
