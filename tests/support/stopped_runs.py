"""Runs that end in the middle, and go on as another process would."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest

from lightx2v.config.request import Request
from lightx2v.engine.result import Result
from lightx2v.errors import Cancelled
from lightx2v.pipeline import LightX2VPipeline
from lightx2v.progress import CancelToken, Progress


@dataclass
class Shelf:
    """Keeps saved steps in memory."""

    data: bytes | None = None
    every: float = 1e-6
    writes: int = 0

    def read(self) -> bytes | None:
        return self.data

    def write(self, data: bytes) -> None:
        self.data = data
        self.writes += 1


def stop_after(pipe: LightX2VPipeline, request: Request, step: int, shelf: Any, stage: str = "denoise") -> None:
    """Run a video, and end the program's part of it after `step` steps of `stage`."""
    token = CancelToken()

    def stop(event: Progress) -> None:
        if (event.stage, event.step) == (stage, step):
            token.suspend()

    with pytest.raises(Cancelled):
        pipe.run(request, cancel=token, on_progress=stop, steps=shelf)


def go_on(pipe: LightX2VPipeline, request: Request, shelf: Any, **more: Any) -> Result:
    pipe._loaded().prompts.clear()  # as in another process
    return pipe.run(request, return_latents=True, steps=shelf, **more)
