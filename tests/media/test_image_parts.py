"""Small files that keep decoders busy or fill the memory: refused by count, or read as if the bulk were not there."""

from __future__ import annotations

import io
import resource
import struct
import time
import zlib
from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image, features
from PIL.PngImagePlugin import PngInfo
from png_files import chunk, png

from lightx2v.errors import BadRequest
from lightx2v.media.image_parts import exif_orientation, needed_parts
from lightx2v.media.images import MAX_BYTES, load_image

GREY = (b"\0" + b"\x80" * 96) * 32
"""The rows of a grey 32x32 RGB PNG."""


def encode(image: Image.Image, format: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def noise(mode: str = "RGB", size: tuple[int, int] = (80, 48)) -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


def segment(marker: int, content: bytes) -> bytes:
    return bytes((0xFF, marker)) + struct.pack(">H", len(content) + 2) + content


def tiff(entries: list[tuple[int, int, int, bytes]], order: str = "<", rest: bytes = b"") -> bytes:
    """An EXIF block of entries (tag, type, count, four bytes)."""
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(order + "IH", 8, len(entries))
    return head + b"".join(struct.pack(order + "HHI4s", *entry) for entry in entries) + bytes(4) + rest


def exif_bomb() -> bytes:
    """4 000 values of 200 kB each in a block of 250 kB: 800 MB when they are read."""
    values = [(300 + n, 7, 200_000, struct.pack("<I", 8)) for n in range(4000)]
    return tiff(values, rest=bytes(200_000))


def with_chunks(*chunks: bytes) -> bytes:
    whole = png(32, 32, 8, 2, GREY)
    return whole[:33] + b"".join(chunks) + whole[33:]


def in_jpeg(*segments: bytes) -> bytes:
    whole = encode(Image.new("RGB", (32, 32), "grey"), "JPEG")
    return whole[:2] + b"".join(segments) + whole[2:]


def webp_with(kind: bytes, content: bytes, times: int = 1) -> bytes:
    whole = encode(Image.new("RGB", (32, 32), "grey"), "WEBP", exif=b"Exif\0\0" + tiff([]))
    body = whole[12:] + (kind + struct.pack("<I", len(content)) + content + b"\0" * (len(content) % 2)) * times
    return b"RIFF" + struct.pack("<I", len(body) + 4) + b"WEBP" + body


def megabyte() -> bytes:
    return zlib.compress(bytes(2**20 - 10), 9)


def scans(times: int) -> bytes:
    """A progressive JPEG of 4 megapixels that goes over them many times."""
    whole = encode(Image.new("L", (2048, 2048), 128), "JPEG", progressive=True)
    last = whole[whole.rindex(b"\xff\xc4", 0, whole.rindex(b"\xff\xda")) : -2]
    return whole[:-2] + last * times + whole[-2:]


REFUSED: dict[str, Callable[[], bytes]] = {
    "PNG of a million empty chunks": lambda: with_chunks(chunk(b"abCd", b"") * 1_000_000),
    "PNG of a million empty pixel chunks": lambda: with_chunks(chunk(b"IDAT", b"") * 1_000_000),
    "PNG of chunks behind its pixels": lambda: png(32, 32, 8, 2, GREY)[:-12] + chunk(b"tEXt", b"a\0b") * 500_000,
    "JPEG of millions of empty comments": lambda: in_jpeg(segment(0xFE, b"") * 4_000_000),
    "JPEG of 1000 scans": lambda: scans(1000),
    "JPEG of 10 MB of tables": lambda: in_jpeg(segment(0xDB, bytes(65 * 1000)) * 150),
    "WebP of a million chunks": lambda: webp_with(b"abcd", b"", 1_000_000),
    "WebP animation of a million frames": lambda: webp_with(b"ANMF", bytes(16), 500_000),
}
READ: dict[str, Callable[[], bytes]] = {
    "PNG with 5000 colour profiles of a megabyte": lambda: with_chunks(chunk(b"iCCP", b"x\0\0" + megabyte()) * 5000),
    "PNG with 5000 texts that end in damage": lambda: with_chunks(
        chunk(b"zTXt", b"x\0\0" + megabyte()[:-4] + b"abcd") * 5000
    ),
    "PNG with 5000 EXIF texts": lambda: with_chunks(chunk(b"zTXt", b"Raw profile type exif\0\0" + megabyte()) * 5000),
    "PNG whose EXIF values overlap": lambda: with_chunks(chunk(b"eXIf", exif_bomb())),
    "PNG with EXIF heads only": lambda: with_chunks(chunk(b"eXIf", b"Exif\0\0" * 100_000)),
    "PNG whose pixels go on for a gigabyte": lambda: with_chunks(chunk(b"IDAT", zlib.compress(GREY + bytes(2**27), 9))),
    "JPEG with 19 MB of EXIF": lambda: in_jpeg(segment(0xE1, b"Exif\0\0" + exif_bomb()[:65_000]) * 290),
    "JPEG with a million Photoshop blocks": lambda: in_jpeg(
        segment(0xED, b"Photoshop 3.0\0" + b"8BIM\4\4\0\0\0\0\0\0" * 5000) * 290
    ),
    "JPEG with 19 MB of colour profile": lambda: in_jpeg(segment(0xE2, b"ICC_PROFILE\0\1\1" + bytes(65_000)) * 290),
    "WebP whose EXIF values overlap": lambda: webp_with(b"EXIF", exif_bomb()),
    "AVIF whose EXIF values overlap": lambda: encode(
        Image.new("RGB", (32, 32), "grey"), *(("AVIF",) if features.check("avif") else ("PNG",)), exif=exif_bomb()
    ),
}


def cost(action: Callable[[], object]) -> tuple[float, int]:
    """Seconds of this thread, and kilobytes by which the memory grew."""
    before, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.thread_time()
    action()
    return time.thread_time() - started, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before


@pytest.mark.slow
@pytest.mark.parametrize("name", REFUSED)
def test_a_file_of_too_many_parts_is_refused_at_once(name: str) -> None:
    data = REFUSED[name]()
    assert len(data) <= MAX_BYTES

    def refuse() -> None:
        with pytest.raises(BadRequest, match="more than .* which no picture needs"):
            load_image(data)

    seconds, kilobytes = cost(refuse)
    assert seconds < 0.5 and kilobytes < 100_000


@pytest.mark.slow
@pytest.mark.parametrize("name", READ)
def test_metadata_cost_neither_time_nor_memory(name: str) -> None:
    data = READ[name]()
    assert len(data) <= MAX_BYTES
    pictures: list[Image.Image] = []
    seconds, kilobytes = cost(lambda: pictures.append(load_image(data)))
    assert seconds < 0.5 and kilobytes < 100_000
    assert pictures[0].size == (32, 32) and np.abs(np.asarray(pictures[0]).astype(int) - 128).max() <= 1


ORDINARY = {
    "progressive JPEG": ("JPEG", "RGB", {"progressive": True, "quality": 95}),
    "JPEG with restart markers": ("JPEG", "RGB", {"restart_marker_blocks": 1}),
    "CMYK JPEG of Adobe": ("JPEG", "CMYK", {"comment": b"drawn"}),
    "JPEG with a profile": ("JPEG", "RGB", {"icc_profile": bytes(200_000), "comment": b"\xff\xd9" * 99}),
    "grey JPEG": ("JPEG", "L", {}),
    "palette PNG": ("PNG", "P", {"icc_profile": b"profile"}),
    "PNG with alpha": ("PNG", "RGBA", {}),
    "lossy WebP with alpha": ("WEBP", "RGBA", {"icc_profile": b"profile", "xmp": b"<x/>"}),
    "lossless WebP": ("WEBP", "RGB", {"lossless": True}),
}


@pytest.mark.parametrize("name", ORDINARY)
def test_the_pixels_stay_what_they_were(name: str) -> None:
    format, mode, options = ORDINARY[name]
    image = noise(mode)
    if mode == "RGBA":
        image.putalpha(Image.fromarray(np.tile(np.arange(80, dtype=np.uint8) * 3, (48, 1))))
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encode(image, format, exif=exif, **options)
    kept, orientation = needed_parts(format, data)
    assert orientation == 6 and len(kept) < len(data)
    with Image.open(io.BytesIO(data)) as before, Image.open(io.BytesIO(kept)) as after:
        assert after.mode == before.mode and np.array_equal(np.asarray(after), np.asarray(before))


def test_a_picture_in_almost_twenty_thousand_pieces_is_read() -> None:
    pixels = np.asarray(noise(size=(80, 80)))
    rows = zlib.compress(b"".join(b"\0" + row.tobytes() for row in pixels), 0)
    pieces = b"".join(chunk(b"IDAT", rows[at : at + 1]) for at in range(len(rows)))
    assert 19_000 < len(rows) < 19_990
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", 80, 80, 8, 2, 0, 0, 0))
    image = load_image(b"\x89PNG\r\n\x1a\n" + head + pieces + chunk(b"IEND", b""))
    assert np.array_equal(np.asarray(image), pixels)


# ---- orientation ----------------------------------------------------------------------------------------------------

TURNED = tiff([(0x0100, 4, 1, b"\1\0\0\0"), (0x0112, 3, 1, b"\6\0\0\0")])
XMP = b'<x:xmpmeta><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'


def text_chunks(key: str, text: bytes, **options: bool) -> bytes:
    info = PngInfo()
    info.add_itxt(key, text.decode(), **options) if "xmp" in key else info.add_text(key, text.decode(), **options)
    return encode(noise(), "PNG", pnginfo=info)


WRITTEN = {
    "big-endian EXIF": lambda: in_jpeg(segment(0xE1, b"Exif\0\0" + tiff([(0x0112, 3, 1, b"\0\6\0\0")], ">"))),
    "PNG, behind the pixels": lambda: png(32, 32, 8, 2, GREY)[:-12] + chunk(b"eXIf", TURNED) + chunk(b"IEND", b""),
    "PNG, as text of ImageMagick": lambda: text_chunks(
        "Raw profile type exif", b"\nexif\n" + b"%8d\n" % len(TURNED) + TURNED.hex().encode() + b"\n", zip=True
    ),
    "PNG, as XMP": lambda: text_chunks("XML:com.adobe.xmp", XMP),
    "PNG, as packed XMP": lambda: text_chunks("XML:com.adobe.xmp", XMP, zip=True),
    "JPEG, as XMP": lambda: in_jpeg(segment(0xE1, b"http://ns.adobe.com/xap/1.0/\0" + XMP)),
    "WebP, as XMP": lambda: encode(noise(), "WEBP", xmp=XMP),
    "WebP without Exif head": lambda: encode(noise(), "WEBP", exif=TURNED),
}


@pytest.mark.parametrize("name", WRITTEN)
def test_every_way_to_write_a_turn_is_read(name: str) -> None:
    data = WRITTEN[name]()
    kind = {b"\xff": "JPEG", b"\x89": "PNG", b"R": "WEBP"}[data[:1]]
    assert needed_parts(kind, data)[1] == 6


@pytest.mark.parametrize(
    "exif",
    [
        b"",
        b"Exif\0\0",
        b"II*\0",
        b"II*\0\xff\xff\xff\xff",
        tiff([(0x0112, 3, 1, b"\x09\0\0\0")]),
        tiff([(0x0112, 2, 2, b"6\0\0\0")]),
        tiff([(0x0112, 3, 9, b"\6\0\0\0")]),
        TURNED[:20],
    ],
)
def test_exif_that_says_nothing_usable_turns_nothing(exif: bytes) -> None:
    assert exif_orientation(exif) is None
