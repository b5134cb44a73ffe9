"""Collectives: the exchanges of tensors between processes that a parallel run is made of, and a count of their bytes.

Nothing is pickled: both sides know the shapes, or the shapes travel as JSON.
"""

import json
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class Collectives:
    """The exchanges of one torch.distributed group (`handle`).

    `sent` counts the bytes that this process has sent to others, by the kinds that reports name: "swap" (all-to-all),
    "collect" (all-gather), "spread" (broadcast), "trade" (send and receive), "agree" (flags) and "tell" (JSON).
    `calls` counts the exchanges.
    """

    def __init__(self, handle: dist.ProcessGroup) -> None:
        self.handle = handle
        self.rank, self.size = dist.get_rank(handle), dist.get_world_size(handle)
        self.sent: dict[str, int] = {}
        self.calls = 0

    def _count(self, kind: str, nbytes: int) -> None:
        self.calls += 1
        self.sent[kind] = self.sent.get(kind, 0) + nbytes

    def all_to_all(self, x: Tensor, send: Sequence[int], receive: Sequence[int]) -> Tensor:
        """Exchange along the first axis: `send[r]` entries go to rank r, `receive[r]` entries come from it."""
        x = x.contiguous()
        out = x.new_empty(sum(receive), *x.shape[1:])
        self._count("swap", (x.shape[0] - send[self.rank]) * x[:1].numel() * x.itemsize)
        dist.all_to_all_single(out, x, list(receive), list(send), group=self.handle)
        return out

    def all_gather(self, x: Tensor, lengths: Sequence[int]) -> Tensor:
        """Concatenate the x of all ranks along the first axis, on every rank. Rank r has `lengths[r]` entries."""
        longest = max(lengths)
        padded = x.new_zeros(longest, *x.shape[1:])
        padded[: x.shape[0]] = x
        out = x.new_empty(self.size * longest, *x.shape[1:])
        self._count("collect", padded.numel() * padded.itemsize * (self.size - 1))
        dist.all_gather(list(out.split(longest)), padded, group=self.handle)
        if min(lengths) == longest:
            return out
        return torch.cat([part[:length] for part, length in zip(out.split(longest), lengths, strict=True)])

    def broadcast(self, x: Tensor) -> Tensor:
        """Rank 0's x on every rank. The other ranks pass a tensor of its shape and dtype, to be filled."""
        raw = x.contiguous()
        flat = raw.reshape(-1).view(torch.uint8)
        self._count("spread", flat.numel() * (self.size - 1) if self.rank == 0 else 0)
        if flat.numel():
            dist.broadcast(flat, group=self.handle, group_src=0)
        return raw

    def send_receive(self, exchanges: Sequence[tuple[int, Tensor | None, Tensor | None]]) -> None:
        """Exchange with several ranks at once: (rank, tensor to send, tensor to receive into), None for neither."""
        sends = [(rank, x.contiguous()) for rank, x, _ in exchanges if x is not None]
        self._count("trade", sum(x.numel() * x.itemsize for _, x in sends))
        operations = [dist.P2POp(dist.isend, x, group=self.handle, group_peer=rank) for rank, x in sends]
        operations += [
            dist.P2POp(dist.irecv, x, group=self.handle, group_peer=rank) for rank, _, x in exchanges if x is not None
        ]
        for work in dist.batch_isend_irecv(operations) if operations else []:
            work.wait()

    def gather(self, x: Tensor, lengths: Sequence[int]) -> Tensor | None:
        """Concatenate the x of all ranks along the first axis, on rank 0; None on the others."""
        if self.rank != 0:
            self.send_receive([(0, x, None)])
            return None
        out = x.new_empty(sum(lengths), *x.shape[1:])
        parts = list(out.split(list(lengths)))
        parts[0].copy_(x)
        self.send_receive([(rank, None, part) for rank, part in enumerate(parts) if rank])
        return out

    def all_true(self, flag: bool) -> bool:
        """Whether the flag is set on all ranks."""
        return not self.any_true(not flag)

    def any_true(self, flag: bool) -> bool:
        """Whether the flag is set on at least one rank. A few bytes on the CPU, so it waits for no device."""
        votes = torch.tensor([int(flag)], dtype=torch.int32)
        self._count("agree", 4 * (self.size - 1))
        dist.all_reduce(votes, dist.ReduceOp.MAX, group=self.handle)
        return bool(votes.item())

    def broadcast_json(self, message: Any) -> Any:
        """Rank 0's message (JSON types) on every rank."""
        data = json.dumps(message).encode() if self.rank == 0 else b""
        length = torch.tensor([len(data)], dtype=torch.int64)
        self._count("tell", len(data) * (self.size - 1))
        dist.broadcast(length, group=self.handle, group_src=0)
        payload = torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)
        if self.rank != 0:
            payload = torch.empty(int(length.item()), dtype=torch.uint8)
        dist.broadcast(payload, group=self.handle, group_src=0)
        return json.loads(payload.numpy().tobytes())

    def all_gather_json(self, message: Any) -> list[Any]:
        """The messages (JSON types) of all ranks, on every rank."""
        data = torch.frombuffer(bytearray(json.dumps(message).encode()), dtype=torch.uint8)
        length = torch.tensor([data.numel()], dtype=torch.int64)
        lengths = self.all_gather(length, [1] * self.size).tolist()
        parts = self.all_gather(data, lengths).split(lengths)
        return [json.loads(part.numpy().tobytes()) for part in parts]


def shard_sizes(total: int, parts: int) -> list[int]:
    """Split `total` into `parts` lengths that differ by at most one: no padding, so no mask."""
    return [total // parts + (part < total % parts) for part in range(parts)]
