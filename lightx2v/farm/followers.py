"""Followers: the other processes of a group of GPUs, which a Worker starts on its machine and which end with it.

The worker is rank 0 of the group that `parallel/` makes. Where one process fails, all end, the worker too; then Ray
reports its end, and another worker starts a new group.
"""

import os
import socket
import subprocess
import sys

from ..config.environment import set_variables, with_variables

LOOPBACK = "127.0.0.1"


def start_followers(size: int) -> None:
    """Start ranks 1 to `size` - 1, and make this process rank 0. Call it before torch is used, in a thread that stays:
    the system ends the followers with the thread that started them."""
    if size == 1:
        return
    with socket.create_server((LOOPBACK, 0)) as probe:
        port = probe.getsockname()[1]
    whole = {"WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, "MASTER_ADDR": LOOPBACK, "MASTER_PORT": port}
    for rank in range(size):
        variables = {name: str(value) for name, value in ({"RANK": rank, "LOCAL_RANK": rank} | whole).items()}
        if rank == 0:
            set_variables(variables)
        else:
            subprocess.Popen(
                [sys.executable, "-m", "lightx2v.farm.follower"],
                env=with_variables(variables | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}),
                stdin=subprocess.PIPE,  # closes with this process
            )
