"""The parts of a picture file that its pixels need, and which way up it is: all that a decoder gets to see.

A file of a few kilobytes can keep a decoder busy for minutes, or fill the memory, with what is not a pixel: chunks by
the million, colour profiles and texts that unpack to a megabyte each, EXIF tables whose values overlap, frames of an
animation, scans of a progressive JPEG. So metadata and later frames are left out, the orientation is read here, and
what has too many parts is refused. Damage is left in, for the decoder to find.
"""

import re
import struct
import zlib
from collections.abc import Sequence

from ..errors import BadRequest

MAX_PARTS = 20_000
"""Segments or chunks. A PNG of 20 MB, the largest that is taken, has as many when each holds a kilobyte of pixels."""
MAX_SCANS = 32
"""Of a progressive JPEG; encoders write about ten. Each goes over all pixels again, however few bytes it has."""
MAX_TABLES = 1 << 20
"""Bytes of a JPEG's segments other than metadata: quantisation and Huffman tables take less than a kilobyte a scan."""
MAX_TEXT = 1 << 20

_Parts = tuple[Sequence[bytes | bytearray | memoryview], bytes, bytes]
"""The parts that are kept, the EXIF block and the XMP packet; empty where the file has none."""

_ORIENTATION, _SHORT = 0x0112, 3
_XMP_ORIENTATION = re.compile(rb"tiff:Orientation(?:=[\"']|>)\s*([1-8])")

_JPEG_MARKER = re.compile(rb"\xff[\x01-\xcf\xd8-\xfe]")
"""Not the stuffed zeros and the restart markers inside of a scan."""
_TEMPORARY, _START_OF_IMAGE, _END_OF_IMAGE, _START_OF_SCAN = 0x01, 0xD8, 0xD9, 0xDA
_APP0, _APP15, _COMMENT = 0xE0, 0xEF, 0xFE
_EXIF_HEAD, _XMP_HEAD = b"Exif\0\0", b"http://ns.adobe.com/xap/1.0/\0"
_JPEG_KEPT = (b"JFIF\0", b"Adobe")
"""Application segments that say which colours the numbers mean."""
_JPEG_HEADS = (*_JPEG_KEPT, _EXIF_HEAD, _XMP_HEAD)

_PNG_KEPT = (b"IHDR", b"PLTE", b"tRNS", b"IDAT")
_PNG_END = b"\0\0\0\0IEND\xaeB`\x82"
_RAW_EXIF, _PNG_XMP = b"Raw profile type exif", b"XML:com.adobe.xmp"

_WEBP_KEPT = (b"VP8X", b"ANIM", b"ANMF", b"ALPH", b"VP8 ", b"VP8L")
_WEBP_IMAGE_FLAGS = 0x12
"""Alpha and animation, in the first byte of VP8X. The other flags say that metadata follow."""


def needed_parts(kind: str, data: bytes) -> tuple[bytes, int]:
    """A file with the same first picture in it, and its orientation by EXIF or XMP (1 to 8; 1 where neither says it).

    `kind` is one of `readable_kind`. BadRequest where the parts are too many.
    """
    if kind in ("AVIF", "HEIF"):
        return _without_exif(data), 1  # these turn their pictures by the container, as their standards demand
    parts, exif, xmp = {"JPEG": _jpeg_parts, "PNG": _png_parts, "WEBP": _webp_parts}[kind](data)
    found = _XMP_ORIENTATION.search(xmp)
    return b"".join(parts), exif_orientation(exif) or (int(found[1]) if found else 1)


def exif_orientation(exif: bytes) -> int | None:
    """The orientation in the first directory of an EXIF block; None where there is none, or none that can be read."""
    block = exif.removeprefix(b"Exif\0\0")
    order = {b"II": "<", b"MM": ">"}.get(block[:2])
    if order is None:
        return None
    try:
        (at,) = struct.unpack_from(order + "I", block, 4)
        (entries,) = struct.unpack_from(order + "H", block, at)
        for entry in range(entries):
            tag, type, count, value = struct.unpack_from(order + "HHIH", block, at + 2 + 12 * entry)
            if (tag, type, count) == (_ORIENTATION, _SHORT, 1):
                return value if 1 <= value <= 8 else None
    except struct.error:
        pass
    return None


