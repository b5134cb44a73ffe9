"""Spatial tiles for the VAE: where they lie and how they blend.

Overlapping tiles go through the VAE one after another, each over the whole clip, and are added up with weights that
ramp linearly across the overlap. One tile's memory of the past is alive at a time, which is what makes it small: the
memories of all tiles together would be larger than that of the whole picture. The price is that the finished frames
wait in host memory until the last tile is done. Tiling is not exact: the attention and the convolutions at a tile's
edge see less of the picture.

Sizes are in latent pixels (8 x 8 video pixels); H and W are latent height and width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..config.architecture import TILE_OVERLAP, TILE_SIZE, tile_count, tile_side


@dataclass(frozen=True, slots=True, kw_only=True)
class Tiling:
    """The largest tile's side and the least overlap."""

    size: int = TILE_SIZE
    overlap: int = TILE_OVERLAP

    def __post_init__(self) -> None:
        assert 0 <= 2 * self.overlap <= self.size

    def tiles(self, height: int, width: int, scale: int) -> list[Tile]:
        """Tiles over latents of this size, to be blended in a result that is `scale` times as large."""
        return [
            Tile(rows, columns, row_weights[:, None] * column_weights)
            for rows, row_weights in self._cut(height, scale)
            for columns, column_weights in self._cut(width, scale)
        ]

    def _cut(self, total: int, scale: int) -> list[tuple[slice, Tensor]]:
        """One axis: where each tile lies, and its weights, which add up to one at every pixel of the result."""
        cut = total, self.size, self.overlap
        count, length = tile_count(*cut), tile_side(*cut)
        starts = [round(i * (total - length) / max(1, count - 1)) for i in range(count)]
        position = torch.arange(length * scale, dtype=torch.float64) + 0.5
        ramp = position / max(self.overlap * scale, 1)
        weights, weight_sum = [], torch.zeros(total * scale, dtype=torch.float64)
        for start in starts:
            weight = torch.ones_like(position)
            if start > 0:
                weight = weight.minimum(ramp)
            if start + length < total:
                weight = weight.minimum(ramp.flip(0))
            weights.append(weight)
            weight_sum[start * scale : (start + length) * scale] += weight
        return [
            (slice(start, start + length), (weight / weight_sum[start * scale : (start + length) * scale]).float())
            for start, weight in zip(starts, weights, strict=True)
        ]


@dataclass(frozen=True, slots=True, eq=False)
class Tile:
    """Rows and columns in latents, and the weight of each pixel of the result."""

    rows: slice
    columns: slice
    weights: Tensor

    def crop(self, x: Tensor, scale: int) -> Tensor:
        """The tile's part of (..., H * scale, W * scale)."""
        rows, columns = (slice(span.start * scale, span.stop * scale) for span in (self.rows, self.columns))
        return x[..., rows, columns]

    def add(self, result: Tensor, part: Tensor, scale: int) -> None:
        """Adds the weighted part to its place in the result (..., H * scale, W * scale)."""
        self.crop(result, scale).add_(part.to(result.device) * self.weights)
