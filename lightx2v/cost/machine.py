"""The machine's memory (free and total) and cores, read with nvidia-smi and psutil. Needs no torch."""

import os
import platform
import re
import subprocess
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import psutil

from ..config.environment import Environment

FRESH_SECONDS = 3.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """Memory in bytes. The vram values are None without an NVIDIA GPU."""

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
    """Returns the machine, read again at most every few seconds."""

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
        free, total = host_memory()
        gpu = _gpu() if self._has_gpu else None
        self._has_gpu = gpu is not None
        # In a container psutil counts the host's cores; this program may use those of its affinity.
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        name, vram_free, vram_total = gpu or (_cpu_name(), None, None)
        return Machine(
            name=name, cores=cores, ram_free=free, ram_total=total, vram_free=vram_free, vram_total=vram_total
        )


def gpu_count() -> int:
    """The NVIDIA GPUs that are visible to this process."""
    visible = Environment.read().visible_gpus
    if visible is not None:
        return 0 if visible in ("", "-1") else len(visible.split(","))
    try:
        done = subprocess.run(["nvidia-smi", "--list-gpus"], capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return 0
    return sum(line.startswith("GPU ") for line in done.stdout.splitlines()) if done.returncode == 0 else 0


def _gpu() -> tuple[str, int, int] | None:
    """Name, free and total bytes of the first GPU that is visible to this process."""
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
        match = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    except OSError:
        match = None
    name = match[1] if match else platform.processor() or platform.machine() or "CPU"
    name = re.sub(r"\((R|TM)\)|CPU|Processor|[0-9]+-Core|@.*", "", name)
    return " ".join(name.split())[:32]


def host_memory() -> tuple[int, int]:
    """Free and total bytes of host memory for this program: the system's, or its container's where that has a limit."""
    system = psutil.virtual_memory()  # in a container it shows the host's memory
    try:
        limit, used = (int(Path(f"/sys/fs/cgroup/memory.{name}").read_text()) for name in ("max", "current"))
    except (OSError, ValueError):  # no cgroup, or "max"
        return system.available, system.total
    if limit >= system.total:
        return system.available, system.total
    return min(system.available, max(0, limit - used)), limit
