"""The environment variables that this project reads."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class Environment:
    """The environment variables that this project reads. Libraries read theirs (HF_HOME, HF_TOKEN …) themselves."""

    models_dir: str | None = None
    cache_dir: str | None = None
    """Where files go that can be made again, if not below models_dir."""
    output_dir: str | None = None
    api_key: str | None = field(default=None, repr=False)
    """What the HTTP server's clients show, several with commas between."""
    rank: int = 0
    local_rank: int = 0
    world_size: int | None = None
    """Number of processes that torchrun started, None without it."""
    local_world_size: int | None = None
    """How many of them are on this machine."""
    restart_count: int = 0
    """How often torchrun has started them again."""
    by_torchrun: bool = False
    port: int = 29500
    """Where they meet if they were started by something else."""
    profiling: int = 0
    """LightX2V's switch for the log of a Python script: with 1 or 2 it shows what each stage took."""
    visible_gpus: str | None = None
    """CUDA's own list, which the driver's tool does not heed; an empty one means none."""

    @classmethod
    def read(cls, variables: Mapping[str, str] | None = None) -> Environment:
        """From `variables`, by default those of this process. An empty one of ours counts as not set."""
        variables = os.environ if variables is None else variables
        names = {
            "models_dir": "LIGHTX2V_MODELS_DIR",
            "cache_dir": "LIGHTX2V_CACHE_DIR",
            "output_dir": "LIGHTX2V_OUTPUT_DIR",
            "api_key": "LIGHTX2V_API_KEY",
            "rank": "RANK",
            "local_rank": "LOCAL_RANK",
            "world_size": "WORLD_SIZE",
            "local_world_size": "LOCAL_WORLD_SIZE",
            "restart_count": "TORCHELASTIC_RESTART_COUNT",
            "by_torchrun": "TORCHELASTIC_USE_AGENT_STORE",
            "port": "MASTER_PORT",
            "profiling": "PROFILING_DEBUG_LEVEL",
        }
        found: dict[str, Any] = {key: variables[name] for key, name in names.items() if variables.get(name)}
        found["by_torchrun"] = found.get("by_torchrun") == "True"
        found["visible_gpus"] = variables.get("CUDA_VISIBLE_DEVICES")
        for key in ("rank", "local_rank", "world_size", "local_world_size", "restart_count", "port", "profiling"):
            if key in found:
                if not found[key].isdecimal() or len(found[key]) > 6:
                    raise ConfigError(
                        f"The environment variable {names[key]} is {found[key]!r}; expected a whole number."
                    )
                found[key] = int(found[key])
        found.setdefault("local_rank", found.get("rank", 0))
        return cls(**found)

    @property
    def distributed(self) -> bool:
        """Whether this is one of several processes that work on one video."""
        return (self.world_size or 1) > 1

    @property
    def log_prefix(self) -> str:
        """What marks this process's log lines; nothing where it is alone."""
        return f"[rank {self.rank}] " if self.distributed else ""

    def use_loopback(self) -> None:
        """The processes are on one machine and talk over loopback, whatever its name resolves to."""
        if sys.platform == "linux":
            for library in ("GLOO", "NCCL"):
                os.environ[f"{library}_SOCKET_IFNAME"] = "lo"
