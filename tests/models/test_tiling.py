"""Tiles cover the picture, blend without a seam, and give nearly what the whole picture gives."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from vae_reference import random_vae

from lightx2v.config.architecture import tile_side
from lightx2v.errors import Cancelled
from lightx2v.models.tiling import Tiling
from lightx2v.models.vae import WanVAE
from lightx2v.models.vae_config import VAEConfig
from lightx2v.progress import CancelToken

TILING = Tiling(size=16, overlap=8)


@pytest.fixture(scope="module")
def vae() -> WanVAE:
    """Random, but local as a trained VAE is: the trunk looks at one pixel, the branches add the rest in small doses."""
    vae = random_vae(VAEConfig(dim=8, res_blocks=1))
    for name, parameter in vae.named_parameters():
        if name.endswith(("residual.6.weight", "residual.6.bias", "proj.weight", "proj.bias")):
            parameter.mul_(0.02)
        elif parameter.dim() > 3 and parameter.shape[-1] == 3 and "residual" not in name:
            centre = parameter[..., 1, 1] * 3
            parameter.mul_(0.02)
            parameter[..., 1, 1] = centre
    return vae


def sharpest_step(difference: torch.Tensor) -> float:
    """What makes a seam visible: how much the difference to the whole changes from one pixel to the next, in 1/255.

    Not counted is the picture's own edge, where a random VAE has steps of fifty levels of its own.
    """
    inner = difference[..., 16:-16, 16:-16]
    return max(float(inner.diff(dim=dim).abs().max()) for dim in (-2, -1)) * 127.5


def smooth_video(frames: int, height: int, width: int) -> torch.Tensor:
    """Three colour waves that travel."""
    time = torch.arange(frames)[:, None, None] / 8
    y, x = torch.arange(height)[:, None] / height, torch.arange(width) / width
    waves = [torch.sin(3 * x + 2 * y + time), torch.cos(4 * y - time + 2 * x * y), torch.sin(2 * x - 3 * y) + 0 * time]
    return 0.8 * torch.stack(waves)


@given(st.integers(1, 60), st.integers(1, 9), st.integers(2, 40), st.data())
def test_tiles_cover_every_pixel_once(height, width, size, data):
    tiling = Tiling(size=size, overlap=data.draw(st.integers(0, size // 2)))
    scale = data.draw(st.sampled_from([1, 8]))
    covered = torch.zeros(height * scale, width * scale)
    tiles = tiling.tiles(height, width, scale)
    for tile in tiles:
        rows, columns = (tile_side(side, tiling.size, tiling.overlap) for side in (height, width))
        assert tile.rows.stop - tile.rows.start == rows <= size
        assert tile.columns.stop - tile.columns.start == columns <= size
        tile.add(covered, torch.ones(rows * scale, columns * scale), scale)
    torch.testing.assert_close(covered, torch.ones_like(covered))
    for before, after in itertools.pairwise(sorted({tile.rows.start for tile in tiles})):
        assert before + rows - after >= tiling.overlap


@pytest.mark.slow
@pytest.mark.parametrize("size", [(24, 24), (25, 17), (18, 31)], ids=str)
def test_tiled_decoding_has_no_seam(vae, size):
    height, width = size
    latents = vae.encode(smooth_video(9, height * 8, width * 8))
    whole = torch.cat(list(vae.decode(latents)), dim=1)
    pieces = list(vae.decode(latents, tiling=TILING))
    assert [piece.shape[1] for piece in pieces] == [1, 4, 4]
    difference = torch.cat(pieces, dim=1) - whole
    assert difference.abs().mean() * 127.5 <= 1  # in steps of 1/255
    assert sharpest_step(difference) <= 3


@pytest.mark.slow
def test_hard_edges_between_tiles_would_fail_the_seam_test(vae):
    latents = vae.encode(smooth_video(5, 192, 192))
    whole = torch.cat(list(vae.decode(latents)), dim=1)
    hard = torch.cat(list(vae.decode(latents, tiling=Tiling(size=16, overlap=0))), dim=1)
    assert sharpest_step(hard - whole) > 20


@pytest.mark.slow
def test_tiled_encoding_is_near_the_whole(vae):
    video = smooth_video(9, 200, 136)
    whole, tiled = vae.encode(video), vae.encode(video, tiling=TILING)
    assert tiled.shape == whole.shape
    assert (tiled - whole).abs().mean() <= 0.05 * whole.std()


@pytest.mark.slow
def test_tiled_condition_equals_the_tiled_clip_bit_by_bit(vae):
    video = torch.zeros(3, 13, 192, 136)
    video[:, :1] = smooth_video(1, 192, 136)
    video[:, -1:] = smooth_video(1, 192, 136).flip(-1)
    condition = vae.encode_condition(13, video[:, 0], video[:, -1], tiling=TILING)
    assert torch.equal(condition, vae.encode(video, tiling=TILING))


@pytest.mark.slow
def test_a_picture_that_fits_one_tile_is_not_tiled(vae):
    latents = vae.encode(smooth_video(5, 128, 96))
    for whole, tiled in zip(vae.decode(latents), vae.decode(latents, tiling=TILING), strict=True):
        assert torch.equal(whole, tiled)


def test_cancel_stops_between_chunks_of_a_tile(vae):
    cancel = CancelToken()
    cancel.cancel()
    with pytest.raises(Cancelled):
        list(vae.decode(torch.zeros(16, 2, 24, 24), tiling=TILING, cancel=cancel))
