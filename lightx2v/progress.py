"""What a run tells while it runs, and the only place where time and memory are measured.

`Progress` is one event, `CancelToken` is how somebody stops a run, `Meter` times the stages and reads the peaks.
The page, the command line, the server and the benchmarks all show numbers that come from here.
"""

from __future__ import annotations

import logging
import resource
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from .errors import Cancelled

log = logging.getLogger("lightx2v.progress")

STAGES = ("download", "load", "text", "image", "denoise", "decode", "write")
"""The stages of a run in their order."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """One event. `step` of `total` inside `stage` is done; `seconds` since the run began; `eta` seconds left in the run.

    `expert` is "high" or "low" while denoising. `vram_peak` is in bytes, None without CUDA. `preview` returns a small
    uint8 (H, W, 3) picture of the latents when called; it costs nothing until somebody calls it.
    """

    stage: str
    step: int = 0
    total: int = 0
    expert: str | None = None
    seconds: float = 0.0
    eta: float | None = None
    vram_peak: int | None = None
    message: str = ""
    preview: Callable[[], Any] | None = field(default=None, compare=False, repr=False)


OnProgress = Callable[[Progress], None]


class CancelToken:
    """A flag that another thread may set; the engine calls `check` between steps, blocks and VAE chunks."""

    def __init__(self) -> None:
        self._event = threading.Event()

    def cancel(self) -> None:
        self._event.set()

    @property
    def cancelled(self) -> bool:
        return self._event.is_set()

    def check(self) -> None:
        """Raises Cancelled once `cancel` was called."""
        if self._event.is_set():
            raise Cancelled("The run was cancelled.")


def peak_rss() -> int:
    """Largest resident memory of this process so far, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
