"""An engine without a model: does what a script says, step by step, and writes a tiny real mp4.

    garage = Garage()
    garage.script["storm"] = Script(error=RuntimeError("broken"), at=("denoise", 2))
    manager = JobManager(garage, folder)

`Garage` is what JobManager calls to open an engine; it records what was opened, closed and run. A request whose
prompt has no script runs four quick steps and succeeds.
"""

from __future__ import annotations

import threading
import time
import weakref
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from lightx2v.config.engine_config import EngineConfig
from lightx2v.config.request import Request
from lightx2v.errors import NumericsError
from lightx2v.media.video_writer import VideoWriter
from lightx2v.progress import CancelToken, Meter, OnProgress, Timings
from lightx2v.step_file import StepStore

STAGES = ("text", "denoise", "decode", "write")


@dataclass(kw_only=True)
class Script:
    """What one run does. `at` is the (stage, step) where `error` is raised, NaN is found or `hold` is waited for."""

    steps: int = 4
    seconds: float = 0.0
    at: tuple[str, int] = ("denoise", 2)
    error: BaseException | None = None
    nan: bool = False
    hold: threading.Event | None = None
    ignore_cancel: bool = False
    preview: Any = None
    saves: bytes | None = None
    """The step that the run has saved when it comes to `at`."""
    output: bytes | None = None
    """The bytes to write instead of a video; b"" leaves no file."""


@dataclass(frozen=True)
class FakeResult:
    path: str
    request: Request
    timings: Timings

    def report(self) -> dict[str, Any]:
        return {
            "path": self.path,
            "seed": self.request.seed,
            "height": self.request.height,
            "width": self.request.width,
            "timings": self.timings.to_json(),
            "request": self.request.to_json(),
        }


class Weights:
    """Stands for gigabytes: tests look whether it is still alive."""


@dataclass
class Garage:
    """Opens engines for JobManager. `alive` counts those that are open, `most` the largest number at one time."""

    script: dict[str, Script] = field(default_factory=dict)
    open_error: BaseException | None = None
    open_seconds: float = 0.0
    opened: list[EngineConfig] = field(default_factory=list)
    ran: list[str] = field(default_factory=list)
    went_on_from: list[bytes | None] = field(default_factory=list)
    save_every: list[float] = field(default_factory=list)
    running: int = 0
    most_running: int = 0
    alive: int = 0
    most: int = 0
    step_tensors: list[weakref.ref[Weights]] = field(default_factory=list)
    started: threading.Event = field(default_factory=threading.Event)

    def __call__(
        self, config: EngineConfig, *, preset: str, on_progress: OnProgress, cancel: CancelToken, **_: object
    ) -> FakeEngine:
        meter = Meter("cpu", on_progress)
        with meter.stage("load"):
            meter.emit("load", 0, 1)
            deadline = time.monotonic() + self.open_seconds
            while time.monotonic() < deadline:
                cancel.check()
                time.sleep(0.005)
            if self.open_error is not None:
                raise self.open_error
            meter.emit("load", 1, 1)
        self.opened.append(config)
        self.alive += 1
        self.most = max(self.most, self.alive)
        return FakeEngine(self)


class FakeEngine:
    def __init__(self, garage: Garage) -> None:
        self.garage = garage
        self.closed = False

    def run(
        self,
        request: Request,
        *,
        save_result_path: Path | None,
        on_progress: OnProgress,
        cancel: CancelToken,
        metadata: bool = True,
        force: bool = False,
        steps: StepStore | None = None,
    ) -> FakeResult:
        assert save_result_path is not None
        garage, script = self.garage, self.garage.script.get(request.prompt, Script())
        garage.ran.append(request.prompt)
        if steps is not None:
            garage.went_on_from.append(steps.read())
            garage.save_every.append(steps.every)
        garage.running += 1
        garage.most_running = max(garage.most_running, garage.running)
        try:
            return self._run(request, script, save_result_path, Meter("cpu", on_progress), cancel, steps)
        finally:
            garage.running -= 1

    def _run(
        self, request: Request, script: Script, path: Path, meter: Meter, cancel: CancelToken, steps: StepStore | None
    ) -> FakeResult:
        for stage in STAGES:
            with meter.stage(stage):
                for step in range(1, script.steps + 1):
                    tensors = Weights()
                    self.garage.step_tensors.append(weakref.ref(tensors))
                    if not script.ignore_cancel:
                        cancel.check()
                    if script.seconds:
                        time.sleep(script.seconds)
                    if (stage, step) == script.at:
                        if steps is not None and script.saves is not None:
                            steps.write(script.saves)
                        self._incident(script, cancel)
                    expert = ("high" if step <= script.steps // 2 else "low") if stage == "denoise" else None
                    meter.emit(stage, step, script.steps, expert, preview=script.preview)
        if script.output is None:
            path.write_bytes(tiny_mp4())
        elif script.output:
            path.write_bytes(script.output)
        return FakeResult(str(path), request, meter.report())

    def _incident(self, script: Script, cancel: CancelToken) -> None:
        self.garage.started.set()
        if script.hold is not None:
            while not script.hold.wait(0.005):
                if not script.ignore_cancel:
                    cancel.check()
        if script.nan:
            raise NumericsError("NaN at step 2 of 4, attention torch_sdpa. Try dtype fp32.")
        if script.error is not None:
            raise script.error

    def exchange(self, config: EngineConfig, **_: object) -> bool:
        return False

    def release(self) -> None:
        self.close()

    def close(self) -> None:
        assert not self.closed, "closed twice"
        self.closed = True
        self.garage.alive -= 1


@cache
def tiny_mp4() -> bytes:
    """A real video of five 16x16 frames."""
    with TemporaryDirectory() as folder:
        path = Path(folder) / "tiny.mp4"
        with VideoWriter(path, 16, 16, 16, settings={"request": {"prompt": "tiny"}}) as writer:
            writer.write(np.arange(5 * 16 * 16 * 3, dtype=np.uint32).astype(np.uint8).reshape(5, 16, 16, 3))
        return path.read_bytes()
