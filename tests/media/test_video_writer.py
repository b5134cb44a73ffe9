"""Frames to mp4 and back: size, length, rate, colours and order are those that were asked for."""

from __future__ import annotations

import itertools
import subprocess
from pathlib import Path

import numpy as np
import pytest
from clips import clip, write
from mp4_colours import Tags, colour_tags
from PIL import Image

from lightx2v.errors import BadRequest
from lightx2v.media.mp4 import probe
from lightx2v.media.video_writer import VideoWriter, ffmpeg, read_frame


@pytest.mark.slow
@pytest.mark.parametrize("fps", [16, 12.5, 24, 23.976, 1, 120])
@pytest.mark.parametrize(("frames", "height", "width"), [(1, 16, 16), (5, 32, 48), (17, 96, 80)])
def test_size_length_and_rate_are_as_asked(frames: int, height: int, width: int, fps: float, tmp_path: Path) -> None:
    info = probe(write(tmp_path / "a.mp4", clip(frames, height, width), fps))
    assert (info.width, info.height, info.frames) == (width, height, frames)
    assert info.fps == pytest.approx(fps, rel=1e-3)


def test_our_reading_of_the_boxes_agrees_with_ffmpeg(tmp_path: Path) -> None:
    import imageio_ffmpeg

    file = write(tmp_path / "a.mp4", clip(9))
    done = subprocess.run([ffmpeg(), "-hide_banner", "-i", str(file)], capture_output=True, text=True, check=False)
    assert "Video: h264" in done.stderr and "48x32" in done.stderr and " 16 fps" in done.stderr
    assert imageio_ffmpeg.count_frames_and_secs(str(file))[0] == 9


def test_a_grey_ramp_survives_within_3_levels(tmp_path: Path) -> None:
    ramp = np.broadcast_to(np.arange(256, dtype=np.uint8)[None, None, :, None], (9, 64, 256, 3))
    file = write(tmp_path / "ramp.mp4", ramp)
    for index in (0, 4, -1):
        back = np.asarray(read_frame(file, index)).astype(int)
        assert np.abs(back - ramp[0]).max() <= 3
        assert abs((back - ramp[0]).mean()) < 0.5


def test_flat_colours_survive(tmp_path: Path) -> None:
    colours = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0), (250, 160, 120), (18, 33, 70)]
    frames = np.array([np.full((32, 32, 3), colour) for colour in colours], dtype=np.uint8)
    file = write(tmp_path / "colours.mp4", frames)
    for index, colour in enumerate(colours):
        assert np.abs(np.asarray(read_frame(file, index)).astype(int) - colour).mean() <= 3


BARS = (
    *itertools.product((255, 0), repeat=3),
    *itertools.product((191, 0), repeat=3),
    *((250, 160, 120), (18, 33, 70), (115, 82, 68), (98, 122, 157), (214, 126, 44), (157, 188, 64)),
)
"""Colour bars at 100 % and 75 %, then skin, night, and patches of a colour chart."""
BT709 = Tags(primaries=1, transfer=1, matrix=1, full_range=0)


def colour_bars() -> np.ndarray:
    row = np.repeat(np.array(BARS, dtype=np.uint8), 32, axis=0)
    return np.broadcast_to(row, (5, 64, len(row), 3))


def decoded(file: Path, pixels: str, *options: str) -> np.ndarray:
    command = [ffmpeg(), "-v", "error", "-i", str(file), *options, "-f", "rawvideo", "-pix_fmt", pixels, "-"]
    return np.frombuffer(subprocess.run(command, capture_output=True, check=True).stdout, np.uint8)


@pytest.mark.parametrize(("frames", "height", "width", "fps"), [(1, 16, 16, 1), (5, 32, 48, 23.976), (9, 720, 64, 16)])
def test_stream_and_container_say_bt709_and_limited_range(
    frames: int, height: int, width: int, fps: float, tmp_path: Path
) -> None:
    """Sizes on both sides of the limit at which players take untagged colours for 601 or 709."""
    file = write(tmp_path / "a.mp4", clip(frames, height, width), fps, settings={"seed": 1})
    assert colour_tags(file) == (BT709, BT709)


def test_every_shipped_video_says_so_too() -> None:
    files = [*(Path(__file__).parents[2] / "assets").rglob("*.mp4")]
    assert files
    assert {file.name: colour_tags(file) for file in files} == {file.name: (BT709, BT709) for file in files}


