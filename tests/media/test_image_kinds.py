"""Files that are no JPEG, PNG or WebP: named by their content, and read where a decoder for them is installed."""

from __future__ import annotations

import importlib
import io
import sys
from functools import partial
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from PIL import Image, features
from PIL.PngImagePlugin import PngImageFile

from lightx2v.errors import BadRequest
from lightx2v.media.image_kinds import readable_kind
from lightx2v.media.images import load_image, store_image

WHITE, RED, BLUE = (255, 255, 255), (255, 0, 0), (0, 0, 255)


def encode(image: Image.Image, format: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def corners(mode: str = "RGB") -> Image.Image:
    """64x40 with a red top left and a blue bottom right quarter."""
    image = Image.new("RGB", (64, 40), WHITE)
    image.paste(RED, (0, 0, 32, 20))
    image.paste(BLUE, (32, 20, 64, 40))
    return image.convert(mode)


def boxed(major: bytes, *brands: bytes, content: bytes = b"") -> bytes:
    """A file in ISO boxes: its brands, then `content`."""
    listed = major + bytes(4) + b"".join(brands)
    return (
        (len(listed) + 8).to_bytes(4, "big")
        + b"ftyp"
        + listed
        + (len(content) + 8).to_bytes(4, "big")
        + b"mdat"
        + content
    )


NAMED = {
    "a GIF picture": [encode(corners(), "GIF"), b"GIF89a" + encode(corners(), "PNG")],
    "a BMP picture": [encode(corners(), "BMP")],
    "a TIFF picture": [encode(corners(), "TIFF"), b"MM\0*" + bytes(60), b"II+\0" + bytes(60)],
    "a JPEG 2000 picture": [encode(corners(), "JPEG2000"), b"\xff\x4f\xff\x51" + bytes(60)],
    "a JPEG XL picture": [b"\xff\x0a" + bytes(60), b"\0\0\0\x0cJXL \r\n\x87\n" + bytes(60)],
    "a JPEG XR picture": [b"II\xbc\1" + bytes(60)],
    "an icon": [encode(corners(), "ICO"), b"icns" + bytes(60)],
    "a PNM picture": [encode(corners(), "PPM"), encode(corners("L"), "PPM"), b"P7\nWIDTH 4\n"],
    "a PCX picture": [encode(corners(), "PCX")],
    "a DDS texture": [encode(corners(), "DDS")],
    "a camera's raw picture": [boxed(b"crx ", b"crx ", b"isom"), b"II*\0\x10\0\0\0CR\2\0" + bytes(60)],
    "a Photoshop picture": [b"8BPS\0\1" + bytes(60)],
    "a DICOM picture": [bytes(128) + b"DICM" + bytes(60)],
    "an SVG drawing": [
        b'<svg xmlns="http://www.w3.org/2000/svg"><image href="http://169.254.169.254/"/></svg>',
        b'\xef\xbb\xbf<?xml version="1.0"?>\n<!-- drawn by hand -->\n<svg width="4">',
        b'<!DOCTYPE svg PUBLIC "-//W3C//DTD SVG 1.1//EN" "svg11.dtd"><SVG>',
    ],
    "a PDF document": [encode(corners(), "PDF"), b"\n%PDF-1.7\n1 0 obj <<>> endobj"],
    "a PostScript file": [encode(corners(), "EPS")],
    "a web page": [b"<!doctype html><html><body>404</body></html>", b"\n <HTML>\n", b"<html><svg></svg></html>"],
    "a video (MP4)": [boxed(b"isom", b"isom", b"avc1"), boxed(b"mp42")],
    "a video (QuickTime)": [boxed(b"qt  ", b"qt  "), b"\0\0\0\x08wide" + bytes(60)],
    "a video (WebM": [b"\x1a\x45\xdf\xa3" + bytes(60)],
    "a video": [b"RIFF" + bytes(4) + b"AVI LIST"],
    "a sound file": [b"RIFF" + bytes(4) + b"WAVEfmt ", b"ID3\4" + bytes(60), boxed(b"M4A ", b"isom")],
    "an archive or a document": [b"PK\3\4" + bytes(60), b"\x1f\x8b\x08" + bytes(60)],
    "a playlist": [b"#EXTM3U\n#EXTINF:1,\nfile:///etc/passwd\n"],
    "a Git LFS pointer": [b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n"],
    "a side file of macOS": [b"\0\5\x16\7\0\2\0\0Mac OS X"],
    "a text": [b'{"error": "not found"}', b"ein Bild\n", "图片".encode()],
    "empty": [b""],
    "nothing but zeros": [bytes(1000)],
    "of a kind that is not known": [b"\0\0\0\0\x12\xaf" + b"\1" * 200],
}


@pytest.mark.parametrize("name", NAMED)
def test_other_files_are_named_by_their_content(name: str, tmp_path: Path) -> None:
    for number, data in enumerate(NAMED[name]):
        file = tmp_path / f"{number}.png"
        file.write_bytes(data)
        for refuse in (partial(load_image, file), partial(store_image, data, tmp_path / "kept")):
            with pytest.raises(BadRequest) as caught:
                refuse()
            message = str(caught.value)
            assert message.startswith(f"The file is {name}") and "JPEG, PNG" in message, data[:40]
            assert len(message) < 250
    assert not list(tmp_path.glob("kept*"))


@pytest.mark.parametrize(
    "brands",
    [(b"heic", b"mif1", b"heic"), (b"heix",), (b"mif1", b"mif1", b"heic"), (b"hevc", b"msf1"), (b"msf1", b"hevc")],
)
def test_a_phones_heic_says_what_to_install(brands: tuple[bytes, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    with pytest.raises(BadRequest, match=r"HEIC picture, as phones make them\. .*Convert .*, or install pillow-heif"):
        load_image(boxed(*brands, content=bytes(100)))


def test_a_heif_of_another_codec_is_no_heic(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    with pytest.raises(BadRequest, match="a HEIF picture"):
        load_image(boxed(b"mif1", b"mif1", b"jpeg"))


def test_a_video_with_picture_brands_nowhere_stays_a_video() -> None:
    """A `ftyp` box that claims to be longer than it is does not make its brands from what follows."""
    assert readable_kind(b"\0\0\0\x14ftypisom\0\0\0\0avc1" + b"\0\0\0\x08freeavif") is None


class FakeHeif(PngImageFile):
    """Opens the PNG inside of a box, as pillow-heif's HeifImageFile opens the HEVC."""

    seen: bytes = b""

    def __init__(self, fp: io.BytesIO) -> None:
        FakeHeif.seen = fp.getvalue()
        super().__init__(io.BytesIO(FakeHeif.seen.partition(b"mdat")[2]))


@pytest.fixture
def pillow_heif(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("pillow_heif")
    monkeypatch.setattr(module, "HeifImageFile", FakeHeif, raising=False)
    monkeypatch.setitem(sys.modules, "pillow_heif", module)


@pytest.mark.usefixtures("pillow_heif")
def test_a_heic_is_read_where_pillow_heif_is_installed(tmp_path: Path) -> None:
    data = boxed(b"heic", b"mif1", content=encode(corners(), "PNG"))
    assert np.array_equal(np.asarray(load_image(data)), np.asarray(corners()))
    stored = store_image(data, tmp_path / "kept")
    assert stored.name == "kept.heic" and stored.read_bytes() == data
    assert np.array_equal(np.asarray(load_image(stored)), np.asarray(corners()))


@pytest.mark.usefixtures("pillow_heif")
def test_a_heic_has_the_limits_of_every_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    clear = corners("RGBA")
    clear.putalpha(0)
    shown = load_image(boxed(b"heic", content=encode(clear, "PNG")))
    assert np.asarray(shown).min() == 255
    for size, words in (((8, 40), "at least 16"), ((640, 40), "at most 10 times")):
        with pytest.raises(BadRequest, match=words):
            load_image(boxed(b"heic", content=encode(Image.new("RGB", size), "PNG")))
    monkeypatch.setattr("lightx2v.media.images.MAX_PIXELS", 1000)
    with pytest.raises(BadRequest, match="million"):
        load_image(boxed(b"heic", content=encode(corners(), "PNG")))
    with pytest.raises(BadRequest, match="damaged"):
        load_image(boxed(b"heic", content=b"no picture"))


@pytest.mark.usefixtures("pillow_heif")
def test_the_message_lists_what_is_read_here() -> None:
    with pytest.raises(BadRequest, match="Only JPEG, PNG, WebP, .*HEIC images can be read"):
        load_image(encode(corners(), "GIF"))


def test_an_avif_that_this_pillow_cannot_read_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(features, "check", lambda feature: feature != "avif")
    with pytest.raises(BadRequest, match=r"an AVIF picture\. Only JPEG, PNG(,| and) WebP .*install a Pillow with AVIF"):
        load_image(boxed(b"mif1", b"mif1", b"avif", b"miaf"))


def test_avif_is_read_like_the_others_or_named(tmp_path: Path) -> None:
    """Pillow's packages on PyPI read AVIF; a Pillow built without it gives the message."""
    if not features.check("avif"):
        with pytest.raises(BadRequest, match="an AVIF picture"):
            load_image(boxed(b"avif", b"mif1"))
        return
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encode(corners(), "AVIF", quality=100, subsampling="4:4:4", exif=exif)
    upright = np.asarray(corners()).astype(int)[::-1].transpose(1, 0, 2)
    assert np.abs(np.asarray(load_image(data)).astype(int) - upright).max() <= 4
    assert store_image(data, tmp_path / "kept").suffix == ".avif"
    later = [Image.new("RGB", (64, 40), BLUE)] * 3
    film = encode(corners(), "AVIF", quality=100, save_all=True, append_images=later)
    assert np.abs(np.asarray(load_image(film))[5, 5].astype(int) - RED).max() <= 12
    with pytest.raises(BadRequest, match="at least 16"):
        load_image(encode(Image.new("RGB", (8, 40)), "AVIF"))
    with pytest.raises(BadRequest, match="damaged"):
        load_image(data[: len(data) // 2])


def test_pillow_heif_is_not_imported_for_other_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib, "import_module", lambda name: pytest.fail(f"imports {name}"))
    assert load_image(encode(corners(), "PNG")).size == (64, 40)
