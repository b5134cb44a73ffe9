"""The processes that torchrun started: how they meet, what rank 0 tells the others, how a failure of one ends all.

    world = join(environment)
    mesh = world.mesh(cfg_p_size, seq_p_size)       for one loaded model: guidance branches x parts of the sequence
    with world.together(): …                what may fail on one process only

Rank 0 reads, writes and talks to people; the others do what it tells them (`same`). Commands, and everything
about failures, go through torchrun's store as JSON: waiting there has no time limit and needs no device.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import json
import logging
import math
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.rendezvous import rendezvous

from .. import errors
from ..config import Environment
from ..engine_config import EngineConfig
from ..errors import ConfigError, GroupFailed, LightX2VError
from ..progress import CancelToken
from .rows import Rows
from .ulysses import Ulysses
from .watch import Watch
from .wire import Wire, shares

log = logging.getLogger("lightx2v.parallel")

TIMEOUT = timedelta(minutes=30)
"""Of one exchange. `Watch` notices failures within seconds; this is for what nobody thought of."""
SETTLE = 5.0
"""Seconds in which all processes must have come out of a piece of work after it failed on one of them."""
MEET = timedelta(minutes=5)
POLL = 0.02
BUNDLE, ALIGN = 8 << 20, 16
LEAVE = "leave"

TensorStream = Iterable[tuple[str, Tensor]]


class World:
    """One per program; `join` makes it."""

    def __init__(self, rank: int, size: int, device: torch.device, store: dist.Store, watch: Watch) -> None:
        everybody = dist.group.WORLD
        assert everybody is not None
        self.rank, self.size, self.device = rank, size, device
        self.wire = Wire(everybody)
        self._wires = [self.wire]
        self._store, self._watch = store, watch
        self._told = self._works = 0

    @property
    def leads(self) -> bool:
        return self.rank == 0

    def mesh(self, cfg_p_size: int, seq_p_size: int) -> Mesh:
        """This process's place among `cfg_p_size` x `seq_p_size`; everybody calls it."""
        found = init_device_mesh(self.device.type, (cfg_p_size, seq_p_size), mesh_dim_names=("cfg_p", "seq_p"))
        cfg = Wire(found.get_group("cfg_p")) if cfg_p_size > 1 else None
        seq = Wire(found.get_group("seq_p")) if seq_p_size > 1 else None
        self._wires = [wire for wire in (self.wire, cfg, seq) if wire is not None]
        return Mesh(self, cfg, seq)

    # ---- what rank 0 tells the others -------------------------------------------------------------------------------

    def tell(self, what: str, content: Any = None) -> None:
        """Rank 0's next command, in JSON types."""
        self._store.set(f"command/{self._told}", json.dumps({"what": what, "content": content}))
        self._told += 1

    def peek(self) -> tuple[str, Any]:
        """The next command, whenever it comes; it stays the next one."""
        key = f"command/{self._told}"
        while not self._store.check([key]):
            time.sleep(POLL)
        command = json.loads(self._store.get(key))
        return command["what"], command["content"]

    def same(self, what: str, content: Callable[[], Any]) -> Any:
        """One call that all processes make: rank 0's content, on all. What rank 0 refuses is refused everywhere."""
        if self.leads:
            try:
                said = content()
            except LightX2VError as error:
                self.tell("refused", describe(error))
                raise
            self.tell(what, said)
            return said
        heard, said = self.peek()
        if heard == LEAVE:
            raise GroupFailed("Rank 0 has ended.")
        self.skip()
        if heard == "refused":
            raise recall(said)
        if heard != what:
            raise GroupFailed(f"Rank 0 does {heard} while this process does {what}: the scripts must do the same.")
        return said

    def skip(self) -> None:
        """Done with the command that `peek` shows."""
        self._told += 1

    def leave(self) -> None:
        """The program ends. The others, if they wait for a command, end too.

        After a failure it ends here: NCCL would wait for exchanges that never come.
        """
        with contextlib.suppress(RuntimeError):  # the store may be gone already
            if self._watch.reason():
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(1)
        if self.leads:
            with contextlib.suppress(RuntimeError):
                self.tell(LEAVE)
        self._watch.close()
        if dist.is_initialized():
            dist.destroy_process_group()

    def agree_on_model(self, config: EngineConfig, preset: str) -> tuple[EngineConfig, str]:
        """What rank 0 wants to load."""
        said = self.same("load", lambda: {"config": config.to_json(), "preset": preset})
        return EngineConfig.from_json(said["config"]), said["preset"]

    def check_device(self, device: str) -> None:
        """Raises ConfigError if this is not where the processes were put."""
        if device not in ("auto", self.device.type):
            raise ConfigError(
                f'device is "{device}", but the {self.size} processes are on {self.device.type.upper()}, one device '
                'each. Set device to "auto"; CUDA_VISIBLE_DEVICES says which GPUs are used, if any.'
            )

    def stream(self, tensors: TensorStream, cancel: CancelToken | None = None) -> Iterator[tuple[str, Tensor]]:
        """(name, tensor) as rank 0 reads them, on every process; the others' `tensors` are never begun.

        What stops rank 0 from reading is raised on every process.
        """
        if not self.leads:
            while (heads := self.wire.tell(None)) is not None:
                if isinstance(heads, dict):
                    raise recall(heads)
                yield from self._unpacked(heads)
            return
        try:
            for bundle in bundles(tensors, cancel):
                placed = [(name, tensor.to(self.device)) for name, tensor in bundle]
                self.wire.tell([[name, list(t.shape), str(t.dtype).removeprefix("torch.")] for name, t in placed])
                flat = [t.contiguous().reshape(-1).view(torch.uint8) for _, t in placed]
                self.wire.spread(flat[0] if len(flat) == 1 else torch.cat([padded(raw) for raw in flat]))
                del flat
                yield from placed
        except LightX2VError as error:
            self.wire.tell(describe(error))
            raise
        self.wire.tell(None)

    def _unpacked(self, heads: list[Any]) -> Iterator[tuple[str, Tensor]]:
        """The tensors of one bundle, received."""
        kinds = [getattr(torch, dtype) for _, _, dtype in heads]
        sizes = [math.prod(shape) * kind.itemsize for (_, shape, _), kind in zip(heads, kinds, strict=True)]
        places = sizes if len(heads) == 1 else [size + -size % ALIGN for size in sizes]
        parts = self.wire.spread(torch.empty(sum(places), dtype=torch.uint8, device=self.device)).split(places)
        for (name, shape, _), kind, size, part in zip(heads, kinds, sizes, parts, strict=True):
            tensor = part[:size].view(kind).view(shape)
            yield name, tensor if len(heads) == 1 else tensor.clone()

    # ---- failures ---------------------------------------------------------------------------------------------------

    @contextmanager
    def together(self) -> Iterator[None]:
        """Work that all processes do. Where it fails on all, at the same exchange, the group can go on.

        Otherwise some wait for an exchange that will not come; then the first failure is told and all processes end.
        """
        work, self._works = self._works, self._works + 1
        try:
            yield
        except BaseException as error:
            self._store.set(f"ended/{work}/{self.rank}", self._calls())
            missing = self._missing(work)
            if missing:
                lost = isinstance(error, RuntimeError) and self._watch.silent(missing)
                self._watch.fail(
                    f"{'Process ' + ', '.join(map(str, missing)) + ' ended without a word' if lost else error}",
                    kind="GroupFailed" if lost else type(error).__name__,
                )
                raise GroupFailed(self._watch.reason()) from error
            raise
        self._store.set(f"ended/{work}/{self.rank}", self._calls())

    def give_up(self, error: BaseException) -> None:
        """Tells all processes that this one ends, so that they end too."""
        self._watch.fail(str(error) or "stopped", kind=type(error).__name__)

    def _calls(self) -> str:
        return str(sum(wire.calls for wire in self._wires))

    def _missing(self, work: int) -> list[int]:
        """The processes that do not come out of this work, or not at the same exchange."""
        deadline = time.monotonic() + SETTLE
        missing = list(range(self.size))
        while missing and time.monotonic() < deadline:
            missing = [rank for rank in missing if not self._store.check([f"ended/{work}/{rank}"])]
            time.sleep(0.05)
        if missing:
            return missing
        calls = [self._store.get(f"ended/{work}/{rank}").decode() for rank in range(self.size)]
        return [rank for rank, count in enumerate(calls) if count != calls[self.rank]]


