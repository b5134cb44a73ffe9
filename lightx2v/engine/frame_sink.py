"""FrameSink: takes the decoded frames of one video. It writes them, keeps them, or both, and notices a still video."""

import numpy as np

from ..media.video_writer import VideoWriter
from ..sampling import still_warning


class FrameSink:
    """`add` each chunk (T, H, W, C) uint8, then `close`; or `abort`, which leaves no file. `keep` makes `frames`."""

    def __init__(self, *, keep: bool) -> None:
        self.writer: VideoWriter | None = None
        self._keep = keep
        self._kept: list[np.ndarray] = []
        self._ends: list[np.ndarray] = []

    def add(self, frames: np.ndarray) -> None:
        if self.writer is not None:
            self.writer.write(frames)
        self._ends.append(frames[:: max(1, len(frames) - 1)])
        if self._keep:
            self._kept.append(frames)

    def close(self) -> None:
        if self.writer is not None:
            self.writer.close()

    def abort(self) -> None:
        if self.writer is not None:
            self.writer.abort()

    @property
    def frames(self) -> np.ndarray | None:
        """All frames; None before the first chunk, or if the sink does not keep them."""
        return np.concatenate(self._kept) if self._kept else None

    def still_warning(self) -> str | None:
        """A warning if the first and last frames of all chunks are equal: then nothing moves."""
        return still_warning(frame for ends in self._ends for frame in ends)
