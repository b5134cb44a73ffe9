"""The rows of a picture over several processes, for the VAE: each process has a band of the picture's height.

A convolution that looks one row up and down gets the neighbours' edge rows first, attention gets everybody's keys and
values; all else looks at one pixel. So the bands together are what one process computes. `heights` are the bands'
heights in latents; a layer at n times that resolution has n times as many rows.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .collectives import Wire


class Rows:
    def __init__(self, wire: Wire, heights: Sequence[int]) -> None:
        self.wire, self.heights = wire, list(heights)

    def band(self, x: Tensor, scale: int) -> Tensor:
        """This process's rows of (..., H * scale, W)."""
        start, height = sum(self.heights[: self.wire.rank]), self.heights[self.wire.rank]
        return x[..., start * scale : (start + height) * scale, :]

    def framed(self, x_HX: Tensor, *, above: bool = True) -> Tensor:
        """x with its neighbours' edge rows along the first axis, zeros where the picture ends."""
        rank, last = self.wire.rank, self.wire.size - 1
        over, under = torch.zeros_like(x_HX[:1]), torch.zeros_like(x_HX[:1])
        exchanges: list[tuple[int, Tensor | None, Tensor | None]] = []
        if rank > 0:
            exchanges.append((rank - 1, x_HX[:1], over if above else None))
        if rank < last:
            exchanges.append((rank + 1, x_HX[-1:] if above else None, under))
        self.wire.trade(exchanges)
        return torch.cat([over, x_HX, under] if above else [x_HX, under])

    def whole(self, x_HX: Tensor) -> Tensor:
        """All bands of what has latent height, on every process."""
        return self.wire.collect(x_HX, self.heights)

    def to_first(self, x_HX: Tensor) -> Tensor | None:
        """All bands one under the other, on rank 0; None elsewhere."""
        scale = x_HX.shape[0] // self.heights[self.wire.rank]
        return self.wire.to_first(x_HX, [height * scale for height in self.heights])

    def all_agree(self, flag: bool) -> bool:
        return self.wire.agree(flag, all_of_them=True)
