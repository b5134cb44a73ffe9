"""The tokens of a video over several processes, after DeepSpeed-Ulysses.

Each process holds a run of tokens and does everything that looks at one token alone: norms, projections, text,
feed-forward. For self-attention they exchange: from some tokens of all heads to all tokens of some heads, and back.
Token counts that do not divide give runs that differ by one token; there is no padding, so the result is the same.

Legend: B batch, L all tokens, l tokens here, N heads, n heads here, H head dim, P processes.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .wire import Wire, shares

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


class Ulysses:
    """How a WanDiT splits its tokens (its attribute `sequence`)."""

    def __init__(self, wire: Wire) -> None:
        self.wire = wire

    def part(self, x: Tensor, dim: int) -> Tensor:
        """This process's run of the tokens along `dim`."""
        lengths = shares(x.shape[dim], self.wire.size)
        return x.narrow(dim, sum(lengths[: self.wire.rank]), lengths[self.wire.rank]).contiguous()

    def whole(self, x_BlD: Tensor, tokens: int) -> Tensor:
        """All `tokens` tokens (B, L, D), on every process."""
        return self.wire.collect(x_BlD.transpose(0, 1), shares(tokens, self.wire.size)).transpose(0, 1)

    def attend(self, attention: Attention, tokens: int, q_BlNH: Tensor, k_BlNH: Tensor, v_BlNH: Tensor) -> Tensor:
        """`attention` over all `tokens` tokens; q, k and v travel in one exchange, the result in another."""
        size, lengths = self.wire.size, shares(tokens, self.wire.size)
        batch, local, heads, width = q_BlNH.shape
        packed = torch.stack([q_BlNH, k_BlNH, v_BlNH]).unflatten(3, (size, heads // size))  # 3 B l P n H
        packed = packed.permute(3, 2, 0, 1, 4, 5).flatten(0, 1)
        received = self.wire.swap(packed, [local] * size, lengths).permute(1, 2, 0, 3, 4)  # 3 B L n H
        out_BLnH = attention(received[0], received[1], received[2])
        del packed, received
        back = self.wire.swap(out_BLnH.transpose(0, 1), lengths, [local] * size)
        back = back.unflatten(0, (size, local)).permute(2, 1, 0, 3, 4)  # B l P n H
        return back.reshape(batch, local, heads, width)
