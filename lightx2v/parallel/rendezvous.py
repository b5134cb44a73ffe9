"""Where the processes meet: once per program, on one machine, over loopback.

torchrun's own store listens on every interface. So nothing but heartbeats and the news of a failure goes through it
(Watch): it outlives every rank. Commands, and what the groups of torch.distributed tell each other to connect, go
through a store in rank 0 that listens on 127.0.0.1.
"""

from __future__ import annotations

import atexit
import functools
import logging
import socket
import time
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from ..config.environment import Environment
from ..errors import ConfigError, GroupFailed
from .heartbeat import Watch
from .process_group import POLL, World

log = logging.getLogger("lightx2v.parallel")

TIMEOUT = timedelta(minutes=30)
"""Of one exchange. `Watch` notices failures within seconds; this is for what nobody thought of."""
MEET = timedelta(minutes=5)
LOOPBACK = "127.0.0.1"


@functools.cache
def join(environment: Environment) -> World:
    """Meets the other processes. NCCL on GPUs, gloo on CPUs; what is small always goes over gloo."""
    rank, size = environment.rank, environment.world_size or 1
    device = place(environment)
    environment.use_loopback()
    # A connection each: one for this thread, one for the watch, which must not wait for it.
    outer = _torchruns_store(environment)
    own = _rank_0s_store(environment, outer)
    heard = _torchruns_store(environment) or _client(own.port)
    _all_are_here(own, rank, size)
    watch = Watch(dist.PrefixStore(f"lightx2v/{environment.restart_count}/watch", heard), rank, size)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    group = dist.PrefixStore("group", own)
    try:
        dist.init_process_group(backend, store=group, rank=rank, world_size=size, timeout=TIMEOUT)
    except RuntimeError as error:
        reason = str(error).partition("\n")[0]
        raise GroupFailed(f"Process {rank} cannot connect to the others ({reason}): one of them has ended.") from None
    log.info("Process %d of %d is on %s.", rank, size, device)
    world = World(rank, size, device, dist.PrefixStore("lightx2v", own), watch)
    atexit.register(world.leave)
    return world


def place(environment: Environment) -> torch.device:
    """This process's device. ConfigError where the processes are more than the devices, or on several machines."""
    size, local_rank = environment.world_size or 1, environment.local_rank
    if environment.local_world_size not in (None, size):
        raise ConfigError(
            f"{size} processes were started, {environment.local_world_size} of them on this machine. One video is made "
            "on one machine; start one group on each."
        )
    if not torch.cuda.is_available():
        return torch.device("cpu")
    if local_rank >= (count := torch.cuda.device_count()):
        raise ConfigError(
            f"torchrun started {size} processes, but this machine has {count} CUDA devices. "
            f"Use --nproc_per_node={count}."
        )
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


def _torchruns_store(environment: Environment) -> dist.Store | None:
    """A new connection to it; None where something else than torchrun started the processes."""
    if not environment.by_torchrun:
        return None
    store, _, _ = next(iter(rendezvous("env://", timeout=MEET)))
    return store


def _rank_0s_store(environment: Environment, outer: dist.Store | None) -> dist.TCPStore:
    """The port is any free one, told through torchrun's store; without torchrun it is the one of the environment."""
    key = f"lightx2v/{environment.restart_count}/port"
    if environment.rank == 0:
        listener = socket.create_server((LOOPBACK, environment.port if outer is None else 0), backlog=128)
        port = listener.getsockname()[1]
        if outer is not None:
            outer.set(key, str(port))
        return dist.TCPStore(
            LOOPBACK, port, None, True, MEET, wait_for_workers=False, master_listen_fd=listener.detach()
        )
    if outer is None:
        return _client(environment.port)
    _wait(outer, [key], "Process 0")
    return _client(int(outer.get(key)))


def _client(port: int) -> dist.TCPStore:
    return dist.TCPStore(LOOPBACK, port, None, False, MEET, wait_for_workers=False)


def _all_are_here(store: dist.Store, rank: int, size: int) -> None:
    """From here on they can be expected to answer."""
    store.set(f"here/{rank}", "1")
    for other in range(size):
        _wait(store, [f"here/{other}"], f"Process {other}")


def _wait(store: dist.Store, keys: list[str], who: str) -> None:
    """In short looks, not in one call: that would hold back signals."""
    deadline = time.monotonic() + MEET.total_seconds()
    while not store.check(keys):
        if time.monotonic() > deadline:
            raise GroupFailed(f"{who} did not come within {MEET.total_seconds() / 60:.0f} minutes.")
        time.sleep(POLL)
