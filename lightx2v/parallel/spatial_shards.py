"""SpatialShards: the frames of the VAE split over several processes along their height.

A convolution that looks one row up and down first gets the edge rows of the neighbouring shards (their halo), and
attention gets the keys and values of all shards. All other layers look at one pixel, so the shards together are what
one process computes. `heights` are the heights of the shards in latents; a layer at n times that resolution has n
times as many rows.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from .collectives import Collectives


class SpatialShards:
    """How a WanVAE splits its frames (its argument `split`)."""

    def __init__(self, collectives: Collectives, heights: Sequence[int]) -> None:
        self.collectives, self.heights = collectives, list(heights)

    def shard(self, x: Tensor, scale: int) -> Tensor:
        """This process's rows of (..., H * scale, W)."""
        rank = self.collectives.rank
        start, height = sum(self.heights[:rank]), self.heights[rank]
        return x[..., start * scale : (start + height) * scale, :]

    def with_halo(self, x_HX: Tensor, *, above: bool = True) -> Tensor:
        """x with the neighbours' edge rows along the first axis, and zeros at the edges of the frame."""
        rank, last = self.collectives.rank, self.collectives.size - 1
        over, under = torch.zeros_like(x_HX[:1]), torch.zeros_like(x_HX[:1])
        exchanges: list[tuple[int, Tensor | None, Tensor | None]] = []
        if rank > 0:
            exchanges.append((rank - 1, x_HX[:1], over if above else None))
        if rank < last:
            exchanges.append((rank + 1, x_HX[-1:] if above else None, under))
        self.collectives.send_receive(exchanges)
        return torch.cat([over, x_HX, under] if above else [x_HX, under])

    def all_gather(self, x_HX: Tensor) -> Tensor:
        """All shards of a tensor with latent height, on every process."""
        return self.collectives.all_gather(x_HX, self.heights)

    def gather(self, x_HX: Tensor) -> Tensor | None:
        """All shards one below the other, on rank 0; None elsewhere."""
        scale = x_HX.shape[0] // self.heights[self.collectives.rank]
        return self.collectives.gather(x_HX, [height * scale for height in self.heights])

    def all_true(self, flag: bool) -> bool:
        return self.collectives.all_true(flag)