def test_the_pixels_are_converted_as_the_tags_say(tmp_path: Path) -> None:
    """Y'CbCr to R'G'B' by BT.709 (ITU-R BT.709-6, items 3.2 to 3.5), in the middle of each bar."""
    bars = colour_bars()
    file = write(tmp_path / "bars.mp4", bars)
    frames, height, width = bars.shape[:3]
    planes = decoded(file, "yuv420p").reshape(frames, -1).astype(float)
    luma, *chroma = np.split(planes, [height * width, height * width * 5 // 4], axis=1)
    y = (luma.reshape(frames, height, width) - 16) / 219
    cb, cr = ((c.reshape(frames, height // 2, width // 2) - 128).repeat(2, 1).repeat(2, 2) / 224 for c in chroma)
    red, blue = y + 1.5748 * cr, y + 1.8556 * cb
    green = (y - 0.2126 * red - 0.0722 * blue) / 0.7152
    shown = 255 * np.stack([red, green, blue], -1)
    assert np.abs(shown - bars)[:, 16:48, 16::32].max() <= 2


def test_a_player_that_trusts_the_tags_shows_the_same_colours(tmp_path: Path) -> None:
    bars = colour_bars()
    file = write(tmp_path / "bars.mp4", bars)
    exact = ("-sws_flags", "accurate_rnd+full_chroma_int+full_chroma_inp+bicubic")
    shown = decoded(file, "rgb24", *exact).reshape(bars.shape).astype(int)
    assert np.abs(shown - bars)[:, 16:48, 16::32].max() <= 2


def test_the_index_comes_before_the_pictures(tmp_path: Path) -> None:
    data = write(tmp_path / "a.mp4", clip()).read_bytes()
    assert data.index(b"moov") < data.index(b"mdat")


def test_the_same_frames_give_the_same_file(tmp_path: Path) -> None:
    files = [write(tmp_path / f"{name}.mp4", clip(), settings={"seed": 1}) for name in "ab"]
    assert files[0].read_bytes() == files[1].read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        "-vf.mp4",
        "a%03d.mp4",
        "concat:x.mp4",
        "pipe:1",
        "CON",
        "dot.",
        "no suffix",
        "file.mkv",
        "a\r\nb.mp4",
        "红.mp4",
        "'\";$(x).mp4",
    ],
)
def test_strange_names_are_only_names(name: str, tmp_path: Path) -> None:
    folder = tmp_path / "a%d:b"
    folder.mkdir()
    write(folder / name, clip())
    assert [file.name for file in folder.iterdir()] == [name]
    assert probe(folder / name).frames == 5
    assert read_frame(folder / name).size == (48, 32)


def test_a_relative_name_is_kept_when_the_process_changes_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "elsewhere").mkdir()
    with VideoWriter("a.mp4", 48, 32, 16) as writer:
        monkeypatch.chdir(tmp_path / "elsewhere")
        writer.write(clip())
    assert (tmp_path / "a.mp4").is_file()


def test_close_and_abort_work_without_a_with_block(tmp_path: Path) -> None:
    writer = VideoWriter(tmp_path / "a.mp4", 48, 32, 16)
    writer.write(clip())
    writer.close()
    writer.abort()
    assert probe(tmp_path / "a.mp4").frames == 5
    other = VideoWriter(tmp_path / "b.mp4", 48, 32, 16)
    other.abort()
    other.abort()
    assert [file.name for file in tmp_path.iterdir()] == ["a.mp4"]
    with pytest.raises(ValueError, match="closed"):
        other.write(clip())
    with pytest.raises(ValueError, match="closed"):
        writer.close()


def test_frames_of_another_shape_or_type_are_refused(tmp_path: Path) -> None:
    with VideoWriter(tmp_path / "a.mp4", 48, 32, 16) as writer:
        for wrong in (clip().astype(np.float32), clip(5, 48, 32), clip()[0], clip()[..., :1]):
            with pytest.raises(ValueError, match="expected uint8"):
                writer.write(wrong)
        writer.write(clip()[:, ::1, ::-1][:, :, ::-1])
        writer.write(np.asfortranarray(clip()))
    assert probe(tmp_path / "a.mp4").frames == 10
    with pytest.raises(ValueError, match="even"):
        VideoWriter(tmp_path / "b.mp4", 47, 32, 16)


def test_the_last_frame_is_the_last_one(tmp_path: Path) -> None:
    frames = clip(9)
    file = write(tmp_path / "a.mp4", frames)
    for index in (0, 3, 8, -1, -9):
        error = np.abs(np.asarray(read_frame(file, index)).astype(int) - frames[index]).mean()
        assert error < 6, index
    assert isinstance(read_frame(file), Image.Image)
    for index in (9, -10):
        with pytest.raises(BadRequest, match="frames 0 to 8"):
            read_frame(file, index)
