"""Preview: a small picture of latents that are still noisy, by one 16 x 3 matrix, in microseconds, with no decoder.

Each latent pixel is close to a linear function of the mean colour of its 8 x 8 pixels. The matrix comes from
`latent_rgb.json` beside the VAE, fitted on real clips. Without that file it is fitted once, on coloured blobs that go
through this very encoder.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import CheckpointError, short_path
from ..sampling.checks import is_finite, not_finite
from .vae import WanVAE

FACTORS_NAME = "latent_rgb.json"
PICTURES, SIDE = 24, 64
"""Size of the fit: 24 x 64 latent pixels for 17 unknowns per colour; half a second at the real width on two cores."""


class Preview:
    """`preview(latents)` is a uint8 picture (h, w, 3) of the middle frame of latents (C, T, h, w)."""

    def __init__(self, matrix: Tensor) -> None:
        """`matrix` (C + 1, 3) maps a latent pixel and a one to RGB in [-1, 1]."""
        self.matrix = matrix.float().cpu()

    def __call__(self, latents_CTHW: Tensor) -> np.ndarray:
        middle_CHW = latents_CTHW[:, latents_CTHW.shape[1] // 2].float().cpu()
        rgb_HWC = middle_CHW.movedim(0, -1) @ self.matrix[:-1] + self.matrix[-1]
        return rgb_HWC.add(1).mul(127.5).clamp(0, 255).to(torch.uint8).numpy()

    @classmethod
    def for_vae(cls, vae: WanVAE, path: Path) -> Preview:
        """Read the matrix beside the VAE file `path`, or fit one."""
        factors = path.parent / FACTORS_NAME
        if not factors.is_file():
            return cls(fit(vae, blobs(PICTURES, SIDE)))
        try:
            data = json.loads(factors.read_text("utf-8"))
            matrix = torch.tensor([*data["factors"], data["bias"]], dtype=torch.float32)
        except (ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{short_path(factors)} is damaged ({error!s:.80}). Delete it.") from None
        if matrix.shape != (vae.config.z_dim + 1, 3):
            size = "x".join(map(str, matrix.shape))
            raise CheckpointError(f"{short_path(factors)} has {size} numbers, expected 17x3. Delete it.")
        return cls(matrix)


@torch.no_grad()
def fit(vae: WanVAE, pictures_BCHW: Tensor) -> Tensor:
    """The least-squares matrix (C + 1, 3) for pictures in [-1, 1], each encoded as a clip of one frame.

    Raises NumericsError if the VAE makes NaN of them.
    """
    weight = vae.conv1.weight
    means_BCTHW, _ = vae.encode_clip(pictures_BCHW[:, :, None].to(weight.device))
    known_LC = means_BCTHW.movedim(1, -1).flatten(0, -2).float().cpu()
    if not is_finite(known_LC):
        raise not_finite("VAE", "pictures")
    colours = F.avg_pool2d(pictures_BCHW, vae.config.spatial_stride)
    wanted_L3 = colours.permute(0, 2, 3, 1).flatten(0, 2)
    known_LC = torch.cat([known_LC, torch.ones(len(known_LC), 1)], dim=1)
    return torch.linalg.lstsq(known_LC.double(), wanted_L3.double()).solution.float()


def blobs(count: int, side: int) -> Tensor:
    """Smooth random colours (count, 3, side, side) in [-1, 1]: coarse noise, enlarged."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(count, 3, 5, 5, generator=generator) * 2.4 - 1.2
    return F.interpolate(coarse, size=(side, side), mode="bicubic", align_corners=True).clamp(-1, 1)