def _jpeg_parts(data: bytes) -> _Parts:
    """All up to the first end of image, without comments and application segments other than JFIF's and Adobe's."""
    view, pieces, start, at = memoryview(data), [], 0, 2
    segments = scans = tables = 0
    first: dict[bytes, bytes] = {}
    while found := _JPEG_MARKER.search(data, at):
        marker, at = data[found.end() - 1], found.end()
        if marker == _END_OF_IMAGE:
            view = view[:at]
            break
        if marker in (_TEMPORARY, _START_OF_IMAGE):  # these have no content
            continue
        end = at + max(2, int.from_bytes(data[at : at + 2], "big"))
        segments, scans = segments + 1, scans + (marker == _START_OF_SCAN)
        if _APP0 <= marker <= _APP15 or marker == _COMMENT:
            head = next((head for head in _JPEG_HEADS if data.startswith(head, at + 2)), b"")
            if head not in _JPEG_KEPT or head in first:
                pieces.append(view[start : found.start()])
                start = end
            if head:
                first.setdefault(head, data[at + 2 : end])
        else:
            tables += end - at
        at = end
        _check(segments, MAX_PARTS, "segments")
        _check(scans, MAX_SCANS, "scans")
        _check(tables, MAX_TABLES, "bytes of tables")
    return [*pieces, view[start:]], first.get(_EXIF_HEAD, b""), first.get(_XMP_HEAD, b"")


def _png_parts(data: bytes) -> _Parts:
    """Header, palette, transparency and pixels of the one picture that is not in a chunk of an animation."""
    pieces, at, chunks = [data[:8]], 8, 0
    first: dict[bytes, bytes] = {}
    pixels = ended = False
    while at + 12 <= len(data) and not ended:
        length, kind = struct.unpack_from(">I4s", data, at)
        end = at + 12 + length
        if end > len(data):
            break
        chunks += 1
        _check(chunks, MAX_PARTS, "chunks")
        ended = kind == b"IEND" or (pixels and kind in (b"fcTL", b"fdAT"))
        if kind in _PNG_KEPT:
            pieces.append(data[at:end])
            pixels |= kind == b"IDAT"
        elif kind in (b"eXIf", b"iTXt", b"zTXt", b"tEXt"):
            content = data[at + 8 : end - 4]
            keyword, _, text = content.partition(b"\0")
            if kind == b"eXIf":
                first.setdefault(kind, content)
            elif keyword in (_RAW_EXIF, _PNG_XMP) and keyword not in first:
                first[keyword] = text if kind == b"tEXt" else _unpacked_text(text, international=kind == b"iTXt")
        at = end
    exif = first.get(b"eXIf") or _from_hex(first.get(_RAW_EXIF, b""))
    return [*pieces, _PNG_END if ended else data[at:]], exif, first.get(_PNG_XMP, b"")


def _unpacked_text(text: bytes, *, international: bool) -> bytes:
    """The first megabyte of a zTXt or iTXt chunk's text, from behind its keyword."""
    if international:
        compressed, text = text[:1] == b"\1", text[2:].partition(b"\0")[2].partition(b"\0")[2]
        if not compressed:
            return text
    else:
        text = text[1:]
    try:
        return zlib.decompressobj().decompress(text, MAX_TEXT)
    except zlib.error:
        return b""


def _from_hex(profile: bytes) -> bytes:
    """ImageMagick's way to write EXIF into a PNG: a name, a length, and lines of hexadecimal digits."""
    try:
        return bytes.fromhex(b"".join(profile.split(b"\n")[3:]).decode("ascii"))
    except ValueError:
        return b""


def _webp_parts(data: bytes) -> _Parts:
    """The one picture, or the first frame of the animation with what it needs of the head."""
    pieces, at, chunks = [], 12, 0
    first: dict[bytes, bytes] = {}
    while at + 8 <= len(data):
        kind, length = struct.unpack_from("<4sI", data, at)
        end = at + 8 + length + length % 2
        chunks += 1
        _check(chunks, MAX_PARTS, "chunks")
        if kind in (b"EXIF", b"XMP "):
            first.setdefault(kind, data[at + 8 : end])
        elif kind in _WEBP_KEPT and not (kind == b"ANMF" and kind in first):
            piece = bytearray(data[at:end])
            if kind == b"VP8X":
                piece[8:9] = bytes(flags & _WEBP_IMAGE_FLAGS for flags in piece[8:9])
            pieces.append(piece)
            first.setdefault(kind, b"")
        at = end
    size = 4 + sum(len(piece) for piece in pieces)
    head = b"RIFF" + size.to_bytes(4, "little") + b"WEBP"
    return [head, *pieces], first.get(b"EXIF", b""), first.get(b"XMP ", b"")


def _without_exif(data: bytes) -> bytes:
    """The same boxes with an unknown type for the items that are EXIF, so that nothing reads them."""
    pieces, at = [], 0
    while at + 8 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, at)
        if length == 1 and at + 16 <= len(data):
            (length,) = struct.unpack_from(">Q", data, at + 8)
        end = at + length if length >= 8 else len(data)
        box = data[at:end]
        pieces.append(box if kind == b"mdat" else box.replace(b"Exif", b"skip"))
        at = end
    return b"".join([*pieces, data[at:]])


def _check(count: int, limit: int, unit: str) -> None:
    if count > limit:
        raise BadRequest(
            f"The image holds more than {limit} {unit}, which no picture needs. "
            "Save it again as JPEG or PNG, and use that file."
        )
