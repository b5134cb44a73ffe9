"""The VAE against diffusers' AutoencoderKLWan, and against itself: streamed, whole, memoised, in bfloat16."""

from __future__ import annotations

import pytest
import torch
from vae_reference import random_vae, relative_error, same_in_diffusers, statistics

from lightx2v.errors import Cancelled
from lightx2v.models.vae import WanVAE
from lightx2v.models.vae_config import VAEConfig
from lightx2v.progress import CancelToken

TINY = VAEConfig(dim=8, res_blocks=1)


@pytest.fixture(scope="module")
def vae() -> WanVAE:
    return random_vae(TINY)


def clip(frames: int, height: int = 24, width: int = 16, seed: int = 1) -> torch.Tensor:
    return torch.rand(3, frames, height, width, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def noise(frames: int, height: int = 3, width: int = 2) -> torch.Tensor:
    return torch.randn(16, frames, height, width, generator=torch.Generator().manual_seed(2))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "frames", "size"),
    [(TINY, 13, (40, 24)), (VAEConfig(dim=4, multipliers=(1, 2, 2, 4)), 9, (16, 32)), (VAEConfig(), 5, (32, 32))],
    ids=["tiny", "other-multipliers", "real-width"],
)
@torch.no_grad()
def test_equals_diffusers(config, frames, size):
    vae = random_vae(config)
    other = same_in_diffusers(vae)
    mean, std = statistics(other)
    video = clip(frames, *size)[None]

    expected = (other.encode(video).latent_dist.mode() - mean) / std
    assert relative_error(vae.encode(video[0]), expected[0]) <= 1e-4
    assert relative_error(vae.encode_clip(video)[0], expected) <= 1e-4

    latents = torch.randn(expected.shape, generator=torch.Generator().manual_seed(2))
    expected = other.decode(latents * std + mean).sample
    assert 0.1 < expected.abs().mean() < 0.9  # neither silent nor clamped away
    assert relative_error(torch.cat(list(vae.decode(latents[0])), dim=1), expected[0]) <= 1e-4
    assert relative_error(vae.decode_clip(latents).clamp(-1, 1), expected) <= 1e-4


def test_log_variance_is_that_of_the_normalised_latents(vae):
    video = clip(5)[None]
    other = same_in_diffusers(vae)
    _, std = statistics(other)
    expected = other.encode(video).latent_dist.logvar - 2 * std.log()
    torch.testing.assert_close(vae.encode_clip(video)[1], expected, rtol=0, atol=1e-4)


@pytest.mark.slow
def test_decode_yields_one_frame_then_four_for_each_latent(vae):
    chunks = list(vae.decode(noise(4)))
    assert [tuple(chunk.shape) for chunk in chunks] == [(3, 1, 24, 16)] + [(3, 4, 24, 16)] * 3
    assert all(chunk.dtype == torch.float32 and chunk.abs().max() <= 1 for chunk in chunks)


@pytest.mark.slow
def test_streamed_clips_equal_whole_clips(vae):
    latents = noise(5)
    whole = vae.decode_clip(latents[None])[0].clamp(-1, 1)
    torch.testing.assert_close(torch.cat(list(vae.decode(latents)), dim=1), whole, rtol=0, atol=1e-5)
    video = clip(17)
    torch.testing.assert_close(vae.encode(video), vae.encode_clip(video[None])[0][0], rtol=0, atol=1e-5)


@pytest.mark.slow
def test_decoding_a_prefix_gives_the_first_frames_bit_by_bit(vae):
    latents = noise(5)
    whole, prefix = (torch.cat(list(vae.decode(latents[:, :frames])), dim=1) for frames in (5, 3))
    assert torch.equal(whole[:, :9], prefix)


def test_one_picture_is_a_clip_of_one_frame(vae):
    latents = vae.encode(clip(1))
    assert latents.shape == (16, 1, 3, 2)
    assert [chunk.shape[1] for chunk in vae.decode(latents)] == [1]


@pytest.mark.slow
@pytest.mark.parametrize("last", [False, True], ids=["i2v", "flf2v"])
@pytest.mark.parametrize("frames", [5, 33, 1 + 4 * 26])
def test_condition_equals_the_encoded_clip_bit_by_bit(vae, frames, last):
    first, final = clip(1)[:, 0], clip(1, seed=5)[:, 0]
    video = torch.zeros(3, frames, 24, 16)
    video[:, 0] = first
    if last:
        video[:, -1] = final
    assert torch.equal(vae.encode_condition(frames, first, final if last else None), vae.encode(video))


def test_condition_does_not_compute_constant_chunks_again():
    vae = random_vae(TINY)
    layers = vae.encoder.layers()
    calls = [0] * len(layers)
    for index, layer in enumerate(layers):
        layer.register_forward_pre_hook(lambda *_, index=index: calls.__setitem__(index, calls[index] + 1))
    vae.encode_condition(81, clip(1)[:, 0])
    assert calls == sorted(calls)  # the first layers come to rest first
    assert calls[0] == 3 and calls[2] <= 7 and calls[-1] == 21


def test_condition_of_one_frame_is_the_picture(vae):
    picture = clip(1)
    assert torch.equal(vae.encode_condition(1, picture[:, 0]), vae.encode(picture))


def test_bfloat16_stays_near_float32_and_answers_float32(vae):
    half = random_vae(TINY).to(torch.bfloat16)
    latents, video = noise(3), clip(9)
    frames = torch.cat(list(half.decode(latents)), dim=1)
    encoded = half.encode(video)
    assert frames.dtype == encoded.dtype == torch.float32
    assert (frames - torch.cat(list(vae.decode(latents)), dim=1)).abs().mean() < 2e-2
    assert (encoded - vae.encode(video)).abs().mean() < 2e-2


def test_cancel_stops_between_chunks(vae):
    cancel = CancelToken()
    frames = vae.decode(noise(5), cancel=cancel)
    next(frames)
    cancel.cancel()
    with pytest.raises(Cancelled):
        next(frames)
    with pytest.raises(Cancelled):
        vae.encode(clip(5), cancel=cancel)
    with pytest.raises(Cancelled):
        vae.encode_condition(5, clip(1)[:, 0], cancel=cancel)


def test_two_decodes_at_once_do_not_mix(vae):
    first, second = noise(3), noise(3) * 0.5
    alone = list(vae.decode(first))
    turns = [(a, b) for a, b in zip(vae.decode(first), vae.decode(second), strict=True)]
    assert all(torch.equal(a, b) for a, (b, _) in zip(alone, turns, strict=True))


def test_whole_clips_pass_gradients_to_every_parameter():
    vae = random_vae(TINY).requires_grad_(True)
    video = torch.stack([clip(5, seed=1), clip(5, seed=2)])
    mean, log_variance = vae.encode_clip(video)
    (vae.decode_clip(mean).square().mean() + log_variance.mean()).backward()
    silent = [
        name for name, parameter in vae.named_parameters() if not (parameter.grad is not None and parameter.grad.any())
    ]
    assert not silent


@pytest.mark.slow
def test_decoder_memory_does_not_grow_with_the_clip(vae):
    """What the stream holds after 3 latent frames it holds after 9."""
    from lightx2v.models.causal_conv import Stream

    held = []
    stream = Stream()
    for _ in range(9):
        x = noise(1)[None]
        for layer in vae.decoder.layers():
            x = layer(x, stream)
        held.append(sum(past.untyped_storage().nbytes() for past in stream.past.values()))
    assert held[2] == held[8]
