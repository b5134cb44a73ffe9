"""Read an mp4 file's boxes: size, rate, number of frames, and the settings of the run that made it.

There is no decoder, every length is checked and every read is bounded, so this is safe on a file from anywhere. An mp4
is a row of boxes `length(4) type(4) content`, and some boxes hold boxes (ISO/IEC 14496-12). The ones read here:

    moov ┬ udta/meta/ilst/©cmt/data                 the comment: {"lightx2v": settings} as JSON
         └ trak/mdia ┬ hdlr mdhd                    "vide", ticks per second
                     └ minf/stbl ┬ stsd             width, height
                                 └ stts             frames and their length in ticks
"""

import json
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from ..errors import BadRequest, short_path

SETTINGS_KEY = "lightx2v"
_MAX_MOOV = 16 * 2**20
_MAX_BOXES = 10_000
_COMMENT = b"\xa9cmt"


@dataclass(frozen=True, slots=True, kw_only=True)
class VideoInfo:
    """Size, rate and length of a video."""

    width: int
    height: int
    frames: int
    fps: float

    def __str__(self) -> str:
        return f"{self.width}x{self.height}, {self.frames} frames at {self.fps:g} fps"


def probe(path: str | Path) -> VideoInfo:
    """Size, rate and length of the first video track. BadRequest where there is none."""
    moov = _read_moov(Path(path))
    try:
        for kind, trak in _children(moov):
            if kind == b"trak" and bytes(_find(trak, b"mdia", b"hdlr")[8:12]) == b"vide":
                return _track_info(trak)
    except (struct.error, ValueError):
        raise _not_mp4(path) from None
    raise BadRequest(f"{short_path(path, 1)} holds no video. Give an mp4 file that LightX2V Studio made.")


def read_settings(path: str | Path) -> dict[str, Any]:
    """The settings that VideoWriter put into the file. BadRequest where there are none."""
    moov = _read_moov(Path(path))
    try:
        meta = _find(moov, b"udta", b"meta")
        comment = bytes(_find(meta[4:], b"ilst", _COMMENT, b"data")[8:])
        settings = json.loads(comment)[SETTINGS_KEY]
    except (struct.error, ValueError, KeyError, TypeError, RecursionError):
        raise BadRequest(
            f"{short_path(path, 1)} holds no settings. Give an mp4 file as LightX2V Studio wrote it; other programs "
            "drop the settings when they save a video."
        ) from None
    if not isinstance(settings, dict):
        raise BadRequest(f"The settings in {short_path(path, 1)} are damaged: expected a JSON object.")
    return settings


def _track_info(trak: memoryview) -> VideoInfo:
    header = _find(trak, b"mdia", b"mdhd")
    (ticks,) = struct.unpack_from(">I", header, 20 if header[0] == 1 else 12)  # version 1 has 64-bit dates before it
    table = _find(trak, b"mdia", b"minf", b"stbl")
    width, height = struct.unpack_from(">HH", _find(table, b"stsd"), 8 + 32)
    times = _find(table, b"stts")
    (runs,) = struct.unpack_from(">I", times, 4)
    frames = length = 0
    for count, delta in struct.iter_unpack(">II", times[8 : 8 + 8 * runs]):
        frames += count
        length += count * delta
    return VideoInfo(width=width, height=height, frames=frames, fps=frames * ticks / length if length else 0.0)


def _read_moov(path: Path) -> memoryview:
    try:
        if not path.is_file():
            raise BadRequest(f"There is no file {short_path(path)}.")
        with path.open("rb") as file:
            for _ in range(_MAX_BOXES):
                kind, length = _next_box(file)
                if kind == b"moov" and length <= _MAX_MOOV:
                    return memoryview(file.read(length))
                file.seek(length, os.SEEK_CUR)
    except (OSError, ValueError, struct.error, OverflowError):
        raise _not_mp4(path) from None
    raise _not_mp4(path)


def _next_box(file: IO[bytes]) -> tuple[bytes, int]:
    """Type and content length of the next box. struct.error at the end of the file."""
    length, kind = struct.unpack(">I4s", file.read(8))
    if length == 1:
        (length,) = struct.unpack(">Q", file.read(8))
        return kind, _positive(length - 16)
    return kind, _positive(length - 8)


def _positive(length: int) -> int:
    if length < 0:
        raise ValueError("box shorter than its header")
    return length


def _children(data: memoryview) -> Iterator[tuple[bytes, memoryview]]:
    at = 0
    while at + 8 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, at)
        if length < 8 or at + length > len(data):
            raise ValueError("box does not fit into its parent")
        yield kind, data[at + 8 : at + length]
        at += length


def _find(data: memoryview, *path: bytes) -> memoryview:
    """The first box at `path` below `data`. ValueError where there is none."""
    for wanted in path:
        data = next((child for kind, child in _children(data) if kind == wanted), memoryview(b""))
        if not data:
            raise ValueError(f"no box {wanted!r}")
    return data


def _not_mp4(path: str | Path) -> BadRequest:
    return BadRequest(f"{short_path(path, 1)} is not a complete mp4 file. Copy or download it again.")