class Mesh:
    """Who does what for one model. `sequence` splits a DiT's tokens; there is none with a single part."""

    def __init__(self, world: World, cfg: Wire | None, seq: Wire | None) -> None:
        self.world = world
        self.cfg = cfg
        self.sequence = Ulysses(seq) if seq is not None else None

    def rows(self, height: int) -> Rows | None:
        """How latents of this height are split over all processes for the VAE; None if they are too few rows."""
        return Rows(self.world.wire, shares(height, self.world.size)) if height >= self.world.size else None

    def branch(self, branches: list[Any]) -> list[Any]:
        """Of the prompt and the negative prompt those that this process has to do."""
        return branches if self.cfg is None or len(branches) < 2 else [branches[self.cfg.rank]]

    def both(self, velocities: list[Tensor], branches: int) -> list[Tensor]:
        """The velocities of all branches, from those of this process's."""
        if self.cfg is None or branches < 2:
            return velocities
        return list(self.cfg.collect(velocities[0][None], [1, 1]))

    @property
    def sent(self) -> dict[str, dict[str, int]]:
        """Bytes this process has sent to others, by group and kind."""
        wires = {"world": self.world.wire, "cfg": self.cfg, "seq": self.sequence.wire if self.sequence else None}
        return {name: dict(wire.sent) for name, wire in wires.items() if wire is not None}


