"""Images from anywhere become clean RGB or a clear error, within bounded time and memory."""

from __future__ import annotations

import io
import os
import resource
import struct
import subprocess
import sys
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from png_files import chunk, png

from lightx2v.errors import BadRequest, LightX2VError
from lightx2v.media.images import MAX_BYTES, jpeg, load_image, store_image

WHITE, RED, BLUE = (255, 255, 255), (255, 0, 0), (0, 0, 255)


def encode(image: Image.Image, format: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image).astype(int)


def corners() -> Image.Image:
    """32x20 with a red top left and a blue bottom right quarter."""
    image = Image.new("RGB", (32, 20), WHITE)
    image.paste(RED, (0, 0, 16, 10))
    image.paste(BLUE, (16, 10, 32, 20))
    return image


# ---- what is taken ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
def test_the_three_formats_are_read_whatever_the_name_says(format: str, tmp_path: Path) -> None:
    file = tmp_path / "picture.txt"
    file.write_bytes(encode(corners(), format, quality=95))
    for source in (file, str(file), file.read_bytes()):
        image = load_image(source)
        assert image.mode == "RGB" and image.size == (32, 20)
        assert np.abs(pixels(image)[2, 2] - RED).max() < 30


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_picture_is_turned_as_its_exif_says(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encode(corners(), "PNG", exif=exif)
    expected = {
        1: lambda a: a,
        2: lambda a: a[:, ::-1],
        3: lambda a: a[::-1, ::-1],
        4: lambda a: a[::-1],
        5: lambda a: a.transpose(1, 0, 2),
        6: lambda a: a[::-1].transpose(1, 0, 2),
        7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
        8: lambda a: a[:, ::-1].transpose(1, 0, 2),
    }[orientation](pixels(corners()))
    assert np.array_equal(pixels(load_image(data)), expected)


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
def test_broken_exif_leaves_the_picture_as_stored() -> None:
    data = encode(corners(), "PNG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff garbage")
    assert load_image(data).size == (32, 20)


def test_transparency_becomes_white() -> None:
    image = corners().convert("RGBA")
    image.putalpha(Image.fromarray(np.repeat(np.uint8([[0, 128, 255, 255]]), 8, 1).repeat(20, 0)))
    result = pixels(load_image(encode(image, "PNG")))
    assert tuple(result[2, 2]) == WHITE
    assert np.abs(result[2, 10] - (255, 127, 127)).max() <= 1
    assert tuple(result[15, 20]) == BLUE


def test_a_palette_with_a_transparent_colour_becomes_white_there() -> None:
    image = corners().quantize(8)
    clear = image.getpixel((2, 2))
    result = pixels(load_image(encode(image, "PNG", transparency=clear)))
    assert tuple(result[2, 2]) == WHITE
    assert tuple(result[15, 20]) == BLUE


def test_one_transparent_rgb_colour_becomes_white() -> None:
    result = pixels(load_image(encode(corners(), "PNG", transparency=RED)))
    assert tuple(result[2, 2]) == WHITE and tuple(result[15, 20]) == BLUE


def test_16_bit_grey_is_scaled_and_not_clipped() -> None:
    levels = np.linspace(0, 65535, 256).round().astype(np.uint16)
    result = pixels(load_image(encode(Image.fromarray(np.tile(levels, (32, 1))), "PNG")))
    assert np.array_equal(result[0, :, 0], np.arange(256))
    assert np.array_equal(result[..., 0], result[..., 2])


def test_16_bit_colour_is_scaled() -> None:
    row = b"\0" + struct.pack(">HHH", 65535, 32896, 0) * 16
    result = pixels(load_image(png(16, 16, 16, 2, row * 16)))
    assert np.abs(result - (255, 128, 0)).max() <= 1


@pytest.mark.parametrize("mode", ["CMYK", "L", "YCbCr"])
def test_other_colour_spaces_become_rgb(mode: str) -> None:
    image = load_image(encode(corners().convert(mode), "JPEG", quality=95))
    assert image.mode == "RGB"
    if mode != "L":
        assert np.abs(pixels(image)[2, 2] - RED).max() < 40
        assert np.abs(pixels(image)[15, 28] - BLUE).max() < 40


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P"])
def test_few_colour_pngs_become_rgb(mode: str) -> None:
    assert load_image(encode(corners().convert(mode), "PNG")).mode == "RGB"


def test_the_first_frame_of_an_animation_is_taken_without_reading_the_others() -> None:
    frames = [Image.new("RGB", (32, 32), RED)] + [Image.new("RGB", (32, 32), (0, i, 255)) for i in range(200)]
    for format in ("PNG", "WEBP"):
        data = encode(
            frames[0],
            format,
            save_all=True,
            append_images=frames[1:],
            **({"lossless": True} if format == "WEBP" else {}),
        )
        image = load_image(data)
        assert tuple(pixels(image)[0, 0]) == RED
        assert getattr(image, "n_frames", 1) == 1


def test_an_animation_of_100_000_frames_costs_what_one_picture_costs() -> None:
    def control(number: int) -> bytes:
        return struct.pack(">IIIIIHHBB", number, 32, 32, 0, 0, 1, 10, 0, 0)

    rows = (b"\0" + bytes(RED) * 32) * 32
    begin = [(b"acTL", struct.pack(">II", 100_000, 0)), (b"fcTL", control(0))]
    frame = zlib.compress((b"\0" + bytes(BLUE) * 32) * 32, 9)
    others = b"".join(
        chunk(b"fcTL", control(n)) + chunk(b"fdAT", struct.pack(">I", n + 1) + frame) for n in range(1, 199_999, 2)
    )
    whole = png(32, 32, 8, 2, rows, *begin)
    data = whole[:-12] + others + whole[-12:]
    with Image.open(io.BytesIO(data)) as animation:
        assert getattr(animation, "n_frames", 1) == 100_000
    before, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.thread_time()
    image = load_image(data)
    assert time.thread_time() - started < 0.5
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 30_000
    assert tuple(pixels(image)[0, 0]) == RED and image.size == (32, 32)


def test_a_phone_camera_jpeg_with_a_second_picture_is_read() -> None:
    data = encode(corners(), "MPO", save_all=True, append_images=[Image.new("RGB", (32, 20), BLUE)], quality=95)
    assert np.abs(pixels(load_image(data))[2, 2] - RED).max() < 30


# ---- what is refused ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.95])
def test_truncated_pictures_are_refused(format: str, share: float) -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8))
    data = encode(noise, format)
    with pytest.raises(BadRequest, match="damaged"):
        load_image(data[: int(len(data) * share)])


