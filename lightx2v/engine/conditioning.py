"""Conditioning: the model's second input for image-to-video and first-last-frame-to-video, beside the noise.

    image (H0, W0, 3) ─► framing.py ─► pixels (3, H, W) in [-1, 1] ─► VAE ─► latents (16, T, h, w)
                                                          mask (4, T, h, w) ──┴─► condition (20, T, h, w)

The model's input is [noisy latents 16, mask 4, image latents 16], the same for both guidance branches. The mask is 1
where a frame is given; its four channels are the four video frames that one latent frame represents.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..media.framing import Framing, framing_of
from ..models.tiling import Tiling
from ..models.vae import WanVAE
from ..parallel.spatial_shards import SpatialShards
from ..progress import CancelToken

if TYPE_CHECKING:
    from PIL.Image import Image

    InputImage = Image | np.ndarray
    """RGB: a PIL image or an array HWC uint8."""


def prepare_images(
    first: InputImage, last: InputImage | None = None, *, height: int, width: int, mode: str | None = None
) -> tuple[Tensor, Tensor | None]:
    """First and last frame as the model sees them, (3, H, W) float32 in [-1, 1].

    The first image decides the size of the video. A last image of another size is cropped at its centre: stretching it
    like the first one would make the subject change its shape during the clip.
    """
    framing = framing_of(_size(first), height, width, mode)
    first_CHW = to_pixels(first, framing)
    if last is None:
        return first_CHW, None
    if _size(last) != _size(first):
        framing = framing_of(_size(last), framing.height, framing.width, "crop")
    return first_CHW, to_pixels(last, framing)


def to_pixels(image: InputImage, framing: Framing) -> Tensor:
    """The framed part of an image, bicubic, (3, H, W) float32 in [-1, 1] plus the overshoot of bicubic."""
    # A copy, because PIL's buffer is read-only and torch cannot share one.
    left, top, right, bottom = framing.box
    pixels_HWC = np.array(image)[top:bottom, left:right]
    pixels_BCHW = torch.from_numpy(pixels_HWC).permute(2, 0, 1)[None].float().div_(255).sub_(0.5).div_(0.5)
    size = (framing.height, framing.width)
    return F.interpolate(pixels_BCHW, size=size, mode="bicubic", align_corners=False, antialias=framing.antialias)[0]


def frame_mask(frames: int, height: int, width: int, *, last: bool) -> Tensor:
    """(4, T, h, w) float32 for a clip of 4 (T - 1) + 1 frames and latents of h x w.

    The first latent frame represents one video frame, counted four times, so all its channels are 1. The last video
    frame is the last of the four in the last latent frame.
    """
    mask = torch.zeros(4, (frames - 1) // 4 + 1, height, width)
    mask[:, 0] = 1
    if last:
        mask[3, -1] = 1
    return mask


def encode_condition(
    vae: WanVAE,
    frames: int,
    first_CHW: Tensor,
    last_CHW: Tensor | None = None,
    *,
    motion: float = 1.0,
    tiling: Tiling | None = None,
    split: SpatialShards | None = None,
    cancel: CancelToken | None = None,
) -> Tensor:
    """The condition (20, T, h, w) float32: mask, then latents of a clip that is grey except for the given frames.

    `motion` is the amplitude of `amplified`.
    """
    latents_CTHW = vae.encode_condition(frames, first_CHW, last_CHW, tiling=tiling, split=split, cancel=cancel)
    latents_CTHW = amplified(latents_CTHW, motion)
    mask_CTHW = frame_mask(frames, *latents_CTHW.shape[-2:], last=last_CHW is not None)
    return torch.cat([mask_CTHW.to(latents_CTHW), latents_CTHW])


def amplified(latents_CTHW: Tensor, motion: float) -> Tensor:
    """Move the latents of the grey frames away from those of the first frame, so that the video moves more.

    d = rest - first becomes motion (d - m) + m, where m is d's mean in each latent frame; 1 changes nothing. The result
    stays within -6 and 6. From PainterI2V for ComfyUI, which made it for models distilled to 4 steps.
    """
    if motion == 1:
        return latents_CTHW
    first_C1HW, rest_CTHW = latents_CTHW[:, :1], latents_CTHW[:, 1:]
    d_CTHW = rest_CTHW - first_C1HW
    mean_1T11 = d_CTHW.mean(dim=(0, 2, 3), keepdim=True)
    moved_CTHW = torch.add(first_C1HW + mean_1T11, d_CTHW - mean_1T11, alpha=motion)
    return torch.cat([first_C1HW, moved_CTHW.clamp_(-6, 6)], dim=1)


def _size(image: InputImage) -> tuple[int, int]:
    """Width and height."""
    return (image.shape[1], image.shape[0]) if isinstance(image, np.ndarray) else image.size
