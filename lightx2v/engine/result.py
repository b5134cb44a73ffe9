"""Result: the video that a finished run returns, and its report as plain JSON."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ..config.engine_config import EngineConfig
from ..config.request import Request
from ..config.schedule import schedule_of
from ..progress import Peak, Timings, WeightsRead

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """One video. `original_path` is its file without interpolation, where that is kept. `frames` (uint8, T H W C) and
    `latents` (float32, C T h w, before the VAE) only if requested.

    `request` is the one that ran, with the seed that was drawn. `height` and `width` are those of the video, which an
    input image may have decided. `attention` tells which backend ran and why, `loras` what each LoRA file changed,
    `files` the model's files, `plan` where the weights lived (None where there was nothing to plan), `processes` what
    each of several took. An earlier process did the first `resumed_after` denoising steps: `timings` has only what
    this one did. `forwards` counts those of the whole video that were computed and skipped. `load` tells how the
    weights were read, also if that was for an earlier run.
    """

    path: str | None
    original_path: str | None = None
    frames: np.ndarray | None
    latents: Tensor | None
    request: Request
    config: EngineConfig
    height: int
    width: int
    device: str
    attention: dict[str, str]
    timings: Timings
    text_tokens: dict[str, int]
    preset: str = ""
    file_bytes: int | None = None
    loras: tuple[dict[str, Any], ...] = ()
    files: tuple[dict[str, Any], ...] = ()
    plan: dict[str, Any] | None = None
    warnings: tuple[str, ...] = ()
    processes: tuple[dict[str, Any], ...] = ()
    resumed_after: int = 0
    forwards: dict[str, int] = field(default_factory=dict)
    load: WeightsRead = WeightsRead()

    @property
    def seed(self) -> int:
        return self.request.seed

    @property
    def peak_vram(self) -> dict[str, Peak] | None:
        """Peak per stage; None without CUDA."""
        return self.timings.peak_vram

    @property
    def peak_rss(self) -> int:
        return self.timings.peak_rss

    def report(self) -> dict[str, Any]:
        """Everything except the pixels, as JSON types, for the page and the server."""
        return {
            "path": self.path,
            "original_path": self.original_path,
            "preset": self.preset,
            "seed": self.seed,
            "height": self.height,
            "width": self.width,
            "frames": self.request.video_frames,
            "fps": self.request.video_fps,
            "sampler": self.request.solver,
            "phases": schedule_of(self.request).to_json(),
            "file_bytes": self.file_bytes,
            "device": self.device,
            "attention": self.attention,
            "text_tokens": self.text_tokens,
            "timings": self.timings.to_json(),
            "processes": list(self.processes),
            "resumed_after": self.resumed_after,
            "forwards": self.forwards,
            "load": self.load.to_json(),
            "loras": list(self.loras),
            "files": list(self.files),
            "plan": self.plan,
            "warnings": list(self.warnings),
            "request": self.request.to_json(),
            "config": self.config.to_json(),
        }
