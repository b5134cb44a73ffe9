from __future__ import annotations

import pytest

from lightx2v.errors import CheckpointError
from lightx2v.models.vae import WanVAE
from lightx2v.models.vae_config import VAEConfig


def shapes_of(config: VAEConfig) -> dict[str, tuple[int, ...]]:
    import torch

    with torch.device("meta"):
        return {name: tuple(parameter.shape) for name, parameter in WanVAE(config).named_parameters()}


@pytest.mark.parametrize(
    "config",
    [
        VAEConfig(),
        VAEConfig(dim=16, res_blocks=1),
        VAEConfig(dim=24),
        VAEConfig(dim=10, multipliers=(1, 3, 5, 6), res_blocks=3, temporal_down=(True, False, True)),
    ],
)
def test_config_is_read_off_the_shapes(config):
    assert VAEConfig.from_shapes(shapes_of(config)) == config


def test_released_vae_has_its_published_shapes():
    shapes = shapes_of(VAEConfig())
    assert sum(map(product, shapes.values())) == 126_892_531
    assert shapes["encoder.conv1.weight"] == (96, 3, 3, 3, 3)
    assert shapes["encoder.downsamples.5.time_conv.weight"] == (192, 192, 3, 1, 1)
    assert "encoder.downsamples.2.time_conv.weight" not in shapes
    assert shapes["encoder.downsamples.6.shortcut.weight"] == (384, 192, 1, 1, 1)
    assert shapes["encoder.middle.1.norm.gamma"] == (384, 1, 1)
    assert shapes["encoder.head.2.weight"] == (32, 384, 3, 3, 3)
    assert shapes["decoder.upsamples.3.time_conv.weight"] == (768, 384, 3, 1, 1)
    assert shapes["decoder.upsamples.4.residual.2.weight"] == (384, 192, 3, 3, 3)
    assert shapes["decoder.upsamples.11.resample.1.weight"] == (96, 192, 3, 3)
    assert shapes["decoder.head.0.gamma"] == (96, 1, 1, 1)


def product(shape: tuple[int, ...]) -> int:
    total = 1
    for side in shape:
        total *= side
    return total


def test_another_file_is_refused():
    with pytest.raises(CheckpointError, match="Wan2.1_VAE.pth"):
        VAEConfig.from_shapes({"blocks.0.weight": (3, 3)})


def test_vae_of_the_5b_model_is_refused():
    shapes = shapes_of(VAEConfig(dim=8)) | {"conv2.weight": (48, 48, 1, 1, 1)}
    with pytest.raises(CheckpointError, match="48 latent channels"):
        VAEConfig.from_shapes(shapes)


def test_uneven_stages_are_refused():
    shapes = shapes_of(VAEConfig(dim=8))
    del shapes["encoder.downsamples.0.residual.2.weight"]
    with pytest.raises(CheckpointError, match="stages"):
        VAEConfig.from_shapes(shapes)