@pytest.mark.slow
def test_a_bomb_is_refused_from_its_header() -> None:
    """20 000 x 20 000 would be 1.2 GB of pixels; none are decoded."""
    code = (
        "import sys, resource, time\n"
        "from lightx2v.media.images import load_image\nfrom lightx2v.errors import BadRequest\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\nstarted = time.process_time()\n"
        "try:\n    load_image(sys.stdin.buffer.read())\n"
        "except BadRequest as error:\n    print(error)\n"
        "used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before\n"
        "assert used < 50_000, used\nassert time.process_time() - started < 5"
    )
    for side in (20_000, 12_000, 8_500):
        bomb = png(side, side, 1, 0, b"\0" * 1000)
        done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], input=bomb, capture_output=True, timeout=60)
        assert done.returncode == 0, done.stderr
        assert b"million" in done.stdout, done.stdout


def test_the_pixel_limit_names_size_and_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    data = encode(Image.new("L", (1000, 100)), "PNG")
    monkeypatch.setattr("lightx2v.media.images.MAX_PIXELS", 99_999)
    with pytest.raises(BadRequest, match="1000x100"):
        load_image(data)
    monkeypatch.setattr("lightx2v.media.images.MAX_PIXELS", 100_000)
    assert load_image(data).size == (1000, 100)


def test_50_megabytes_are_refused_without_reading_them_all(tmp_path: Path) -> None:
    file = tmp_path / "big.png"
    with file.open("wb") as out:
        out.write(encode(corners(), "PNG"))
        out.truncate(50 * 2**20)
    with pytest.raises(BadRequest, match="at most 20 MB"):
        load_image(file)
    with pytest.raises(BadRequest, match="at most 20 MB"):
        load_image(b"\xff\xd8" + bytes(MAX_BYTES))


