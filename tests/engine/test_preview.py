from __future__ import annotations

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from vae_reference import random_vae

from lightx2v.errors import CheckpointError, NumericsError
from lightx2v.models.preview import FACTORS_NAME, Preview, blobs, fit
from lightx2v.models.vae import WanVAE
from lightx2v.models.vae_config import VAEConfig


class MixingVAE(WanVAE):
    """Its latents are a known linear map of the mean colours, with noise in the channels that carry none."""

    def __init__(self) -> None:
        super().__init__(VAEConfig(dim=2, res_blocks=1))
        self.generator = torch.Generator().manual_seed(0)
        self.mix = torch.randn(16, 3, generator=self.generator)

    def encode(self, video_CTHW, **_):
        colours = F.avg_pool2d(video_CTHW.movedim(0, 1), 8).movedim(0, 1)
        latents = torch.einsum("kc,cthw->kthw", self.mix, colours) + 0.3
        return latents + 0.01 * torch.randn(latents.shape, generator=self.generator)

    def encode_clip(self, video_BCTHW):
        latents_BCTHW = torch.stack([self.encode(video_CTHW) for video_CTHW in video_BCTHW])
        return latents_BCTHW, latents_BCTHW


def test_fit_finds_the_colours_back():
    vae = MixingVAE()
    preview = Preview(fit(vae, blobs(12, 32)))
    video = blobs(4, 48)[3][:, None].repeat(1, 5, 1, 1)
    picture = preview(vae.encode(video))
    expected = F.avg_pool2d(video[:, 2], 8).movedim(0, -1).add(1).mul(127.5)
    assert picture.shape == (6, 6, 3) and picture.dtype == np.uint8
    assert np.abs(picture - expected.numpy()).max() <= 6


def test_factors_beside_the_vae_are_used(tmp_path):
    matrix = [[0.0] * 3 for _ in range(16)]
    matrix[2] = [0.5, 0.0, -0.5]
    (tmp_path / FACTORS_NAME).write_text(json.dumps({"factors": matrix, "bias": [0.0, 1.0, 0.0]}))
    preview = Preview.for_vae(random_vae(VAEConfig(dim=2, res_blocks=1)), tmp_path / "Wan2.1_VAE.pth")
    latents = torch.zeros(16, 3, 2, 2)
    latents[2] = 1
    assert preview(latents)[0, 0].tolist() == [191, 255, 63]


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"factors": [[1, 2, 3]], "bias": [0, 0, 0]}', '{"factors": "x", "bias": [0, 0, 0]}']
)
def test_damaged_factors_are_named(tmp_path, text):
    (tmp_path / FACTORS_NAME).write_text(text)
    with pytest.raises(CheckpointError, match=FACTORS_NAME):
        Preview.for_vae(random_vae(VAEConfig(dim=2, res_blocks=1)), tmp_path / "Wan2.1_VAE.pth")


def test_a_vae_without_factors_gets_fitted_ones(tmp_path):
    preview = Preview.for_vae(random_vae(VAEConfig(dim=4, res_blocks=1)), tmp_path / "Wan2.1_VAE.pth")
    assert preview.matrix.shape == (17, 3) and preview.matrix.isfinite().all()


def test_a_vae_that_makes_nan_of_pictures_is_named(tmp_path):
    vae = random_vae(VAEConfig(dim=2, res_blocks=1))
    with torch.no_grad():
        vae.conv1.bias[3] = torch.nan
    with pytest.raises(NumericsError, match="The VAE made NaN or infinity of pictures"):
        Preview.for_vae(vae, tmp_path / "Wan2.1_VAE.pth")


class Written(TorchDispatchMode):
    """Counts the numbers that operations write."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        shares_memory = any(alias.alias_info and not alias.alias_info.is_write for alias in func._schema.returns)
        if isinstance(result, torch.Tensor) and not shares_memory:
            self.numbers += result.numel()
        return result


def test_a_preview_costs_a_few_passes_over_one_frame():
    preview = Preview(torch.randn(17, 3))
    latents = torch.randn(16, 21, 60, 104)
    with Written() as written:
        assert preview(latents).shape == (60, 104, 3)
    assert written.numbers <= 60 * 104 * (16 + 8 * 3)
