"""Rendezvous: the processes of a program connect to each other, once, on one machine, over loopback.

torchrun's own store listens on every interface. So only heartbeats and the signed news of a failure go through it: it
outlives every rank. Commands, the secret that signs, and the addresses with which the groups of torch.distributed
connect go through a store in rank 0 that listens on 127.0.0.1.
"""

import atexit
import functools
import logging
import os
import secrets
import socket
import time
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from ..config.environment import Environment
from ..errors import ConfigError, GroupFailed
from .heartbeat import Heartbeat
from .process_group import POLL, ProcessGroup

log = logging.getLogger("lightx2v.parallel")

TIMEOUT = timedelta(minutes=30)
"""Longest duration of one exchange. `Heartbeat` notices failures within seconds; this is the last resort."""
CONNECT = timedelta(minutes=5)
LOOPBACK = "127.0.0.1"


@functools.cache
def join(environment: Environment) -> ProcessGroup:
    """Connect to the other processes: NCCL on GPUs, gloo on CPUs and for small messages."""
    rank, size = environment.rank, environment.world_size or 1
    device = _device(environment)
    environment.use_loopback()
    torchruns = _torchruns_store(environment)
    rank0s = _rank0s_store(environment, torchruns)
    # The heartbeat has a connection of its own, so that it never waits for this thread's calls.
    for_heartbeat = _torchruns_store(environment) or _client(rank0s.port)
    pids, secret = _meet(rank0s, rank, size)
    signals = dist.PrefixStore(f"lightx2v/{environment.restart_count}/heartbeat", for_heartbeat)
    heartbeat = Heartbeat(signals, rank, pids, secret)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    store = dist.PrefixStore("group", rank0s)
    try:
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=TIMEOUT)
    except RuntimeError as error:
        reason = str(error).partition("\n")[0]
        raise GroupFailed(
            f"Process {rank} cannot connect to the others ({reason}): one of them has ended. See its output for why."
        ) from None
    log.info("Process %d of %d is on %s.", rank, size, device)
    group = ProcessGroup(device, dist.PrefixStore("lightx2v", rank0s), heartbeat)
    atexit.register(group.close)
    return group


def _device(environment: Environment) -> torch.device:
    """This process's device. ConfigError if there are more processes than devices, or several machines."""
    size, local_rank = environment.world_size or 1, environment.local_rank
    if environment.local_world_size not in (None, size):
        raise ConfigError(
            f"{size} processes were started, but only {environment.local_world_size} of them on this machine. All "
            "processes of one video must run on one machine; start a separate group on each machine."
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
    """A new connection to torchrun's store; None if another launcher started the processes."""
    if not environment.by_torchrun:
        return None
    store, _, _ = next(iter(rendezvous("env://", timeout=CONNECT)))
    return store


def _rank0s_store(environment: Environment, torchruns: dist.Store | None) -> dist.TCPStore:
    """Any free port, announced in torchrun's store; without torchrun, the port from the environment."""
    key = f"lightx2v/{environment.restart_count}/port"
    if environment.rank == 0:
        listener = socket.create_server((LOOPBACK, environment.port if torchruns is None else 0), backlog=128)
        port = listener.getsockname()[1]
        if torchruns is not None:
            torchruns.set(key, str(port))
        return dist.TCPStore(
            LOOPBACK, port, None, True, CONNECT, wait_for_workers=False, master_listen_fd=listener.detach()
        )
    if torchruns is None:
        return _client(environment.port)
    _wait(torchruns, [key], "Process 0")
    return _client(int(torchruns.get(key)))


def _client(port: int) -> dist.TCPStore:
    return dist.TCPStore(LOOPBACK, port, None, False, CONNECT, wait_for_workers=False)


def _meet(store: dist.Store, rank: int, size: int) -> tuple[list[int], bytes]:
    """Wait for all processes; from here on each must answer. Returns their ids and a secret of this run."""
    if rank == 0:
        store.set("secret", secrets.token_hex(32))
    store.set(f"pid/{rank}", str(os.getpid()))
    for other in range(size):
        _wait(store, [f"pid/{other}"], f"Process {other}")
    return [int(store.get(f"pid/{other}")) for other in range(size)], store.get("secret")


def _wait(store: dist.Store, keys: list[str], who: str) -> None:
    """Poll: one long call would hold back signals."""
    deadline = time.monotonic() + CONNECT.total_seconds()
    while not store.check(keys):
        if time.monotonic() > deadline:
            raise GroupFailed(
                f"{who} did not connect within {CONNECT.total_seconds() / 60:.0f} minutes. Start all processes anew."
            )
        time.sleep(POLL)
