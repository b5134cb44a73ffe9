"""The tokens of a video over several processes, after DeepSpeed-Ulysses.

Each process holds a run of tokens and does everything that looks at one token alone: norms, projections, text,
feed-forward. For self-attention they exchange: from some tokens of all heads to all tokens of some heads, and back.
Where tokens or heads do not divide, some processes have one more; there is no padding, so nothing needs a mask and
the result is that of one process.

Legend: B batch, L all tokens, l tokens here, N heads, n heads here, H head dim, R rows that travel.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .collectives import Wire, shares

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


class Ulysses:
    """How a WanDiT splits its tokens (its attribute `split`)."""

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
        wire, (batch, local, all_heads, width) = self.wire, q_BlNH.shape
        lengths, heads = shares(tokens, wire.size), shares(all_heads, wire.size)
        mine = heads[wire.rank]
        out, back = [local * count for count in heads], [length * mine for length in lengths]
        rows = q_BlNH.new_empty(local * all_heads, 3, batch, width)
        for place, x_BlNH in enumerate((q_BlNH, k_BlNH, v_BlNH)):  # one copy, straight to where it is sent from
            for part, x_BlnH in zip(rows.split(out), x_BlNH.split(heads, dim=2), strict=True):
                part.view(local, x_BlnH.shape[2], 3, batch, width)[:, :, place] = x_BlnH.permute(1, 2, 0, 3)
        rows = wire.swap(rows, out, back)
        q_BLnH, k_BLnH, v_BLnH = rows.unflatten(0, (tokens, mine)).permute(2, 3, 0, 1, 4)
        out_BLnH = attention(q_BLnH, k_BLnH, v_BLnH) if mine else v_BLnH
        del rows, q_BLnH, k_BLnH, v_BLnH
        rows = wire.swap(out_BLnH.permute(1, 2, 0, 3).reshape(-1, batch, width), back, out)
        parts = [part.view(local, count, batch, width) for part, count in zip(rows.split(out), heads, strict=True)]
        return torch.cat(parts, dim=1).permute(2, 0, 1, 3)
