"""Spatial tiles for the VAE: where they lie, how they blend, and how much memory decoding takes with and without them.

Overlapping tiles go through the VAE one after another, each over the whole clip, and are added up with weights that
ramp linearly across the overlap. One tile's memory of the past is alive at a time, which is what makes it small: the
memories of all tiles together would be larger than that of the whole picture. The price is that the finished frames
wait in host memory until the last tile is done. Tiling is not exact: the attention and the convolutions at a tile's
edge see less of the picture.

Sizes are in latent pixels (8 x 8 video pixels); H and W are latent height and width.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Tiling:
    """The largest tile's side and the least overlap; 32 and 8 are 256 and 64 video pixels."""

    size: int = 32
    overlap: int = 8

    def __post_init__(self) -> None:
        assert 0 <= self.overlap < self.size

    def tiles(self, height: int, width: int) -> list[Tile]:
        return [Tile(rows, columns) for rows in self._cut(height) for columns in self._cut(width)]

    def tile_shape(self, height: int, width: int) -> tuple[int, int]:
        """Height and width of each tile: they all have the same size."""
        return self._cut(height)[0].length, self._cut(width)[0].length

    def _cut(self, total: int) -> list[Span]:
        """As few spans as possible of equal length, and no longer than the overlap asks."""
        count = max(1, math.ceil((total - self.overlap) / (self.size - self.overlap)))
        length = math.ceil((total + (count - 1) * self.overlap) / count)
        starts = [round(i * (total - length) / max(1, count - 1)) for i in range(count)]
        # Neighbours fade into each other around the middle of what they share, which may be more than the overlap.
        centres = [(after + before + length) / 2 for before, after in zip(starts, starts[1:], strict=False)]
        return [
            Span(start, length, left, right, self.overlap)
            for start, left, right in zip(starts, [None, *centres], [*centres, None], strict=True)
        ]


@dataclass(frozen=True, slots=True)
class Span:
    """One tile along one axis; `left` and `right` are the centres of the ramps towards its neighbours."""

    start: int
    length: int
    left: float | None
    right: float | None
    overlap: int

    def slice(self, scale: int) -> slice:
        return slice(self.start * scale, (self.start + self.length) * scale)

    def weights(self, scale: int) -> Tensor:
        """Weight of each of the `length * scale` pixels; those of all spans add up to one everywhere."""
        position = (torch.arange(self.length * scale, dtype=torch.float64) + 0.5) / scale + self.start
        weight = torch.ones_like(position)
        width = max(self.overlap, 1e-6)  # without overlap: a step
        if self.left is not None:
            weight *= ((position - self.left) / width + 0.5).clamp(0, 1)
        if self.right is not None:
            weight *= ((self.right - position) / width + 0.5).clamp(0, 1)
        return weight.float()


@dataclass(frozen=True, slots=True)
class Tile:
    rows: Span
    columns: Span

    def crop(self, x: Tensor, scale: int) -> Tensor:
        """The tile's part of (..., H * scale, W * scale)."""
        return x[..., self.rows.slice(scale), self.columns.slice(scale)]

    def add(self, total: Tensor, part: Tensor, scale: int) -> None:
        """Adds the weighted part to its place in the total (..., H * scale, W * scale)."""
        weight = self.rows.weights(scale)[:, None] * self.columns.weights(scale)
        self.crop(total, scale).add_(part.to(total.device) * weight)
