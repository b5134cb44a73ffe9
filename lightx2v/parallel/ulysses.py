"""Ulysses: the tokens of a video split over several processes, after DeepSpeed-Ulysses.

Each process holds a run of tokens and computes all that looks at one token alone: norms, projections, text,
feed-forward. For self-attention an all-to-all turns some tokens of all heads into all tokens of some heads, and a
second one turns the result back. Where tokens or heads do not divide evenly, some processes have one more; there is no
padding, so nothing needs a mask and the result is that of one process.

Legend: B batch, L all tokens, l tokens here, N heads, n heads here, H head dim.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from .collectives import Collectives, shard_sizes

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


class Ulysses:
    """How a WanDiT splits its tokens (its attribute `split`)."""

    def __init__(self, collectives: Collectives) -> None:
        self.collectives = collectives

    def shard(self, x: Tensor, dim: int) -> Tensor:
        """This process's run of tokens along `dim`."""
        lengths = shard_sizes(x.shape[dim], self.collectives.size)
        rank = self.collectives.rank
        return x.narrow(dim, sum(lengths[:rank]), lengths[rank]).contiguous()

    def all_gather(self, x_BlD: Tensor, tokens: int) -> Tensor:
        """All `tokens` tokens (B, L, D), on every process."""
        lengths = shard_sizes(tokens, self.collectives.size)
        return self.collectives.all_gather(x_BlD.transpose(0, 1), lengths).transpose(0, 1)

    def attend(self, attention: Attention, tokens: int, q_BlNH: Tensor, k_BlNH: Tensor, v_BlNH: Tensor) -> Tensor:
        """`attention` over all `tokens` tokens. q, k and v travel in one all-to-all, the result in another."""
        exchange, (batch, local, all_heads, width) = self.collectives, q_BlNH.shape
        lengths, heads = shard_sizes(tokens, exchange.size), shard_sizes(all_heads, exchange.size)
        local_heads = heads[exchange.rank]
        send, receive = [local * count for count in heads], [length * local_heads for length in lengths]
        packed = q_BlNH.new_empty(local * all_heads, 3, batch, width)
        for place, x_BlNH in enumerate((q_BlNH, k_BlNH, v_BlNH)):  # one copy, straight into the send buffer
            for part, x_BlnH in zip(packed.split(send), x_BlNH.split(heads, dim=2), strict=True):
                part.view(local, x_BlnH.shape[2], 3, batch, width)[:, :, place] = x_BlnH.permute(1, 2, 0, 3)
        packed = exchange.all_to_all(packed, send, receive)
        q_BLnH, k_BLnH, v_BLnH = packed.unflatten(0, (tokens, local_heads)).permute(2, 3, 0, 1, 4)
        out_BLnH = attention(q_BLnH, k_BLnH, v_BLnH) if local_heads else v_BLnH
        del packed, q_BLnH, k_BLnH, v_BLnH
        packed = exchange.all_to_all(out_BLnH.permute(1, 2, 0, 3).reshape(-1, batch, width), receive, send)
        parts = [part.view(local, count, batch, width) for part, count in zip(packed.split(send), heads, strict=True)]
        return torch.cat(parts, dim=1).permute(2, 0, 1, 3)
