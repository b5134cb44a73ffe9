"""The VAE in diffusers, with the weights of an official file."""

from __future__ import annotations

import torch
from diffusers import AutoencoderKLWan

from lightx2v.models.vae_config import VAEConfig
from lightx2v.weights.vae_names import vae_names


def vae_in_diffusers(weights: dict[str, torch.Tensor]) -> AutoencoderKLWan:
    config = VAEConfig.from_shapes({name: tuple(tensor.shape) for name, tensor in weights.items()})
    vae = AutoencoderKLWan(
        base_dim=config.dim,
        z_dim=config.z_dim,
        dim_mult=list(config.multipliers),
        num_res_blocks=config.res_blocks,
        temperal_downsample=list(config.temporal_down),
    )
    names = vae_names(vae.state_dict())
    vae.load_state_dict({theirs: weights[ours] for theirs, ours in names.items()})
    return vae.eval()
