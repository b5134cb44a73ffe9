"""The environment variables that this project reads, and the way to set those that others read."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import ConfigError, quoted

INTEGERS = ("rank", "local_rank", "world_size", "local_world_size", "restart_count", "port", "profiling")
LEAST = {"WORLD_SIZE": 1, "LOCAL_WORLD_SIZE": 1, "MASTER_PORT": 1}
MOST = {"MASTER_PORT": 65535}


@dataclass(frozen=True, slots=True, kw_only=True)
class Environment:
    """The environment variables that this project reads. Libraries read theirs (HF_HOME, HF_TOKEN …) themselves."""

    models_dir: str | None = None
    model_dirs: tuple[str, ...] = ()
    """Folders to scan for models, with the system's separator of paths between them."""
    cache_dir: str | None = None
    """The folder of prebuilt files, if not below models_dir."""
    user_dir: str | None = None
    output_dir: str | None = None
    api_key: str | None = field(default=None, repr=False)
    """The keys that the HTTP server accepts, with commas between them."""
    operator_key: str | None = field(default=None, repr=False)
    """One more key, and the only one that shows and drains the workers."""
    rank: int = 0
    local_rank: int = 0
    world_size: int | None = None
    """Number of processes that torchrun started; None without it."""
    local_world_size: int | None = None
    """Number of them on this machine."""
    restart_count: int = 0
    """How often torchrun has restarted them."""
    by_torchrun: bool = False
    port: int = 29500
    """The port of their rendezvous where another launcher than torchrun started them."""
    trusted_proxies: str = ""
    """Addresses of the proxies whose X-Forwarded-For counts, with commas between them. uvicorn's own variable; uvicorn
    would trust whoever is on loopback without it."""
    profiling: int = 0
    """LightX2V's switch for the log of a Python script: 1 or 2 shows the duration of each stage."""
    visible_gpus: str | None = None
    """CUDA's own list, which the driver's tool ignores. An empty one hides every GPU."""

    @classmethod
    def read(cls, variables: Mapping[str, str] | None = None) -> Environment:
        """Read `variables`, by default those of this process. An empty variable of ours counts as not set."""
        variables = os.environ if variables is None else variables
        names = {
            "models_dir": "LIGHTX2V_MODELS_DIR",
            "cache_dir": "LIGHTX2V_CACHE_DIR",
            "user_dir": "LIGHTX2V_USER_DIR",
            "output_dir": "LIGHTX2V_OUTPUT_DIR",
            "api_key": "LIGHTX2V_API_KEY",
            "operator_key": "LIGHTX2V_OPERATOR_KEY",
            "rank": "RANK",
            "local_rank": "LOCAL_RANK",
            "world_size": "WORLD_SIZE",
            "local_world_size": "LOCAL_WORLD_SIZE",
            "restart_count": "TORCHELASTIC_RESTART_COUNT",
            "by_torchrun": "TORCHELASTIC_USE_AGENT_STORE",
            "port": "MASTER_PORT",
            "trusted_proxies": "FORWARDED_ALLOW_IPS",
            "profiling": "PROFILING_DEBUG_LEVEL",
        }
        values: dict[str, Any] = {key: variables[name] for key, name in names.items() if variables.get(name)}
        values["model_dirs"] = tuple(filter(None, variables.get("LIGHTX2V_MODEL_DIRS", "").split(os.pathsep)))
        values["by_torchrun"] = values.get("by_torchrun") == "True"
        values["visible_gpus"] = variables.get("CUDA_VISIBLE_DEVICES")
        for key in INTEGERS:
            if key in values:
                values[key] = _whole_number(names[key], values[key])
        values.setdefault("local_rank", values.get("rank", 0))
        for rank, size in (("rank", "world_size"), ("local_rank", "local_world_size")):
            if size in values and values.get(rank, 0) >= values[size]:
                raise ConfigError(
                    f"The environment variable {names[rank]} is {values[rank]} with {names[size]}={values[size]}; "
                    "expected a number below it, as processes are counted from 0. Start the processes with torchrun."
                )
        return cls(**values)

    @property
    def user_folder(self) -> Path:
        """The folder with what this user told the program once: presets, folders of models. It need not exist."""
        return Path(os.path.expanduser(self.user_dir or "~/.config/lightx2v"))

    @property
    def distributed(self) -> bool:
        """Whether this is one of several processes that work on one video."""
        return (self.world_size or 1) > 1

    @property
    def log_prefix(self) -> str:
        """The mark of this process's log lines; empty where there is one process."""
        return f"[rank {self.rank}] " if self.distributed else ""

    def use_loopback(self) -> None:
        """Let the communication libraries use loopback, whatever the machine's name resolves to: all processes are on
        one machine."""
        if sys.platform == "linux":
            for library in ("GLOO", "NCCL"):
                os.environ[f"{library}_SOCKET_IFNAME"] = "lo"


def _whole_number(name: str, text: str) -> int:
    number = int(text) if text.isascii() and text.isdecimal() and len(text) <= 6 else -1
    least, most = LEAST.get(name, 0), MOST.get(name, 999_999)
    if not least <= number <= most:
        raise ConfigError(
            f"The environment variable {name} is {quoted(text)}; expected a whole number from {least} to {most}. "
            "Correct it, or unset it."
        )
    return number


def set_variables(values: Mapping[str, str], *, replace: bool = True) -> None:
    """Set variables that libraries and child processes read; without `replace` only those that are not set yet."""
    os.environ.update({name: value for name, value in values.items() if replace or name not in os.environ})


def with_variables(values: Mapping[str, str]) -> dict[str, str]:
    """The variables of this process, with `values`: those of a process that it starts."""
    return {**os.environ, **values}
