"""What the machine has and what of it is free, without importing torch: the driver's tool, and psutil."""

from __future__ import annotations

import gc
import os
import platform
import re
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import psutil

from ..config.environment import Environment

FRESH_SECONDS = 3.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """Bytes of memory; the vram values are None without an NVIDIA GPU."""

    name: str
    cores: int
    ram_free: int
    ram_total: int
    vram_free: int | None = None
    vram_total: int | None = None

    @property
    def gpu(self) -> bool:
        return self.vram_total is not None


class MachineReader:
    """Reads at most every few seconds, whoever asks."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._last: Machine | None = None
        self._at = 0.0
        self._has_gpu = True

    def __call__(self) -> Machine:
        with self._lock:
            if self._last is None or time.monotonic() - self._at > FRESH_SECONDS:
                self._last, self._at = self._read(), time.monotonic()
            return self._last

    def _read(self) -> Machine:
        ram = psutil.virtual_memory()
        # In a container psutil shows the host's memory and cores; what we may use is what counts.
        free, total = _container_memory(ram.available, ram.total)
        gpu = _gpu() if self._has_gpu else None
        self._has_gpu = gpu is not None
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        name, vram_free, vram_total = gpu or (_cpu_name(), None, None)
        return Machine(
            name=name, cores=cores, ram_free=free, ram_total=total, vram_free=vram_free, vram_total=vram_total
        )


def free_memory() -> None:
    """Gives what nothing refers to any more back, on the device too if there is one in use."""
    gc.collect()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def _gpu() -> tuple[str, int, int] | None:
    """Name, free and total bytes of the first GPU that this process may use."""
    visible = Environment.read().visible_gpus
    if visible in ("", "-1"):
        return None
    first = (visible or "0").split(",")[0].strip()
    command = [
        "nvidia-smi",
        f"--id={first}",
        "--query-gpu=name,memory.free,memory.total",
        "--format=csv,noheader,nounits",
    ]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=5, check=False)
        name, free, total = done.stdout.strip().splitlines()[0].rsplit(",", 2)
        return name.strip().removeprefix("NVIDIA "), int(free) * 2**20, int(total) * 2**20
    except (OSError, subprocess.TimeoutExpired, ValueError, IndexError):
        return None


def _cpu_name() -> str:
    try:
        found = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    except OSError:
        found = None
    name = found[1] if found else platform.processor() or platform.machine() or "CPU"
    name = re.sub(r"\((R|TM)\)|CPU|Processor|\d+-Core|@.*", "", name)
    return " ".join(name.split())[:32]


def _container_memory(free: int, total: int) -> tuple[int, int]:
    try:
        limit = int(Path("/sys/fs/cgroup/memory.max").read_text())
        used = int(Path("/sys/fs/cgroup/memory.current").read_text())
    except (OSError, ValueError):  # no limit, or no cgroup
        return free, total
    return (min(free, max(0, limit - used)), limit) if limit < total else (free, total)


def free_ram() -> int:
    """Host memory that a program may still take: what the system has, or its container."""
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            lines = dict(line.split(":", 1) for line in file)
        free = int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        try:
            return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") * 3 // 4
        except (AttributeError, OSError, ValueError):
            return 16 * 2**30
    try:
        group = Path("/sys/fs/cgroup")
        limit, used = ((group / f"memory.{name}").read_text().strip() for name in ("max", "current"))
        return min(free, max(0, int(limit) - int(used)))
    except (OSError, ValueError):  # no container, or "max"
        return free
