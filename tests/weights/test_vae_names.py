"""The VAE's tensors under the names of diffusers, and in wrappers, are Wan's."""

from __future__ import annotations

import pytest
import torch
from vae_in_diffusers import vae_in_diffusers

from lightx2v.errors import CheckpointError
from lightx2v.models.vae import WanVAE
from lightx2v.models.vae_config import LATENT_MEAN, LATENT_STD, VAEConfig
from lightx2v.weights.vae_names import vae_names


@pytest.mark.parametrize("res_blocks", [1, 2])
def test_diffusers_with_these_names_computes_the_same(res_blocks: int) -> None:
    torch.manual_seed(0)
    ours = WanVAE(VAEConfig(dim=8, res_blocks=res_blocks)).eval()
    theirs = vae_in_diffusers(ours.state_dict())
    latents = torch.randn(1, 16, 2, 4, 4)
    mean, std = (torch.tensor(values).view(1, -1, 1, 1, 1) for values in (LATENT_MEAN, LATENT_STD))
    with torch.no_grad():
        want = theirs.decode(latents * std + mean).sample
        got = ours.decode_clip(latents).clamp(-1, 1)
        encoded = (theirs.encode(want).latent_dist.mode() - mean) / std
        assert torch.allclose(ours.encode_clip(want)[0], encoded, atol=1e-4)
    assert torch.allclose(got, want, atol=1e-4) and want.std() > 0.01


@pytest.mark.parametrize("prefix", ["", "model.", "vae.", "first_stage_model.", "module._orig_mod.", "pipe.vae."])
def test_wrappers_are_looked_through(prefix: str) -> None:
    names = WanVAE(VAEConfig(dim=8, res_blocks=1)).state_dict()
    assert vae_names(prefix + name for name in names) == {prefix + name: name for name in names}


def test_two_names_for_one_tensor_are_refused() -> None:
    with pytest.raises(CheckpointError, match=r"conv1\.weight twice"):
        vae_names(["conv1.weight", "model.conv1.weight"])


def test_diffusers_vae_without_some_parts_is_told_which() -> None:
    with pytest.raises(CheckpointError) as refused:
        vae_names(["encoder.conv_in.weight", "quant_conv.weight"], "v.safetensors")
    assert "v.safetensors is no whole AutoencoderKLWan of diffusers: it lacks encoder.mid_block.*" in str(refused.value)
    assert "post_quant_conv.*" in str(refused.value) and "encoder.conv1" not in str(refused.value)
