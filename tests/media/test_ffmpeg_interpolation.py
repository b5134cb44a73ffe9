"""ffmpeg's motion interpolation, streamed: the right number of frames, the originals among them, clear errors."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lightx2v.errors import Cancelled, OutputError
from lightx2v.media.ffmpeg_interpolation import FfmpegFrames
from lightx2v.media.frame_times import frame_times
from lightx2v.progress import CancelToken

pytestmark = pytest.mark.slow


def texture(seed: int, height: int, width: int) -> np.ndarray:
    """Smooth random colours (height, width, 3)."""
    coarse = np.random.default_rng(seed).integers(0, 255, (height // 10, width // 10, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC), np.float64)


def scene(time: float) -> np.ndarray:
    """A textured disc that moves 6 pixels a frame over a textured ground, uint8 (96, 128, 3)."""
    y, x = np.mgrid[:96, :128]
    picture, disc = texture(0, 100, 130)[:96, :128].copy(), texture(1, 60, 60)
    left, top = 20 + 6 * time, 30.0
    inside = (x - left - 20) ** 2 + (y - top - 20) ** 2 < 20**2
    across = (x - left).clip(0, 58)
    low = np.floor(across).astype(int)
    part = (across - low)[..., None]
    rows = (y - top).clip(0, 59).astype(int)
    moved = disc[rows, low] * (1 - part) + disc[rows, low + 1] * part
    picture[inside] = moved[inside]
    return picture.round().astype(np.uint8)


@contextmanager
def opened(frames: int, fps: float, new: float, cancel: CancelToken | None = None) -> Iterator[FfmpegFrames]:
    made = FfmpegFrames(frames, fps, new, cancel or CancelToken())
    try:
        yield made
    finally:
        made.abort()


def interpolated(frames: np.ndarray, fps: float, new: float, chunk: int = 4) -> np.ndarray:
    with opened(len(frames), fps, new) as made:
        parts = [part for at in range(0, len(frames), chunk) for part in made.add(frames[at : at + chunk])]
        return np.concatenate([*parts, *made.finish()])


@pytest.mark.parametrize(("fps", "new"), [(16, 24), (16, 30), (16, 32), (16, 48), (16, 60), (23.976, 59.94)])
@pytest.mark.parametrize("count", [1, 2, 9])
def test_the_originals_are_among_the_frames_bit_by_bit(fps: float, new: float, count: int) -> None:
    frames = np.stack([scene(at) for at in range(count)])
    made, times = interpolated(frames, fps, new), list(frame_times(count, fps, new))
    assert len(made) == len(times)
    exact = [(number, index) for number, (index, part) in enumerate(times) if not part]
    assert exact and all(np.array_equal(made[number], frames[index]) for number, index in exact)


def test_the_frames_between_are_nearer_to_the_true_ones_than_a_mix_of_both() -> None:
    frames = np.stack([scene(at) for at in range(9)])
    made = interpolated(frames, 16, 32).astype(float)
    true = np.stack([scene(at + 0.5) for at in range(8)])
    mixed = (frames[:-1].astype(float) + frames[1:]) / 2
    assert np.square(made[1:16:2] - true).mean() < 0.5 * np.square(mixed - true).mean()


def test_the_size_of_the_chunks_changes_nothing() -> None:
    frames = np.stack([scene(at) for at in range(9)])
    assert np.array_equal(interpolated(frames, 16, 24, chunk=1), interpolated(frames, 16, 24, chunk=9))


def test_few_originals_wait_for_ffmpeg() -> None:
    """Whatever the length: those between the newest one and the frame that comes next."""
    with opened(200, 16, 32) as made:
        most = 0
        for at in range(200):
            for _ in made.add(scene(at % 9)[None]):
                pass
            most = max(most, len(made._originals))
        assert len(list(made.finish())) + most > 0
    assert most < 60


def test_a_cancel_ends_it_while_ffmpeg_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    silent = tmp_path / "ffmpeg"
    silent.write_text("#!/bin/sh\nexec sleep 60\n")
    silent.chmod(0o755)
    monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", str(silent))
    cancel = CancelToken()
    with opened(9, 16, 32, cancel) as made:
        threading.Timer(0.3, cancel.cancel).start()
        with pytest.raises(Cancelled):
            for _ in made.add(np.zeros((9, 96, 128, 3), np.uint8)):
                pass
            list(made.finish())


@pytest.mark.parametrize("script", ["exit 3", "head -c 100 > /dev/null; echo broken >&2; exit 1", "cat > /dev/null"])
def test_an_ffmpeg_that_ends_early_is_an_error_that_says_what_else_to_choose(
    script: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = tmp_path / "ffmpeg"
    broken.write_text(f"#!/bin/sh\n{script}\n")
    broken.chmod(0o755)
    monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", str(broken))
    with opened(9, 16, 32) as made, pytest.raises(OutputError, match="interpolation to rife"):
        list(made.add(np.zeros((9, 96, 128, 3), np.uint8)))
        list(made.finish())


def test_no_process_and_no_open_file_is_left() -> None:
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        interpolated(np.stack([scene(at) for at in range(3)]), 16, 32)
        with opened(9, 16, 32) as made:
            list(made.add(scene(0)[None]))
    assert len(os.listdir("/proc/self/fd")) == before
