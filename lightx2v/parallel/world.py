"""The processes that torchrun started: how they find each other, what each of them is for, how they part.

    world = join(environment, device="auto", layout=config.parallel)
    world.sequence, world.branch        how a DiT splits its tokens, and which guidance branch runs here
    world.wire                          exchanges between all processes
    world.leave()

The processes meet through torchrun's store. Where they all run on one machine, they talk over its loopback only.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.rendezvous import rendezvous

from .. import errors
from ..errors import ConfigError, LightX2VError
from .ulysses import Ulysses
from .wire import Wire

log = logging.getLogger("lightx2v.parallel")

TIMEOUT = timedelta(minutes=30)
"""Of one exchange. Failures are noticed by `watch.Watch` within seconds; this is for what nobody thought of."""

Tensors = Iterable[tuple[str, Tensor]]


@dataclass(frozen=True, slots=True, kw_only=True)
class World:
    """`branch` is 0 for the prompt and 1 for the negative prompt; with one part of either kind there is no such wire."""

    rank: int
    size: int
    device: torch.device
    store: dist.Store
    wire: Wire
    cfg: Wire | None
    sequence: Ulysses | None

    @property
    def leads(self) -> bool:
        """Whether this is the process that reads, writes and talks to people."""
        return self.rank == 0

    @property
    def wires(self) -> dict[str, Wire]:
        """By what they are for."""
        found = {"world": self.wire, "cfg": self.cfg, "sequence": self.sequence.wire if self.sequence else None}
        return {name: wire for name, wire in found.items() if wire is not None}

    @property
    def calls(self) -> int:
        """How many exchanges this process has begun: equal on all processes, wherever they are in step."""
        return sum(wire.calls for wire in self.wires.values())

    def branches(self, mine: Tensor) -> list[Tensor]:
        """The velocities of the prompt and of the negative prompt, from the two processes that have them."""
        assert self.cfg is not None
        return list(self.cfg.collect(mine[None], [1, 1]))

    def stream(self, tensors: Tensors) -> Iterator[tuple[str, Tensor]]:
        """(name, tensor) as rank 0 reads them, on every process; the others' `tensors` are not touched.

        What goes wrong while reading is raised on every process.
        """
        if self.rank != 0:
            while (head := self.wire.tell(None)) is not None:
                raise_told(head)
                empty = torch.empty(head["shape"], dtype=getattr(torch, head["dtype"]), device=self.device)
                yield head["name"], self.wire.spread(empty)
            return
        try:
            for name, tensor in tensors:
                tensor = tensor.to(self.device)
                dtype = str(tensor.dtype).removeprefix("torch.")
                self.wire.tell({"name": name, "shape": list(tensor.shape), "dtype": dtype})
                yield name, self.wire.spread(tensor)
        except LightX2VError as error:
            self.wire.tell(told(error))
            raise
        self.wire.tell(None)

    def leave(self) -> None:
        """Ends the group. Everybody is to call it; who does not is not waited for."""
        if dist.is_initialized():
            dist.destroy_process_group()


def told(error: LightX2VError) -> dict[str, str]:
    """An error as JSON, for the other processes."""
    return {"error": type(error).__name__, "message": str(error)}


def raise_told(message: Any) -> None:
    """Raises the error that `told` made; does nothing where the message is none."""
    if isinstance(message, dict) and "error" in message:
        kind = getattr(errors, str(message["error"]), LightX2VError)
        raise kind(message["message"])


def join(rank: int, size: int, local_rank: int, *, cfg_p_size: int, seq_p_size: int, device: str = "auto") -> World:
    """Meets the other processes. NCCL on GPUs, gloo on CPUs; what is small always goes over gloo."""
    assert cfg_p_size * seq_p_size == size
    on_gpu = device.startswith("cuda") or (device == "auto" and torch.cuda.is_available())
    if on_gpu:
        count = torch.cuda.device_count()
        if local_rank >= count:
            raise ConfigError(
                f"torchrun started {size} processes, but this machine has {count} CUDA devices. "
                f'Use --nproc_per_node={count}, or set device to "cpu".'
            )
        torch.cuda.set_device(local_rank)
    _stay_local()
    store, _, _ = next(iter(rendezvous("env://", timeout=timedelta(minutes=5))))
    if not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if on_gpu else "gloo"
        prefixed = dist.PrefixStore("lightx2v", store)
        dist.init_process_group(backend, store=prefixed, rank=rank, world_size=size, timeout=TIMEOUT)
    kind = "cuda" if on_gpu else "cpu"
    mesh = init_device_mesh(kind, (cfg_p_size, seq_p_size), mesh_dim_names=("cfg_p", "seq_p"))
    where = torch.device(kind, local_rank) if on_gpu else torch.device(kind)
    everybody = dist.group.WORLD
    assert everybody is not None
    return World(
        rank=rank,
        size=size,
        device=where,
        store=store,
        wire=Wire(everybody, where),
        cfg=Wire(mesh.get_group("cfg_p"), where) if cfg_p_size > 1 else None,
        sequence=Ulysses(Wire(mesh.get_group("seq_p"), where)) if seq_p_size > 1 else None,
    )


def _stay_local() -> None:
    """On one machine the processes talk over loopback, whatever its name resolves to."""
    one_machine = os.environ.get("LOCAL_WORLD_SIZE") == os.environ.get("WORLD_SIZE")
    if one_machine and sys.platform == "linux":
        for library in ("GLOO", "NCCL"):
            os.environ.setdefault(f"{library}_SOCKET_IFNAME", "lo")
