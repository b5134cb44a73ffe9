"""Short clips and their files, for the tests of mp4."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from lightx2v.media.video_writer import VideoWriter


def clip(frames: int = 5, height: int = 32, width: int = 48) -> np.ndarray:
    """A moving gradient, uint8 (T, H, W, 3)."""
    t, y, x = np.mgrid[:frames, :height, :width]
    return np.stack([x * 255 // width, y * 255 // height, (t * 40) % 256], -1).astype(np.uint8)


def write(path: Path, frames: np.ndarray, fps: float = 16, **options: object) -> Path:
    with VideoWriter(path, frames.shape[2], frames.shape[1], fps, **options) as writer:  # type: ignore[arg-type]
        writer.write(frames[:1])
        for at in range(1, len(frames), 4):
            writer.write(frames[at : at + 4])
    return path


def assert_nothing_left(folder: Path) -> None:
    assert list(folder.iterdir()) == []
