"""Bench, the argument of every section: sizes, the device, a clock, and the results file."""

from __future__ import annotations

import gc
import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from lightx2v.models.dit import DiTConfig
from lightx2v.models.umt5_stack import UMT5Sizes
from lightx2v.models.vae_config import VAEConfig

PEAK_TFLOPS = {"H100": 989.5, "H200": 989.5}
"""Dense bf16 by the maker's data sheet."""


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """`clips` are height, width and frames."""

    dit: DiTConfig
    in_dim_i2v: int
    text: UMT5Sizes
    vae: VAEConfig
    clips: dict[str, tuple[int, int, int]]
    attention: tuple[int, ...]
    prompt: int
    few_layers: int

    def latent(self, clip: str) -> tuple[int, int, int, int]:
        height, width, frames = self.clips[clip]
        return 16, (frames - 1) // 4 + 1, height // 8, width // 8

    def tokens(self, clip: str) -> int:
        _, frames, height, width = self.latent(clip)
        return frames * (height // 2) * (width // 2)


FULL = Sizes(
    dit=DiTConfig(),
    in_dim_i2v=36,
    text=UMT5Sizes(vocab=256384, width=4096, heads=64, head_dim=64, ffn=10240, layers=24, buckets=32),
    vae=VAEConfig(),
    clips={"480p": (480, 832, 81), "720p": (720, 1280, 81)},
    attention=(14_040, 32_760, 75_600),
    prompt=100,
    few_layers=8,
)
TINY = Sizes(
    dit=DiTConfig(dim=64, ffn_dim=96, num_heads=2, num_layers=4, text_dim=32, text_len=64),
    in_dim_i2v=36,
    text=UMT5Sizes(vocab=400, width=32, heads=2, head_dim=16, ffn=48, layers=2, buckets=32),
    vae=VAEConfig(dim=8, res_blocks=1),
    clips={"480p": (32, 48, 5), "720p": (48, 64, 5)},
    attention=(48, 96),
    prompt=7,
    few_layers=2,
)


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What the command line says about presets: which of them, at the size of which clip, on how many GPUs, from models
    that are kept in `models`, with all their steps; and `again` although they are in the results."""

    presets: tuple[str, ...] = ()
    clip: str = ""
    gpus: int = 1
    models: Path | None = None
    whole: bool = False
    again: bool = False


class Bench:
    def __init__(self, section: str, results: Path, *, tiny: bool, wanted: Wanted | None = None) -> None:
        self.section, self.results, self.tiny = section, results, tiny
        self.wanted = wanted or Wanted()
        self.sizes = TINY if tiny else FULL
        self.device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
        self.compute = torch.bfloat16 if self.cuda else torch.float32
        self.device_name = torch.cuda.get_device_name(0) if self.cuda else platform.processor() or "CPU"

    @property
    def cuda(self) -> bool:
        return self.device.type == "cuda"

    @property
    def peak_tflops(self) -> float | None:
        return next((peak for name, peak in PEAK_TFLOPS.items() if name in self.device_name), None)

    def write(self, name: str, **numbers: Any) -> None:
        """Append one line: what was measured, where and when."""
        at = datetime.now(UTC).strftime("%Y-%m-%d %H:%M")
        line = {"section": self.section, "name": name, **numbers, "at": at, "device": self.device_name}
        with self.results.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line | ({"tiny": True} if self.tiny else {})) + "\n")
        print(f"{self.section:10} {name:44} {_brief(numbers)}", flush=True)

    def measured(self, key: str) -> set[str]:
        """The values of `key` in this section's results; empty with --again."""
        if self.wanted.again or not self.results.exists():
            return set()
        lines = map(json.loads, self.results.read_text("utf-8").splitlines())
        return {line[key] for line in lines if line["section"] == self.section and key in line}

    def timed(self, call: Callable[[], object], repeats: int, *, warm_up: int = 1) -> dict[str, Any]:
        """Median, smallest and largest seconds of a call, measured with the device's clock if it has one."""
        for _ in range(warm_up):
            call()
        taken = []
        for _ in range(1 if self.tiny else repeats):
            if self.cuda:
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                start.record()
                call()
                end.record()
                end.synchronize()
                taken.append(start.elapsed_time(end) / 1000)
            else:
                began = time.perf_counter()
                call()
                taken.append(time.perf_counter() - began)
        return {"seconds": statistics.median(taken), "least": min(taken), "most": max(taken), "repeats": len(taken)}

    def rate(self, flops: float, seconds: float) -> dict[str, float]:
        tflops = flops / seconds / 1e12
        return {"tflops": tflops} | ({"of_peak": tflops / self.peak_tflops} if self.peak_tflops else {})

    @contextmanager
    def peak(self) -> Iterator[dict[str, int]]:
        """Measure the peak device memory in bytes inside the `with`."""
        found: dict[str, int] = {}
        if self.cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        yield found
        if self.cuda:
            torch.cuda.synchronize()
            found["peak_allocated"] = torch.cuda.max_memory_allocated()
            found["peak_reserved"] = torch.cuda.max_memory_reserved()

    @contextmanager
    def readings(self, *columns: str) -> Iterator[list[list[float]]]:
        """Read nvidia-smi ten times a second inside the `with`; without nvidia-smi, no readings."""
        found: list[list[float]] = []
        if not self.cuda:
            yield found
            return
        card = os.environ.get("CUDA_VISIBLE_DEVICES", "0").partition(",")[0]
        query = ["nvidia-smi", "-i", card, f"--query-gpu={','.join(columns)}", "--format=csv,noheader,nounits"]
        process = subprocess.Popen([*query, "-lms", "100"], stdout=subprocess.PIPE, text=True)
        try:
            yield found
        finally:
            process.terminate()
            for line in process.communicate()[0].splitlines():
                with suppress(ValueError):  # cut off, or "N/A"
                    values = [float(value) for value in line.split(",")]
                    found += [values] if len(values) == len(columns) else []

    @contextmanager
    def clock(self) -> Iterator[dict[str, float]]:
        """The device's clock (MHz) and power (W) inside the `with`: medians of at least three readings."""
        found: dict[str, float] = {}
        with self.readings("clocks.sm", "power.draw.instant") as lines:
            yield found
        if len(lines) >= 3:
            found["clock_mhz"], found["watts"] = (statistics.median(column) for column in zip(*lines, strict=True))

    def clear(self) -> None:
        gc.collect()
        if self.cuda:
            torch.cuda.empty_cache()


def environment() -> dict[str, Any]:
    found: dict[str, Any] = {"python": platform.python_version(), "torch": torch.__version__}
    for package in ("triton", "transformers", "diffusers"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    if torch.cuda.is_available():
        found |= {"cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}
        found["memory"] = torch.cuda.get_device_properties(0).total_memory
    return found


def forward_flops(config: DiTConfig, tokens: int) -> float:
    """FLOPs of one forward's blocks, without the text's keys and values, which are computed once for all steps."""
    dim, ffn = config.dim, config.ffn_dim
    linears = tokens * (12 * dim * dim + 4 * dim * ffn)
    attention = 4 * tokens * dim * (tokens + config.text_len)
    return config.num_layers * (linears + attention)


def _brief(numbers: dict[str, Any]) -> str:
    return "  ".join(
        f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in numbers.items()
    )
