"""FrameSink: takes the decoded frames of one video. It writes them, keeps them, or both, and notices a still video.

With `between`, the video has a higher rate, and `original` can get the frames as they were decoded.
"""

from collections.abc import Iterator
from typing import Protocol

import numpy as np

from ..media.video_writer import VideoWriter
from ..progress import Meter
from ..sampling import still_warning


class FramesBetween(Protocol):
    """Makes frames at a higher rate of frames (T, H, W, C) uint8, in their order."""

    def add(self, frames: np.ndarray) -> Iterator[np.ndarray]: ...

    def finish(self) -> Iterator[np.ndarray]: ...

    def abort(self) -> None: ...


class FrameSink:
    """`add` each chunk (T, H, W, C) uint8, then `finish` and `close`; or `abort`, which leaves no file. `keep` makes
    `frames`."""

    def __init__(self, meter: Meter, *, keep: bool) -> None:
        self.writer: VideoWriter | None = None
        self.original: VideoWriter | None = None
        self.between: FramesBetween | None = None
        self._meter = meter
        self._keep = keep
        self._kept: list[np.ndarray] = []
        self._ends: list[np.ndarray] = []

    def add(self, frames: np.ndarray) -> None:
        if self.original is not None:
            self.original.write(frames)
        self._ends.append(frames[:: max(1, len(frames) - 1)])
        if self.between is None:
            self._put(frames)
        else:
            self._put_all(self.between.add(frames))

    def finish(self) -> None:
        """Write what `between` still has."""
        if self.between is not None:
            self._put_all(self.between.finish())
            self.between.abort()

    def _put_all(self, frames: Iterator[np.ndarray]) -> None:
        while True:
            with self._meter.stage("interpolate"):
                made = next(frames, None)
            if made is None:
                return
            self._put(made)

    def _put(self, frames: np.ndarray) -> None:
        if self.writer is not None:
            self.writer.write(frames)
        if self._keep:
            self._kept.append(frames)

    def close(self) -> None:
        for writer in (self.original, self.writer):
            if writer is not None:
                writer.close()

    def abort(self) -> None:
        for part in (self.between, self.original, self.writer):
            if part is not None:
                part.abort()

    @property
    def frames(self) -> np.ndarray | None:
        """All frames; None before the first chunk, or if the sink does not keep them."""
        return np.concatenate(self._kept) if self._kept else None

    def still_warning(self) -> str | None:
        """A warning if the first and last frames of all chunks are equal: then nothing moves."""
        return still_warning(frame for ends in self._ends for frame in ends)
