"""Thumbnails and sprite sheets against the frames that were written; made once, removed with the video."""

from __future__ import annotations

import io
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lightx2v.errors import BadRequest, OutputError
from lightx2v.media import video_stills
from lightx2v.media.video_stills import STILLS, still
from lightx2v.media.video_writer import VideoWriter, read_frames


def greys(count: int) -> list[int]:
    """A level of grey for each frame, at least five apart, which JPEG and H.264 keep apart."""
    return [20 + 5 * number for number in range(count)]


def written(path: Path, count: int, width: int = 96, height: int = 64) -> Path:
    """A video whose frames are of one grey each."""
    with VideoWriter(path, width, height, 16) as writer:
        for level in greys(count):
            writer.write(np.full((1, height, width, 3), level, np.uint8))
    return path


def mean(image: Image.Image) -> float:
    return float(np.asarray(image, np.float64).mean())


def test_a_thumbnail_is_the_middle_frame_and_small(tmp_path: Path) -> None:
    video = written(tmp_path / "a.mp4", 9, 736, 480)
    with Image.open(still(video, "thumbnail")) as image:
        assert (image.format, image.size) == ("JPEG", (360, round(480 * 360 / 736)))
        assert abs(mean(image) - greys(9)[4]) <= 2


@pytest.mark.slow
@pytest.mark.parametrize(
    ("count", "shown"), [(1, [0]), (5, [0, 1, 2, 3, 4]), (41, [round(n * 40 / 24) for n in range(25)])]
)
def test_a_sprite_sheet_has_frames_at_equal_distances_in_rows_of_five(
    tmp_path: Path, count: int, shown: list[int]
) -> None:
    video = written(tmp_path / "a.mp4", count)
    with Image.open(still(video, "spritesheet")) as sheet:
        columns = min(5, len(shown))
        assert sheet.format == "JPEG" and sheet.size == (96 * columns, 64 * -(-len(shown) // 5))
        for place, number in enumerate(shown):
            row, column = divmod(place, 5)
            tile = sheet.crop((column * 96, row * 64, column * 96 + 96, row * 64 + 64))
            assert abs(mean(tile) - greys(count)[number]) <= 2, (place, number)


def test_the_frames_of_a_large_video_become_small_ones(tmp_path: Path) -> None:
    video = written(tmp_path / "a.mp4", 5, 320, 1280)
    with Image.open(still(video, "spritesheet")) as sheet:
        assert sheet.size == (60 * 5, 240)


def test_scaled_frames_are_those_that_were_asked_for(tmp_path: Path) -> None:
    """ffmpeg fills a gap between two selected frames with copies, unless they get new times."""
    video = written(tmp_path / "a.mp4", 21)
    frames = read_frames(video, [0, 7, 8, 20], 48, 32)
    assert [frame.size for frame in frames] == [(48, 32)] * 4
    assert [round(mean(frame)) for frame in frames] == pytest.approx([greys(21)[n] for n in (0, 7, 8, 20)], abs=2)


def test_a_picture_is_made_once_even_for_many_at_the_same_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    video = written(tmp_path / "a.mp4", 5)
    made: list[int] = []
    make = video_stills.spritesheet

    def counted(path: Path) -> bytes:
        made.append(threading.get_ident())
        return make(path)

    monkeypatch.setitem(video_stills._MAKERS, "spritesheet", counted)
    with ThreadPoolExecutor(8) as pool:
        files = set(pool.map(lambda _: still(video, "spritesheet"), range(16)))
    assert files == {tmp_path / "a.spritesheet.jpg"} and len(made) == 1
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.mp4", "a.spritesheet.jpg"], "no part stays behind"


def test_no_picture_stays_of_a_video_that_is_removed_while_it_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    video = written(tmp_path / "a.mp4", 5)

    def removed(path: Path) -> bytes:
        path.unlink()
        return b"jpeg"

    monkeypatch.setitem(video_stills._MAKERS, "thumbnail", removed)
    with pytest.raises(OutputError, match="removed"):
        still(video, "thumbnail")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", STILLS)
def test_a_damaged_video_has_no_picture_and_a_reason(tmp_path: Path, kind: video_stills.Still) -> None:
    video = written(tmp_path / "a.mp4", 5)
    whole = video.read_bytes()
    at = whole.index(b"mdat")
    video.write_bytes(whole[: at + 4] + bytes(len(whole) - at - 4))
    with pytest.raises(OutputError, match="could not be read back"):
        still(video, kind)
    video.write_bytes(b"no video")
    with pytest.raises(BadRequest):
        still(video, kind)
    assert [file.name for file in tmp_path.iterdir()] == ["a.mp4"]


def test_a_picture_that_cannot_be_stored_is_an_error_that_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    video = written(tmp_path / "a.mp4", 5)

    def full(self: Path, data: bytes) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OutputError, match="No space left"):
        still(video, "thumbnail")


@pytest.mark.slow
def test_a_picture_is_small_in_bytes(tmp_path: Path) -> None:
    """Noise is the worst case of JPEG."""
    noise = np.random.default_rng(0).integers(0, 256, (25, 240, 240, 3), np.uint8)
    with VideoWriter(tmp_path / "a.mp4", 240, 240, 16) as writer:
        writer.write(noise)
    assert len(io.BytesIO(still(tmp_path / "a.mp4", "spritesheet").read_bytes()).getvalue()) < 2_000_000
