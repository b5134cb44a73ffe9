from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from lightx2v.models.causal_conv import CausalConv3d, Stream


@pytest.fixture
def conv() -> CausalConv3d:
    torch.manual_seed(0)
    return CausalConv3d(5, 7).requires_grad_(False)


def exact(conv: CausalConv3d, clip: torch.Tensor) -> torch.Tensor:
    padded = F.pad(clip.double(), (1, 1, 1, 1, 2, 0))
    return F.conv3d(padded, conv.weight.double(), conv.bias.double())


@pytest.mark.parametrize("winograd", [2, 4])
@pytest.mark.parametrize("chunks", [(1, 4, 4), (1, 2, 2, 2), (1, 1, 1, 1), (4, 2, 1), (3, 5, 6), (9,)])
def test_any_chunks_equal_the_exact_convolution(conv, chunks, winograd):
    clip = torch.randn(1, 5, sum(chunks), 6, 4)
    stream = Stream(winograd)
    streamed = torch.cat([conv(chunk, stream) for chunk in clip.split(chunks, dim=2)], dim=2)
    expected = exact(conv, clip)
    assert (streamed - expected).abs().max() <= 5e-6 * expected.abs().max()
    torch.testing.assert_close(conv(clip).double(), expected, rtol=0, atol=1e-5)


def test_with_pairs_an_output_depends_on_its_own_three_frames_only(conv):
    """What lets constant chunks come to rest early; with fours, rounding ties all frames of a chunk together."""
    stream = Stream(winograd=2)
    clip = torch.randn(1, 5, 4, 6, 4)
    conv(clip, stream)
    changed = Stream(winograd=2)
    other = clip.clone()
    other[:, :, 0] += 1
    conv(other, changed)
    next_clip = torch.randn(1, 5, 4, 6, 4)
    first, second = conv(next_clip, stream), conv(next_clip, changed)
    assert torch.equal(first, second)
    third = next_clip.clone()
    third[:, :, 0] += 1
    a, b = (conv(x, Stream(winograd=2)) for x in (next_clip, third))
    assert torch.equal(a[:, :, 3], b[:, :, 3]) and not torch.equal(a[:, :, 2], b[:, :, 2])


def test_whole_clips_take_batches_and_gradients(conv):
    conv.requires_grad_(True)
    clip = torch.randn(2, 5, 3, 6, 4, requires_grad=True)
    conv(clip)[:, :, 1].sum().backward()
    assert clip.grad is not None and conv.weight.grad is not None
    assert clip.grad[:, :, :2].abs().sum() > 0 and clip.grad[:, :, 2].abs().sum() == 0  # the future has no say


def test_what_a_stream_remembers_is_a_copy(conv):
    stream = Stream()
    clip = torch.randn(1, 5, 4, 6, 4)
    conv(clip, stream)
    (past,) = stream.past.values()
    assert past.untyped_storage().nbytes() == past.numel() * 4  # two frames, not the whole chunk
