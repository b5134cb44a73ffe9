"""FarmOptions: how many replicas run the jobs, and where: the flags --replicas, --gpus_per_replica and --ray."""

import argparse
import importlib.util
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Self

from ..config.environment import Environment
from ..cost.machine import gpu_count
from ..errors import ConfigError, quoted

MOST = 1024
"""The most replicas, and GPUs of one."""
INSTALL = 'pip install "lightx2v-studio[farm]"   (or, in a checkout: pip install -r requirements-farm.txt)'


@dataclass(frozen=True, slots=True, kw_only=True)
class FarmOptions:
    """From `low` to `high` replicas of `gpus` GPUs each; on a machine without GPUs, of as many processes. `low` None is
    "auto": all that there is room for. `address` is that of a Ray cluster; "" is this machine alone."""

    low: int | None = 1
    high: int = 1
    gpus: int = 1
    address: str = ""

    @classmethod
    def of(cls, options: argparse.Namespace, environment: Environment) -> Self | None:
        """What the flags ask for; None where the engine of this process is enough. ConfigError where they do not fit
        together or to this machine, or where Ray is missing."""
        low, high = options.replicas
        gpus, address = options.gpus_per_replica, options.ray
        if not address:
            if (low, high, gpus) != (1, 1, 1):  # the driver's tool takes a while: nobody else waits for it
                low, high = _on_this_machine(low, high, gpus)
            if high == gpus == 1:
                return None
        if environment.distributed:
            raise ConfigError(
                "torchrun has started this program, and --replicas, --gpus_per_replica and --ray start processes of "
                "their own. Start it without torchrun, or without these flags."
            )
        if importlib.util.find_spec("ray") is None:
            raise ConfigError(f"Several replicas need the package ray. Install it with: {INSTALL}")
        return cls(low=low, high=high, gpus=gpus, address=address)

    @property
    def scales(self) -> bool:
        """Whether the number of replicas follows the work that waits."""
        return self.low is not None and self.low < self.high


def add_farm_flags(add: Callable[..., Any]) -> None:
    add(
        "--replicas",
        type=_replicas,
        default=(1, 1),
        metavar="N",
        help="workers that each run one job: a number, auto (one for each GPU), or A:B (as many as the waiting jobs "
        "need; default: 1)",
    )
    add("--gpus_per_replica", type=_count, default=1, metavar="G", help="GPUs that share each video (default: 1)")
    add("--ray", default="", metavar="ADDRESS", help="use the machines of this Ray cluster, e.g. auto or head:6379")


def _on_this_machine(low: int | None, high: int, gpus: int) -> tuple[int, int]:
    """The numbers of replicas for this machine, "auto" resolved."""
    found = gpu_count()
    if found % gpus and low is None or found and found < gpus:
        raise ConfigError(
            f"This machine has {found} GPUs, which do not make groups of {gpus}. Choose another --gpus_per_replica."
        )
    room = found // gpus if found else 1
    if low is None:
        return room, room
    if found and high > room:
        raise ConfigError(
            f"--replicas asks for {high} workers with {gpus} GPU{'s' * (gpus > 1)} each, and this machine has {found}. "
            f"Use at most {room}, or --replicas auto."
        )
    return low, high


def _replicas(text: str) -> tuple[int | None, int]:
    """ "auto" is (None, MOST), N is (N, N), A:B is (A, B)."""
    if text == "auto":
        return None, MOST
    if (match := re.fullmatch(r"([0-9]{1,4})(?::([0-9]{1,4}))?", text)) is None:
        raise argparse.ArgumentTypeError(f"{quoted(text)} is no number of replicas; expected auto, N or A:B")
    low, high = int(match[1]), int(match[2] or match[1])
    if not 1 <= low <= high <= MOST:
        raise argparse.ArgumentTypeError(f"expected numbers from 1 to {MOST}, the smaller one first")
    return low, high


def _count(text: str) -> int:
    value = int(text)
    if not 1 <= value <= MOST:
        raise argparse.ArgumentTypeError(f"expected a number from 1 to {MOST}")
    return value
