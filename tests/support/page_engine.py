"""An engine for the page's tests: draws a small moving scene instead of running a model.

It reports progress and previews as the real one does, so the whole page works without weights. Words in the prompt
control it: "slow" slows each step, "endless" never ends, "held" waits after its first step until it is released,
"too large" runs out of memory, "broken" raises an unexpected error.
"""

from __future__ import annotations

import json
import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lightx2v.config.engine_config import EngineConfig
from lightx2v.config.recorded_settings import recorded_settings
from lightx2v.config.request import Request
from lightx2v.config.schedule import schedule_of
from lightx2v.engine.result import Result
from lightx2v.errors import OutOfMemory
from lightx2v.media.video_writer import VideoWriter
from lightx2v.progress import CancelToken, Meter, OnProgress, Progress, Timings
from lightx2v.step_file import StepStore


@dataclass
class Painter:
    """Opens engines. A step takes `step_seconds`, a slow one `slow_seconds`; events go to the file `log`."""

    log: Path | None = None
    step_seconds: float = 0.01
    slow_seconds: float = 0.6
    load_seconds: float = 0.02
    device: str = "cpu"

    def note(self, event: str, **what: object) -> None:
        if self.log is not None:
            with self.log.open("a") as file:
                file.write(json.dumps({"event": event, "at": time.time(), **what}) + "\n")

    def may_go_on(self, prompt: str) -> bool:
        return self.log is None or self.log.with_name(f"{prompt}.go").exists()

    def __call__(
        self,
        config: EngineConfig,
        *,
        preset: str,
        on_progress: OnProgress | None = None,
        cancel: CancelToken | None = None,
        **_: object,
    ) -> PaintingEngine:
        if on_progress is not None:
            on_progress(Progress(stage="load", step=0, total=1))
        _sleep(self.load_seconds, cancel or CancelToken())
        self.note("open", preset=preset)
        return PaintingEngine(self, config, preset)


class PaintingEngine:
    def __init__(self, painter: Painter, config: EngineConfig, preset: str) -> None:
        self.painter, self.config, self.preset = painter, config, preset

    def run(
        self,
        request: Request,
        *,
        save_result_path: Path | None = None,
        on_progress: OnProgress,
        cancel: CancelToken,
        metadata: bool = True,
        force: bool = False,
        steps: StepStore | None = None,
        return_frames: bool = False,
    ) -> Result:
        self.painter.note("begin", prompt=request.prompt, request=request.to_json())
        try:
            return self._run(request, save_result_path, on_progress, cancel)
        finally:
            self.painter.note("end", prompt=request.prompt)

    def _run(self, request: Request, path: Path | None, on_progress: OnProgress, cancel: CancelToken) -> Result:
        meter = Meter("cpu", on_progress)
        slow = self.painter.slow_seconds if "slow" in request.prompt else self.painter.step_seconds
        pace = 600.0 if "endless" in request.prompt else slow
        frames = paint(request)
        with meter.stage("text"):
            meter.emit("text", 0, 1)
            _sleep(pace / 4, cancel)
            meter.emit("text", 1, 1)
        if request.task != "t2v":
            with meter.stage("image"):
                _sleep(pace / 3, cancel)
                meter.emit("image", 1, 1)
        high = schedule_of(request).high_noise_steps
        with meter.stage("denoise"):
            for step in range(request.steps):
                _sleep(pace, cancel)
                if "broken" in request.prompt:
                    raise RuntimeError(f"secret detail in {__file__}")
                if "too large" in request.prompt and request.area > 64 * 64:
                    raise OutOfMemory("The GPU ran out of memory while denoising. Choose a smaller size or offload.")
                noisy = noised(frames[len(frames) // 2], 1 - (step + 1) / request.steps, request.seed)
                expert = "high" if step < high else "low"
                meter.emit("denoise", step + 1, request.steps, expert, preview=lambda picture=noisy: picture)
                while "held" in request.prompt and not step and not self.painter.may_go_on(request.prompt):
                    _sleep(0.02, cancel)
        with self._file(path, request) as writer, meter.stage("decode"):
            for start in range(0, len(frames), 4):
                _sleep(pace / 8, cancel)
                meter.emit("decode", start, len(frames))
                if writer is not None:
                    with meter.stage("write"):
                        writer.write(frames[start : start + 4])
        return self._result(request, path, frames, meter.report())

    def _file(self, path: Path | None, request: Request) -> AbstractContextManager[VideoWriter | None]:
        if path is None:
            return nullcontext()
        return VideoWriter(
            path,
            request.width,
            request.height,
            request.fps,
            settings=recorded_settings(self.preset, self.config, request, path),
        )

    def _result(self, request: Request, path: Path | None, frames: np.ndarray, timings: Timings) -> Result:
        return Result(
            path=str(path), frames=None if path else frames, latents=None, request=request, config=self.config,
            height=request.height, width=request.width, device=self.painter.device, preset=self.preset,
            text_tokens={"prompt": 14},
            attention={"self": "torch_sdpa", "cross": "torch_sdpa", "reason": "fastest correct here"}, timings=timings,
            file_bytes=path.stat().st_size if path else None,
        )  # fmt: skip

    def exchange(self, config: EngineConfig, **_: object) -> bool:
        return False

    def release(self) -> None:
        self.close()

    def close(self) -> None:
        self.painter.note("close", preset=self.preset)


def paint(request: Request) -> np.ndarray:
    """A ball that bounces over a striped sea at sunset; seed and prompt choose colours. (T, H, W, 3) uint8."""
    chance = np.random.default_rng(request.seed + sum(map(ord, request.prompt)))
    hue = chance.uniform(0, 1, 3)
    height, width = request.height, request.width
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    y, x = y / height, x / height
    wide = width / height
    sky = np.stack([0.95 - 0.5 * y * hue[0], 0.75 - 0.35 * y, 0.55 + 0.4 * y * hue[2]], -1)
    pictures = []
    for t in range(request.frames):
        phase = t / max(1, request.frames - 1)
        picture = sky.copy()
        ground = y > 0.66 + 0.012 * np.sin(9 * x + 6.28 * phase)
        waves = 0.05 * np.sin(60 * y + 4 * x + 6.28 * phase)[..., None]
        picture[ground] = (np.array([0.15 + 0.2 * hue[1], 0.42, 0.55]) + waves)[ground]
        cx, cy = wide * (0.15 + 0.7 * phase), 0.55 - 0.28 * abs(np.sin(6.28 * phase))
        distance = np.hypot(x - cx, y - cy)
        shade = (1.05 - 1.3 * np.hypot(x - cx + 0.05, y - cy + 0.05))[..., None]
        ball = np.clip(np.array([0.95, 0.25 + 0.5 * hue[1], 0.2 + 0.5 * hue[0]]) * shade, 0, 1)
        edge = np.clip((0.13 - distance) * height / 2, 0, 1)[..., None]
        pictures.append(picture * (1 - edge) + ball * edge)
    return (np.clip(np.stack(pictures), 0, 1) * 255).astype(np.uint8)


def noised(picture: np.ndarray, amount: float, seed: int) -> np.ndarray:
    """The picture at an eighth of its size with noise, like a latent preview."""
    small = picture[::8, ::8].astype(np.float32)
    noise = np.random.default_rng(seed).normal(128, 60, small.shape)
    return np.clip(small * (1 - amount) + noise * amount, 0, 255).astype(np.uint8)


def _sleep(seconds: float, cancel: CancelToken) -> None:
    deadline = time.monotonic() + seconds
    while (left := deadline - time.monotonic()) > 0:
        cancel.check()
        time.sleep(min(left, 0.02))
    cancel.check()
