"""VAEs with random weights, and the same weights in diffusers' AutoencoderKLWan. Used by tests and benchmarks."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from lightx2v.models.vae import WanVAE
from lightx2v.models.vae_config import VAEConfig

if TYPE_CHECKING:
    from diffusers import AutoencoderKLWan

RESIDUAL = {
    "norm1": "residual.0",
    "conv1": "residual.2",
    "norm2": "residual.3",
    "conv2": "residual.6",
    "conv_shortcut": "shortcut",
}
ENDS = {"conv_in": "conv1", "norm_out": "head.0", "conv_out": "head.2"}


def random_vae(config: VAEConfig, seed: int = 0) -> WanVAE:
    """Weights of a trained network's size: every layer passes about unit variance on."""
    vae = WanVAE(config).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in vae.named_parameters():
        if name.endswith("gamma"):
            parameter.copy_(0.8 + 0.4 * torch.rand(parameter.shape, generator=generator))
        else:
            fan_in = parameter[0].numel() if parameter.dim() > 1 else 100
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * fan_in**-0.5)
    return vae


def same_in_diffusers(vae: WanVAE) -> AutoencoderKLWan:
    from diffusers import AutoencoderKLWan

    config = vae.config
    other = AutoencoderKLWan(
        base_dim=config.dim,
        dim_mult=list(config.multipliers),
        num_res_blocks=config.res_blocks,
        temperal_downsample=list(config.temporal_down),
    )
    ours = vae.state_dict()
    names = {name: wan_name(name, config.res_blocks) for name in other.state_dict()}
    assert sorted(names.values()) == sorted(ours)
    other.load_state_dict({name: ours[wan] for name, wan in names.items()})
    return other.eval().requires_grad_(False)


def wan_name(name: str, res_blocks: int) -> str:
    """diffusers' parameter name -> the name in Wan2.1_VAE.pth."""
    side, *rest = name.split(".")
    if side in ("quant_conv", "post_quant_conv"):
        return ".".join(["conv1" if side == "quant_conv" else "conv2", *rest])
    match rest:
        case [end, *rest] if end in ENDS:
            place = ENDS[end]
        case ["mid_block", kind, index, *rest]:
            place = f"middle.{2 * int(index) if kind == 'resnets' else 1}"
        case ["down_blocks", index, *rest]:
            place = f"downsamples.{index}"
        case ["up_blocks", stage, kind, index, *rest]:
            inside = int(index) if kind == "resnets" else res_blocks + 1
            place = f"upsamples.{int(stage) * (res_blocks + 2) + inside}"
    return ".".join([side, place, *(RESIDUAL.get(part, part) for part in rest)])


def statistics(vae: nn.Module) -> tuple[Tensor, Tensor]:
    """Mean and deviation of diffusers' latents, to broadcast against BCTHW."""
    mean, std = (torch.tensor(getattr(vae.config, f"latents_{name}")) for name in ("mean", "std"))
    return mean.view(1, -1, 1, 1, 1), std.view(1, -1, 1, 1, 1)


def relative_error(got: Tensor, expected: Tensor) -> float:
    return float((got - expected).abs().max() / expected.abs().max())
