"""Frames between those of the model: RIFE or ffmpeg makes them while the VAE decodes, pair by pair."""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..config.request import Request
from ..loading.networks import whole_float32
from ..loading.rife_file import load_rife
from ..media.ffmpeg_interpolation import FfmpegFrames
from ..media.frame_times import frame_times
from ..models.rife import ALIGN, Rife
from ..progress import CancelToken
from .engine import LoadedEngine
from .frame_sink import FramesBetween


def frames_between(engine: LoadedEngine, request: Request, cancel: CancelToken) -> FramesBetween | None:
    """What makes the video of the request's rate; None where that is the model's."""
    if request.interpolator == "ffmpeg":
        return FfmpegFrames(request.frames, request.fps, request.video_fps, cancel)
    if request.interpolator == "rife":
        return RifeFrames(load_rife(engine.config, engine.precision.device), request, cancel)
    return None


class RifeFrames:
    """`add` frames (T, H, W, 3) uint8 as they come, then `finish`; both yield frames of the new video in their order.

    A frame of the original that is shown at its own time stays as it is, bit by bit. Holds two frames at a time.
    """

    def __init__(self, network: Rife, request: Request, cancel: CancelToken) -> None:
        self._network, self._cancel = network, cancel
        self._weight = next(network.parameters())
        self._times = frame_times(request.frames, request.fps, request.video_fps)
        self._next = next(self._times, None)
        self._index = -1
        self._last: np.ndarray | None = None
        self._last_inputs: tuple[Tensor, Tensor] | None = None

    def add(self, frames: np.ndarray) -> Iterator[np.ndarray]:
        for frame in frames:
            if self._last is not None:
                yield from self._between(self._last, frame)
            self._index, self._last = self._index + 1, frame

    def finish(self) -> Iterator[np.ndarray]:
        """The rest: the last frame, for as long as it is shown."""
        while self._next is not None and self._last is not None:
            yield self._last[None]
            self._next = next(self._times, None)

    def abort(self) -> None:
        """Nothing to end."""

    def _between(self, first: np.ndarray, second: np.ndarray) -> Iterator[np.ndarray]:
        """The new frames from `first` on, before `second`."""
        after = None
        before, self._last_inputs = self._last_inputs, None
        while self._next is not None and self._next[0] == self._index:
            self._cancel.check()
            part = self._next[1]
            if not part:
                yield first[None]
            else:
                before = before if before is not None else self._inputs(first)
                after = after if after is not None else self._inputs(second)
                yield self._frame(before, after, part)
            self._next = next(self._times, None)
        self._last_inputs = after

    def _inputs(self, frame: np.ndarray) -> tuple[Tensor, Tensor]:
        """A frame in [0, 1], padded to whole blocks with its edge, and its features."""
        height, width, _ = frame.shape
        pixels_BCHW = (
            torch.tensor(frame, device=self._weight.device).permute(2, 0, 1)[None].to(self._weight.dtype) / 255
        )
        padded = F.pad(pixels_BCHW, (0, -width % ALIGN, 0, -height % ALIGN), mode="replicate")
        with whole_float32():
            return padded, self._network.features(padded)

    def _frame(self, before: tuple[Tensor, Tensor], after: tuple[Tensor, Tensor], part: Fraction) -> np.ndarray:
        assert self._last is not None
        height, width, _ = self._last.shape
        with whole_float32():
            made = self._network(before[0], after[0], before[1], after[1], float(part))
        levels = made[0, :, :height, :width].mul(255).round_().clamp_(0, 255)
        return levels.to(torch.uint8).permute(1, 2, 0)[None].cpu().numpy()
