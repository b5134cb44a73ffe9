"""What image-to-video and first-last-frame-to-video feed the model besides the noise.

    picture (H0, W0, 3) ─► framing.py ─► pixels (3, H, W) in [-1, 1] ─► VAE ─► latents (16, T, h, w)
                                                            mask (4, T, h, w) ──┴─► condition (20, T, h, w)

The model's input is [noisy latents 16, mask 4, picture latents 16], the same for both guidance branches. The mask is 1
where a frame is given; its four channels are the four video frames that one latent frame stands for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..media.framing import Framing, frame_picture
from ..models.causal_conv import SpatialSplit
from ..models.tiling import Tiling
from ..progress import CancelToken

if TYPE_CHECKING:
    from PIL.Image import Image

    Picture = Image | np.ndarray
    """RGB: a PIL image or an array HWC uint8."""


class ConditionEncoder(Protocol):
    """The part of the VAE that is needed here."""

    def encode_condition(
        self,
        frames: int,
        first_CHW: Tensor,
        last_CHW: Tensor | None = None,
        *,
        tiling: Tiling | None = None,
        split: SpatialSplit | None = None,
        cancel: CancelToken | None = None,
    ) -> Tensor: ...


def prepare_pictures(
    first: Picture, last: Picture | None = None, *, height: int, width: int, mode: str | None = None
) -> tuple[Tensor, Tensor | None]:
    """First and last frame as the model sees them, (3, H, W) float32 in [-1, 1].

    The first picture decides the size of the video. A last picture of another size is cropped to the centre: stretching
    it as the first one is would make the subject change its shape during the clip.
    """
    framing = frame_picture(_size(first), height, width, mode)
    first_CHW = to_pixels(first, framing)
    if last is None:
        return first_CHW, None
    if _size(last) != _size(first):
        framing = frame_picture(_size(last), framing.height, framing.width, "crop")
    return first_CHW, to_pixels(last, framing)


def to_pixels(picture: Picture, framing: Framing) -> Tensor:
    """The framed part of a picture, bicubic, (3, H, W) float32 in [-1, 1] and the overshoot that bicubic makes."""
    # A copy, because PIL's buffer is read-only and torch cannot share one.
    left, top, right, bottom = framing.box
    pixels_HWC = np.array(picture)[top:bottom, left:right]
    pixels_BCHW = torch.from_numpy(pixels_HWC).permute(2, 0, 1)[None].float().div_(255).sub_(0.5).div_(0.5)
    size = (framing.height, framing.width)
    return F.interpolate(pixels_BCHW, size=size, mode="bicubic", align_corners=False, antialias=framing.antialias)[0]


def frame_mask(frames: int, height: int, width: int, *, last: bool) -> Tensor:
    """(4, T, h, w) float32 for a clip of 4 (T - 1) + 1 frames and latents of h x w.

    The first latent frame stands for one video frame, counted four times; so all its channels are 1. The last video
    frame is the last of the four in the last latent frame.
    """
    mask = torch.zeros(4, (frames - 1) // 4 + 1, height, width)
    mask[:, 0] = 1
    if last:
        mask[3, -1] = 1
    return mask


def encode_pictures(
    vae: ConditionEncoder,
    frames: int,
    first_CHW: Tensor,
    last_CHW: Tensor | None = None,
    *,
    tiling: Tiling | None = None,
    split: SpatialSplit | None = None,
    cancel: CancelToken | None = None,
) -> Tensor:
    """The condition (20, T, h, w) float32: mask, then latents of a clip that is grey but for the given frames."""
    latents_CTHW = vae.encode_condition(frames, first_CHW, last_CHW, tiling=tiling, split=split, cancel=cancel)
    mask_CTHW = frame_mask(frames, *latents_CTHW.shape[-2:], last=last_CHW is not None)
    return torch.cat([mask_CTHW.to(latents_CTHW), latents_CTHW])


def _size(picture: Picture) -> tuple[int, int]:
    """Width and height."""
    return (picture.shape[1], picture.shape[0]) if isinstance(picture, np.ndarray) else picture.size
