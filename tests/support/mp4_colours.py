"""The colour tags of an H.264 mp4, read bit by bit: the `colr` atom of ISO/IEC 14496-12 and the VUI of ITU-T H.264."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

HIGH_PROFILES = (100, 110, 122, 244, 44, 83, 86, 118, 128)
"""Profiles with chroma_format_idc and what follows it in their sequence parameter set."""


@dataclass(frozen=True)
class Tags:
    """Code points of ITU-T H.273; 1 is BT.709, 2 is "unknown"."""

    primaries: int
    transfer: int
    matrix: int
    full_range: int


def colour_tags(file: Path) -> tuple[Tags | None, Tags | None]:
    """(what the container says, what the stream says). None where either says nothing."""
    sample = stsd_entry(file.read_bytes())
    boxes = dict(children(sample[78:]))  # after the fixed fields of a VisualSampleEntry
    return atom_tags(boxes.get(b"colr")), stream_tags(first_sps(boxes[b"avcC"]))


def stsd_entry(data: bytes) -> bytes:
    """The content of the first video track's one sample entry, `avc1`."""
    for kind, trak in children(descend(data, b"moov")):
        if kind == b"trak" and descend(trak, b"mdia", b"hdlr")[8:12] == b"vide":
            (kind, entry), *others = children(descend(trak, b"mdia", b"minf", b"stbl", b"stsd")[8:])
            assert kind == b"avc1" and not others
            return entry
    raise AssertionError("no video track")


def children(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    at = 0
    while at + 8 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, at)
        yield kind, data[at + 8 : at + length]
        at += length


def descend(data: bytes, *path: bytes) -> bytes:
    for wanted in path:
        data = next(child for kind, child in children(data) if kind == wanted)
    return data


def atom_tags(colr: bytes | None) -> Tags | None:
    if colr is None:
        return None
    kind, primaries, transfer, matrix, flags = struct.unpack(">4sHHHB", colr)
    assert kind == b"nclx" and flags & 0x7F == 0
    return Tags(primaries, transfer, matrix, flags >> 7)


def first_sps(avcc: bytes) -> bytes:
    """The first sequence parameter set of an `avcC` box, without its NAL header and emulation prevention bytes."""
    (length,) = struct.unpack_from(">H", avcc, 6)
    unit = avcc[8 : 8 + length]
    assert avcc[5] & 0x1F >= 1 and unit[0] & 0x1F == 7
    return unit[1:].replace(b"\0\0\3", b"\0\0")


class Bits:
    """Reads u(n) and ue(v) of H.264, section 9.1."""

    def __init__(self, data: bytes) -> None:
        self.text = "".join(f"{byte:08b}" for byte in data)
        self.at = 0

    def u(self, count: int) -> int:
        self.at += count
        return int(self.text[self.at - count : self.at], 2)

    def ue(self) -> int:
        zeros = self.text.index("1", self.at) - self.at
        self.at += zeros
        return self.u(zeros + 1) - 1


def stream_tags(sps: bytes) -> Tags | None:
    """`video_signal_type` of the VUI (H.264, sections 7.3.2.1.1 and E.1.1)."""
    bits = Bits(sps)
    profile = bits.u(8)
    bits.u(16)  # constraint flags, level
    bits.ue()
    if profile in HIGH_PROFILES:
        assert bits.ue() == 1, "4:2:0"
        assert (bits.ue(), bits.ue()) == (0, 0), "8 bits"
        assert bits.u(2) == 0, "no lossless bypass, no scaling matrix"
    bits.ue()
    order = bits.ue()
    if order == 0:
        bits.ue()
    assert order != 1
    bits.ue()
    bits.u(1)
    bits.ue(), bits.ue()  # width and height in macroblocks
    if not bits.u(1):  # fields
        bits.u(1)
    bits.u(1)
    if bits.u(1):  # cropping
        bits.ue(), bits.ue(), bits.ue(), bits.ue()
    if not bits.u(1):  # no VUI
        return None
    if bits.u(1) and bits.u(8) == 255:  # aspect ratio
        bits.u(32)
    if bits.u(1):  # overscan
        bits.u(1)
    if not bits.u(1):  # no video_signal_type
        return None
    bits.u(3)
    full_range = bits.u(1)
    primaries, transfer, matrix = (bits.u(8), bits.u(8), bits.u(8)) if bits.u(1) else (2, 2, 2)
    return Tags(primaries, transfer, matrix, full_range)
