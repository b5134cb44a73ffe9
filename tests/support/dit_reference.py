"""A small DiT in which every parameter matters, diffusers' model on the same tensors, and inputs for both."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import WanTransformer3DModel
from safetensors.torch import load_file
from tiny import DiTSizes
from torch import Tensor

from lightx2v.models.dit import DiTConfig, WanDiT
from lightx2v.weights.dit_names import wan_to_diffusers

TINY = DiTConfig(dim=48, ffn_dim=80, freq_dim=32, text_dim=24, text_len=20, num_heads=2, num_layers=3)


def make(config: DiTConfig = TINY, seed: int = 0, **attributes: Any) -> WanDiT:
    """A model whose every parameter matters: biases, norms and modulation are random too."""
    torch.manual_seed(seed)
    dit = WanDiT(config).eval()
    for parameter in dit.parameters():
        if parameter.ndim == 1:
            torch.nn.init.normal_(parameter, std=0.3)
    for name, value in attributes.items():
        setattr(dit, name, value)
    return dit


def expert_in_diffusers(folder: Path) -> WanTransformer3DModel:
    """diffusers' model on the shards of one of tiny's experts."""
    sizes = DiTSizes()
    tensors = {
        name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()
    }
    model = WanTransformer3DModel(
        num_attention_heads=sizes.num_heads,
        attention_head_dim=sizes.dim // sizes.num_heads,
        in_channels=tensors["patch_embedding.weight"].shape[1],
        out_channels=sizes.out_dim,
        text_dim=tensors["text_embedding.0.weight"].shape[1],
        freq_dim=sizes.freq_dim,
        ffn_dim=sizes.ffn_dim,
        num_layers=sizes.num_layers,
    )
    model.load_state_dict({wan_to_diffusers(name): tensor for name, tensor in tensors.items()}, strict=True)
    return model.eval()


def pad(context_LD: Tensor, text_len: int = TINY.text_len) -> Tensor:
    return torch.nn.functional.pad(context_LD, (0, 0, 0, text_len - context_LD.shape[0]))


def relative(got: Tensor, expected: Tensor) -> float:
    return ((got.double() - expected.double()).norm() / expected.double().norm()).item()


def draw(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


LATENTS = draw(16, 3, 8, 12)
COND, UNCOND = draw(7, 24, seed=2), draw(3, 24, seed=3)