class SharedCancel(CancelToken):
    """A run's cancel flag on all processes: whoever is asked to stop, they stop at the same `check`.

    `check` is an exchange, so all must call it at the same places: between steps and between chunks of the VAE.
    """

    def __init__(self, wire: Wire, token: CancelToken | None) -> None:
        super().__init__()
        self._wire, self._token = wire, token

    @property
    def cancelled(self) -> bool:
        return super().cancelled or (self._token is not None and self._token.cancelled)

    def check(self) -> None:
        if self._wire.agree(self.cancelled, all_of_them=False):
            self.cancel()
            super().check()


def bundles(tensors: TensorStream, cancel: CancelToken | None) -> Iterator[list[tuple[str, Tensor]]]:
    """Small tensors together, large ones alone: a model has a thousand small ones, and an exchange takes its time."""
    bundle, size = [], 0
    for name, tensor in tensors:
        if cancel is not None:
            cancel.check()
        nbytes = tensor.numel() * tensor.itemsize
        if bundle and size + nbytes > BUNDLE:
            yield bundle
            bundle, size = [], 0
        bundle.append((name, tensor))
        size += nbytes
    if bundle:
        yield bundle


def padded(raw: Tensor) -> Tensor:
    """Bytes up to a multiple of ALIGN, so that what follows them can be seen as any dtype."""
    return F.pad(raw, (0, -raw.numel() % ALIGN))


def describe(error: LightX2VError) -> dict[str, str]:
    """An error as JSON, for the other processes."""
    return {"error": type(error).__name__, "message": str(error)}


def recall(message: dict[str, str]) -> LightX2VError:
    """The error that `describe` was given."""
    kind = getattr(errors, message["error"], LightX2VError)
    return kind(message["message"]) if issubclass(kind, LightX2VError) else LightX2VError(message["message"])


@functools.cache
def join(environment: Environment) -> World:
    """Meets the other processes, once per program. NCCL on GPUs, gloo on CPUs; what is small always goes over gloo."""
    rank, size, local_rank = environment.rank, environment.world_size or 1, environment.local_rank
    if environment.local_world_size not in (None, size):
        raise ConfigError(
            f"{size} processes were started, {environment.local_world_size} of them on this machine. One video is made "
            "on one machine; start one group on each."
        )
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        if local_rank >= (count := torch.cuda.device_count()):
            raise ConfigError(
                f"torchrun started {size} processes, but this machine has {count} CUDA devices. "
                f"Use --nproc_per_node={count}."
            )
        torch.cuda.set_device(local_rank)
    environment.stay_local()
    life = f"lightx2v/{environment.restart}"
    store, _, _ = next(iter(rendezvous("env://", timeout=MEET)))
    group = dist.PrefixStore(f"{life}/group", store)
    backend = "cpu:gloo,cuda:nccl" if on_gpu else "gloo"
    dist.init_process_group(backend, store=group, rank=rank, world_size=size, timeout=TIMEOUT)
    watched, _, _ = next(iter(rendezvous("env://", timeout=MEET)))  # a connection of its own, for another thread
    watch = Watch(dist.PrefixStore(f"{life}/watch", watched), rank, size)
    place = torch.device("cuda", local_rank) if on_gpu else torch.device("cpu")
    log.info("Process %d of %d is on %s.", rank, size, place)
    world = World(rank, size, place, dist.PrefixStore(life, store), watch)
    atexit.register(world.leave)
    return world
