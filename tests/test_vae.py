"""The VAE against diffusers' AutoencoderKLWan, and against itself: streamed, tiled, memoised, in bfloat16."""

from __future__ import annotations

import pytest
import torch

from lightx2v.models.vae import VAEConfig, WanVAE

TINY = VAEConfig(dim=8, res_blocks=1)


def randomise(module: torch.nn.Module, seed: int = 0) -> None:
    """Random weights of a trained network's size: every layer passes about unit variance on."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        if name.endswith("gamma"):
            parameter.data.copy_(0.8 + 0.4 * torch.rand(parameter.shape, generator=generator))
        else:
            fan_in = parameter[0].numel() if parameter.dim() > 1 else 100
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * fan_in**-0.5)


def make_vae(config: VAEConfig = TINY) -> WanVAE:
    vae = WanVAE(config).eval()
    randomise(vae)
    return vae


def wan_name(name: str, res_blocks: int) -> str:
    """diffusers' parameter name -> the name in Wan2.1_VAE.pth."""
    parts = name.split(".")
    if parts[0] in ("quant_conv", "post_quant_conv"):
        return f"{'conv1' if parts[0] == 'quant_conv' else 'conv2'}.{parts[1]}"
    side, rest = parts[0], parts[1:]
    res_names = {"norm1": "residual.0", "conv1": "residual.2", "norm2": "residual.3", "conv2": "residual.6"}
    res_names["conv_shortcut"] = "shortcut"
    if rest[0] in ("conv_in", "norm_out", "conv_out"):
        start = {"conv_in": ["conv1"], "norm_out": ["head", "0"], "conv_out": ["head", "2"]}[rest[0]]
        rest = rest[1:]
    elif rest[0] == "mid_block":
        index = int(rest[2])
        start = ["middle", str(2 * index if rest[1] == "resnets" else 1)]
        rest = rest[3:]
    elif rest[0] == "down_blocks":
        start = ["downsamples", rest[1]]
        rest = rest[2:]
    else:
        block = int(rest[1]) * (res_blocks + 2) + (int(rest[3]) if rest[2] == "resnets" else res_blocks + 1)
        start = ["upsamples", str(block)]
        rest = rest[4:]
    if rest[0] in res_names:
        rest = [res_names[rest[0]], *rest[1:]]
    return ".".join([side, *start, *rest])


def diffusers_vae(vae: WanVAE):
    from diffusers import AutoencoderKLWan

    config = vae.config
    other = AutoencoderKLWan(
        base_dim=config.dim,
        dim_mult=list(config.multipliers),
        num_res_blocks=config.res_blocks,
        temperal_downsample=list(config.temporal_down),
    ).eval()
    ours = vae.state_dict()
    names = {name: wan_name(name, config.res_blocks) for name in other.state_dict()}
    assert sorted(names.values()) == sorted(ours)
    other.load_state_dict({name: ours[wan] for name, wan in names.items()})
    return other


def relative_error(got: torch.Tensor, expected: torch.Tensor) -> float:
    return float((got - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize(
    ("config", "frames", "size"),
    [(TINY, 13, (40, 24)), (VAEConfig(dim=4, multipliers=(1, 2, 2, 4)), 9, (16, 32)), (VAEConfig(), 5, (32, 32))],
    ids=["tiny", "other-multipliers", "real-width"],
)
@torch.no_grad()
def test_equals_diffusers(config, frames, size):
    vae = make_vae(config)
    other = diffusers_vae(vae)
    generator = torch.Generator().manual_seed(1)
    video = torch.rand((1, 3, frames, *size), generator=generator) * 2 - 1
    mean = torch.tensor(other.config.latents_mean).view(1, -1, 1, 1, 1)
    std = torch.tensor(other.config.latents_std).view(1, -1, 1, 1, 1)

    expected = (other.encode(video).latent_dist.mode() - mean) / std
    assert relative_error(vae.encode(video[0]), expected[0]) <= 1e-4
    assert relative_error(vae.encode_clip(video)[0], expected) <= 1e-4

    latents = torch.randn(expected.shape, generator=generator)
    expected = other.decode(latents * std + mean).sample
    assert 0.1 < expected.abs().mean() < 0.9  # neither silent nor clamped away
    chunks = list(vae.decode(latents[0]))
    assert [chunk.shape[1] for chunk in chunks] == [1] + [4] * (latents.shape[2] - 1)
    assert relative_error(torch.cat(chunks, dim=1), expected[0]) <= 1e-4
    assert relative_error(vae.decode_clip(latents).clamp(-1, 1), expected) <= 1e-4
