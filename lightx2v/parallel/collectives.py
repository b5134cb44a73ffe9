"""Tensors between processes: the few exchanges that parallel runs are made of, and a count of their bytes.

Every exchange of a group goes through one `Wire`. Nothing is pickled: shapes are known on both sides or travel as JSON.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class Wire:
    """One group of processes. `sent` counts the bytes this process sent to others, by kind; `calls` the exchanges."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        self.sent: dict[str, int] = {}
        self.calls = 0

    def _count(self, kind: str, nbytes: int) -> None:
        self.calls += 1
        self.sent[kind] = self.sent.get(kind, 0) + nbytes

    def swap(self, x: Tensor, send: Sequence[int], receive: Sequence[int]) -> Tensor:
        """All-to-all along the first axis: `send[r]` entries go to rank r, `receive[r]` come from it."""
        x = x.contiguous()
        out = x.new_empty(sum(receive), *x.shape[1:])
        self._count("swap", (x.shape[0] - send[self.rank]) * x[:1].numel() * x.itemsize)
        dist.all_to_all_single(out, x, list(receive), list(send), group=self.group)
        return out

    def collect(self, x: Tensor, lengths: Sequence[int]) -> Tensor:
        """Everybody's x, of `lengths[r]` entries along the first axis, one after another; on all processes."""
        longest = max(lengths)
        mine = x.new_zeros(longest, *x.shape[1:])
        mine[: x.shape[0]] = x
        out = x.new_empty(self.size * longest, *x.shape[1:])
        self._count("collect", mine.numel() * mine.itemsize * (self.size - 1))
        dist.all_gather(list(out.split(longest)), mine, group=self.group)
        if min(lengths) == longest:
            return out
        return torch.cat([part[:length] for part, length in zip(out.split(longest), lengths, strict=True)])

    def spread(self, x: Tensor) -> Tensor:
        """Rank 0's x on all processes; the others give a tensor of its shape and dtype to be filled."""
        raw = x.contiguous()
        flat = raw.reshape(-1).view(torch.uint8)
        if self.rank == 0:
            self._count("spread", flat.numel() * (self.size - 1))
        else:
            self._count("spread", 0)
        if flat.numel():
            dist.broadcast(flat, group=self.group, group_src=0)
        return raw

    def trade(self, exchanges: Sequence[tuple[int, Tensor | None, Tensor | None]]) -> None:
        """With each (rank, send, receive) neighbour at once; `receive` is filled."""
        sends = [(rank, x.contiguous()) for rank, x, _ in exchanges if x is not None]
        self._count("trade", sum(x.numel() * x.itemsize for _, x in sends))
        peers = [dist.P2POp(dist.isend, x, group=self.group, group_peer=rank) for rank, x in sends]
        peers += [
            dist.P2POp(dist.irecv, x, group=self.group, group_peer=rank) for rank, _, x in exchanges if x is not None
        ]
        for work in dist.batch_isend_irecv(peers) if peers else []:
            work.wait()

    def to_first(self, x: Tensor, lengths: Sequence[int]) -> Tensor | None:
        """Everybody's x, of `lengths[r]` entries along the first axis, one after another, on rank 0."""
        if self.rank != 0:
            self.trade([(0, x, None)])
            return None
        out = x.new_empty(sum(lengths), *x.shape[1:])
        parts = list(out.split(list(lengths)))
        parts[0].copy_(x)
        self.trade([(rank, None, part) for rank, part in enumerate(parts) if rank])
        return out

    def agree(self, flag: bool, *, all_of_them: bool) -> bool:
        """Whether all (or any) of the processes say so. A few bytes on the CPU, so no device is waited for."""
        votes = torch.tensor([int(flag)], dtype=torch.int32)
        self._count("agree", 4 * (self.size - 1))
        dist.all_reduce(votes, dist.ReduceOp.MIN if all_of_them else dist.ReduceOp.MAX, group=self.group)
        return bool(votes.item())

    def tell(self, message: Any) -> Any:
        """Rank 0's message (JSON types) on all processes."""
        data = json.dumps(message).encode() if self.rank == 0 else b""
        length = torch.tensor([len(data)], dtype=torch.int64)
        self._count("tell", len(data) * (self.size - 1))
        dist.broadcast(length, group=self.group, group_src=0)
        payload = torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)
        if self.rank != 0:
            payload = torch.empty(int(length.item()), dtype=torch.uint8)
        dist.broadcast(payload, group=self.group, group_src=0)
        return json.loads(payload.numpy().tobytes())

    def gather_json(self, message: Any) -> list[Any]:
        """Everybody's message (JSON types), on all processes."""
        data = torch.frombuffer(bytearray(json.dumps(message).encode()), dtype=torch.uint8)
        own = torch.tensor([data.numel()], dtype=torch.int64)
        lengths = self.collect(own, [1] * self.size).tolist()
        parts = self.collect(data, lengths).split(lengths)
        return [json.loads(part.numpy().tobytes()) for part in parts]


def shares(total: int, parts: int) -> list[int]:
    """`total` in `parts` lengths that differ by one at most: nothing is padded, so nothing needs a mask."""
    return [total // parts + (part < total % parts) for part in range(parts)]
