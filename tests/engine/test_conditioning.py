from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from vae_reference import random_vae, relative_error, same_in_diffusers, statistics

from lightx2v.config.request import Request
from lightx2v.engine.conditioning import amplified, encode_condition, frame_mask, prepare_images, to_pixels
from lightx2v.errors import BadRequest, Cancelled
from lightx2v.media.framing import RESIZE_MODES, framing_of
from lightx2v.models.vae import WanVAE
from lightx2v.models.vae_config import VAEConfig
from lightx2v.progress import CancelToken


def picture(width: int, height: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


class RecordingVAE:
    """Stands in for the VAE: answers with constant latents and keeps what it was given."""

    def encode_condition(self, frames, first_CHW, last_CHW=None, *, tiling=None, split=None, cancel=None):
        self.given = (frames, first_CHW, last_CHW)
        if cancel is not None:
            cancel.check()
        _, height, width = first_CHW.shape
        return torch.full((16, (frames - 1) // 4 + 1, height // 8, width // 8), 0.5)


def cubic(x: float) -> float:
    """The convolution kernel of Keys 1981 with a = -0.75."""
    x, a = abs(x), -0.75
    if x <= 1:
        return (a + 2) * x**3 - (a + 3) * x**2 + 1
    return a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a if x < 2 else 0.0


def bicubic_matrix(inputs: int, outputs: int) -> np.ndarray:
    """One axis of bicubic interpolation in float64: pixel centres aligned, edges repeated."""
    matrix = np.zeros((outputs, inputs))
    for o in range(outputs):
        centre = (o + 0.5) * inputs / outputs - 0.5
        left = int(np.floor(centre)) - 1
        for tap in range(left, left + 4):
            matrix[o, min(max(tap, 0), inputs - 1)] += cubic(centre - tap)
    return matrix


@pytest.mark.parametrize("size", [(96, 54), (54, 96), (400, 225), (40, 40)])
def test_default_pixels_equal_the_formula_in_double_precision(size):
    image = picture(*size)
    pixels, _ = prepare_images(image, height=64, width=64)
    scaled = (image.astype(np.float64) / 255 - 0.5) / 0.5
    _, height, width = pixels.shape
    expected = np.einsum(
        "oh,hwc,pw->cop", bicubic_matrix(size[1], height), scaled, bicubic_matrix(size[0], width), optimize=True
    )
    assert pixels.dtype is torch.float32
    np.testing.assert_allclose(pixels.numpy(), expected, rtol=0, atol=2e-5)


def test_a_pil_image_and_its_array_give_the_same_pixels():
    image = picture(50, 40)
    by_array, _ = prepare_images(image, height=64, width=64)
    by_pil, _ = prepare_images(Image.fromarray(image), height=64, width=64)
    assert torch.equal(by_array, by_pil)


def test_a_picture_of_the_right_size_is_only_rescaled_to_minus_one_and_one():
    image = picture(64, 48)
    pixels, _ = prepare_images(image, height=48, width=64)
    expected = torch.from_numpy(image).permute(2, 0, 1).float() / 127.5 - 1
    torch.testing.assert_close(pixels, expected, rtol=0, atol=1e-6)


def test_channels_stay_red_green_blue():
    image = np.zeros((32, 32, 3), np.uint8)
    image[..., 0] = 255
    pixels, _ = prepare_images(image, height=32, width=32)
    assert pixels[0].min() == 1 and pixels[1:].max() == -1


@pytest.mark.parametrize("mode", [None, *RESIZE_MODES])
def test_pixels_have_the_size_that_the_framing_announced(mode):
    framing = framing_of((150, 100), 64, 96, mode)
    pixels, _ = prepare_images(picture(150, 100), height=64, width=96, mode=mode)
    assert pixels.shape == (3, framing.height, framing.width)


def test_crop_shows_the_centre_only():
    image = np.zeros((32, 96, 3), np.uint8)
    image[:, 32:64] = 255
    pixels, _ = prepare_images(image, height=32, width=32, mode="crop")
    assert pixels.shape == (3, 32, 32) and pixels.min() == 1


def test_shrinking_with_antialias_averages_what_it_leaves_out():
    stripes = np.zeros((256, 256, 3), np.uint8)
    stripes[:, ::2] = 255
    pixels = to_pixels(stripes, framing_of((256, 256), 32, 32, "crop"))
    assert pixels[:, :, 4:-4].abs().max() < 0.05


def test_the_callers_picture_is_not_written_to():
    image = picture(64, 64)
    before = image.copy()
    prepare_images(image, height=64, width=64)
    assert np.array_equal(image, before)


def test_a_last_picture_of_the_same_size_is_framed_like_the_first():
    first, last = picture(150, 100), picture(150, 100, seed=1)
    _, pixels = prepare_images(first, last, height=64, width=96)
    alone, _ = prepare_images(last, height=64, width=96)
    assert pixels is not None and torch.equal(pixels, alone)


def test_a_last_picture_of_another_shape_is_cropped_not_stretched():
    first, last = picture(64, 64), np.zeros((64, 192, 3), np.uint8)
    last[:, 64:128] = 255
    pixels, last_pixels = prepare_images(first, last, height=64, width=64)
    assert last_pixels is not None and last_pixels.shape == pixels.shape
    assert last_pixels.min() == 1


def reference_mask(frames: int, height: int, width: int, *, last: bool) -> torch.Tensor:
    """Frame flags, the first repeated four times, folded by four: the reference's words, step by step."""
    flags = torch.zeros(frames)
    flags[0] = 1
    if last:
        flags[-1] = 1
    flags = torch.cat([flags[:1].repeat(4), flags[1:]]).view(-1, 4)
    return flags.T[:, :, None, None].expand(-1, -1, height, width)


@pytest.mark.parametrize("frames", [1, 5, 17, 81])
@pytest.mark.parametrize("last", [False, True])
def test_the_mask_equals_the_reference(frames, last):
    mask = frame_mask(frames, 6, 8, last=last)
    assert mask.shape == (4, (frames - 1) // 4 + 1, 6, 8)
    assert torch.equal(mask, reference_mask(frames, 6, 8, last=last))


def test_the_mask_marks_the_first_frame_and_the_last_subframe():
    assert frame_mask(81, 2, 2, last=False)[:, :, 0, 0].nonzero().tolist() == [[c, 0] for c in range(4)]
    assert frame_mask(81, 2, 2, last=True)[:, :, 0, 0].nonzero().tolist() == [[0, 0], [1, 0], [2, 0], [3, 0], [3, 20]]


@pytest.mark.parametrize("last", [False, True])
def test_the_condition_is_mask_then_latents(last):
    vae, first = RecordingVAE(), torch.zeros(3, 32, 48)
    end = torch.ones(3, 32, 48) if last else None
    condition = encode_condition(vae, 17, first, end)
    assert condition.shape == (20, 5, 4, 6) and condition.dtype is torch.float32
    assert torch.equal(condition[:4], frame_mask(17, 4, 6, last=last))
    assert bool((condition[4:] == 0.5).all())
    frames, given_first, given_last = vae.given
    assert frames == 17 and given_first is first and given_last is end


def test_cancel_reaches_the_vae():
    token = CancelToken()
    token.cancel()
    with pytest.raises(Cancelled):
        encode_condition(RecordingVAE(), 17, torch.zeros(3, 32, 48), cancel=token)


@pytest.mark.parametrize("last", [False, True])
def test_with_the_vae_the_latents_are_those_of_a_grey_clip_with_the_given_frames(last):
    torch.manual_seed(0)
    vae = WanVAE(VAEConfig(dim=8, res_blocks=1)).eval()
    first, end = torch.rand(3, 16, 24) * 2 - 1, torch.rand(3, 16, 24) * 2 - 1
    clip = torch.zeros(3, 17, 16, 24)
    clip[:, 0] = first
    if last:
        clip[:, -1] = end
    condition = encode_condition(vae, 17, first, end if last else None)
    torch.testing.assert_close(condition[4:], vae.encode(clip), rtol=0, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("last", [False, True])
@torch.no_grad()
def test_the_whole_condition_equals_its_transcription_in_double_precision(last):
    """From a picture's bytes to the 20 channels: size rule, bicubic, grey clip, diffusers' VAE, statistics, mask."""
    area, frames, width, height = 64 * 96, 9, 100, 75
    first, end = picture(width, height), picture(width, height, seed=1)
    vae = random_vae(VAEConfig(dim=8, res_blocks=1))
    prepared = prepare_images(first, end if last else None, height=64, width=96)
    condition = encode_condition(vae, frames, *prepared)

    rows = int(np.sqrt(area * height / width) // 8 // 2 * 2)
    columns = int(np.sqrt(area / (height / width)) // 8 // 2 * 2)
    clip = np.zeros((3, frames, 8 * rows, 8 * columns))
    for at, image in {0: first, -1: end}.items() if last else [(0, first)]:
        scaled = (image / 255 - 0.5) / 0.5
        axes = bicubic_matrix(height, 8 * rows), bicubic_matrix(width, 8 * columns)
        clip[:, at] = np.einsum("oh,hwc,pw->cop", axes[0], scaled, axes[1], optimize=True)
    reference = same_in_diffusers(vae).double()
    mean, std = (value.double() for value in statistics(reference))
    latents = (reference.encode(torch.from_numpy(clip)[None]).latent_dist.mode() - mean) / std
    expected = torch.cat([reference_mask(frames, rows, columns, last=last).double(), latents[0]])
    assert condition.shape == expected.shape == (20, 3, 8, 10)
    assert relative_error(condition[4:].double(), expected[4:]) <= 1e-4
    assert torch.equal(condition[:4].double(), expected[:4])


@pytest.mark.parametrize("motion", [1.15, 2.0])
def test_motion_moves_the_later_latents_away_from_the_first_one(motion: float) -> None:
    """In float64, latent frame by latent frame: PainterI2V's formula."""
    latents = torch.randn(16, 5, 4, 6, generator=torch.Generator().manual_seed(1)) * 3
    first = latents[:, 0].double().numpy()
    expected = [first]
    for frame in range(1, 5):
        d = latents[:, frame].double().numpy() - first
        expected.append(np.clip(first + (d - d.mean()) * motion + d.mean(), -6, 6))
    got = amplified(latents, motion)
    assert np.abs(got.numpy() - np.stack(expected, 1)).max() < 1e-5 and (got.abs() == 6).any()
    assert torch.equal(got[:, 0], latents[:, 0])


def test_motion_reaches_the_latents_of_the_condition_and_not_its_mask() -> None:
    vae = RecordingVAE()
    vae.encode_condition = lambda *_, **__: torch.randn(16, 3, 4, 6, generator=torch.Generator().manual_seed(2))  # type: ignore[method-assign]
    plain, moved = (encode_condition(vae, 9, torch.zeros(3, 32, 48), motion=motion) for motion in (1.0, 1.5))  # type: ignore[arg-type]
    assert torch.equal(moved[:4], plain[:4]) and torch.equal(moved[4:], amplified(plain[4:], 1.5))
    assert not torch.equal(moved, plain)


def test_motion_of_one_changes_no_bit_and_one_frame_has_none() -> None:
    latents = 9 * torch.randn(16, 3, 4, 6)
    assert amplified(latents, 1.0) is latents
    assert torch.equal(amplified(latents[:, :1], 2.0), latents[:, :1])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"task": "t2v"}, "motion_amplitude is 1.5, which is for task i2v; the task is t2v"),
        ({"task": "flf2v", "image_path": "a.png", "last_frame_path": "b.png"}, "the task is flf2v"),
        ({"task": "i2v", "image_path": "a.png", "motion_amplitude": 2.5}, "Nearest valid value: 2"),
        ({"task": "i2v", "image_path": "a.png", "motion_amplitude": 0.9}, "Nearest valid value: 1"),
    ],
)
def test_motion_is_for_image_to_video(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(BadRequest, match=message):
        Request(**{"prompt": "a cat", "motion_amplitude": 1.5, **settings})
