"""The length of a toy's path, against clips whose motion is known."""

from __future__ import annotations

import dataclasses

import torch

from training.detector import detect
from training.world import MOTIONS, place_clips, render


def path(motion: str, **changes: torch.Tensor) -> float:
    clips = place_clips(torch.zeros(4, dtype=torch.long), torch.Generator().manual_seed(3))
    number = torch.full((4,), MOTIONS.index(motion))
    video = render(dataclasses.replace(clips, motion=number, **changes))
    return detect(video).path.mean().item()


def test_a_video_that_repeats_its_first_frame_has_no_path() -> None:
    video = render(place_clips(torch.zeros(2, dtype=torch.long), torch.Generator().manual_seed(3)))
    still = video[:, :, :1].expand(-1, -1, 17, -1, -1)
    assert detect(still).path.tolist() == [0.0, 0.0]


def test_half_of_the_motion_is_half_of_the_path() -> None:
    """Every frame of the first half twice: the toy goes half as far."""
    video = render(place_clips(torch.zeros(4, dtype=torch.long), torch.Generator().manual_seed(3)))
    slow = video[:, :, [i // 2 for i in range(17)]]
    whole, half = detect(video).path, detect(slow).path
    assert torch.allclose(detect(video[:, :, :9]).path, half, atol=1e-6)
    assert (half < 0.8 * whole).all() and (half > 0).all()


def test_every_motion_has_a_path() -> None:
    assert min(path(motion) for motion in MOTIONS) > 0.1