@pytest.mark.slow
def test_a_text_chunk_bomb_in_a_png_is_refused_or_ignored_quickly() -> None:
    bomb = b"Comment\0\0" + zlib.compress(bytes(100 * 2**20), 9)
    data = png(16, 16, 8, 2, (b"\0" + b"\x80" * 48) * 16, (b"zTXt", bomb))
    before, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.thread_time()
    try:
        load_image(data)
    except BadRequest:
        pass
    assert time.thread_time() - started < 5
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 60_000


@pytest.mark.parametrize("size", [(1, 1), (15, 100), (100, 15), (10_000, 16), (16, 161)])
def test_too_small_and_too_long_pictures_are_refused(size: tuple[int, int]) -> None:
    with pytest.raises(BadRequest, match=f"{size[0]}x{size[1]}"):
        load_image(encode(Image.new("RGB", size), "PNG"))


def test_the_smallest_and_the_longest_pictures_are_taken() -> None:
    for size in ((16, 16), (160, 16)):
        assert load_image(encode(Image.new("RGB", size), "PNG")).size == size


def test_a_folder_or_a_pipe_is_refused_at_once(tmp_path: Path) -> None:
    fifo = tmp_path / "pipe"
    os.mkfifo(fifo)
    for source in (fifo, tmp_path, tmp_path / "missing.png", "/dev/zero", "a\0b.png", "x" * 300, "\ud800"):
        with pytest.raises(BadRequest):
            load_image(source)


def test_messages_do_not_reveal_the_servers_folders(tmp_path: Path) -> None:
    deep = tmp_path / "one" / "two" / "three.png"
    with pytest.raises(BadRequest) as caught:
        load_image(deep)
    assert str(tmp_path) not in str(caught.value) and "three.png" in str(caught.value)


@pytest.mark.parametrize(
    "name", ["A" * 5000, "a/" * 2000 + "b.png", "~nobody/a.png", "x\ud800.png", "a\x1b[31m\nb.png"]
)
def test_messages_repeat_little_of_a_name(name: str, tmp_path: Path) -> None:
    for source in (name, str(tmp_path / name)):
        with pytest.raises(BadRequest) as caught:
            load_image(source)
        message = str(caught.value)
        assert len(message) < 200 and message.isprintable() and message.encode()


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@settings(max_examples=100)
@given(format=st.sampled_from(["JPEG", "PNG", "WEBP"]), data=st.data())
def test_damaged_bytes_only_ever_give_our_errors(format: str, data: st.DataObject) -> None:
    noise = Image.fromarray(np.random.default_rng(1).integers(0, 255, (24, 24, 4), dtype=np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6
    raw = bytearray(encode(noise.convert("RGB") if format == "JPEG" else noise, format, exif=exif))
    for _ in range(data.draw(st.integers(1, 8))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lightx2v.media.images.MAX_PIXELS", 10**6)
        try:
            assert load_image(bytes(raw)).mode == "RGB"
        except LightX2VError as error:
            assert isinstance(error, BadRequest)


# ---- out ----------------------------------------------------------------------------------------------------------


def test_a_stored_picture_keeps_its_bytes_and_gets_its_suffix(tmp_path: Path) -> None:
    for format, suffix in (("JPEG", ".jpg"), ("PNG", ".png"), ("WEBP", ".webp")):
        data = encode(corners(), format)
        stored = store_image(data, tmp_path / "abc.image")
        assert stored == tmp_path / f"abc.image{suffix}"
        assert stored.read_bytes() == data


def test_a_broken_image_is_not_stored(tmp_path: Path) -> None:
    with pytest.raises(BadRequest):
        store_image(encode(corners(), "JPEG")[:200], tmp_path / "abc")
    assert list(tmp_path.iterdir()) == []


def test_thumbnails_keep_their_shape_and_small_pictures_their_size() -> None:
    frame = np.zeros((480, 832, 3), dtype=np.uint8)
    small = load_image(jpeg(frame, max_side=208))
    assert small.size == (208, 120)
    assert load_image(jpeg(Image.new("RGB", (64, 32)), max_side=208)).size == (64, 32)
    assert load_image(jpeg(frame)).size == (832, 480)
