"""Still pictures of a finished video: its thumbnail, and a sheet of small frames for the bar under a player.

    still(Path("outputs/ID.mp4"), "thumbnail")       outputs/ID.thumbnail.jpg, made at the first call

A picture is kept beside its video under the video's name, so that whoever removes `ID.*` removes it too.
"""

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Literal, get_args

from PIL import Image

from ..errors import OutputError, short_path
from .images import jpeg
from .mp4 import probe
from .video_writer import read_frame, read_frames

Still = Literal["thumbnail", "spritesheet"]
STILLS: tuple[Still, ...] = get_args(Still)
THUMBNAIL_SIDE = 360
SHEET_COLUMNS, SHEET_FRAMES, SHEET_SIDE = 5, 25, 240
"""A sheet has at most 25 frames, five in a row, none with a side of more than 240 pixels: below 300 kB."""
_ONE_AT_A_TIME = threading.Lock()
"""Held while a picture is made: ffmpeg decodes up to a whole video for it."""


def still(video: Path, kind: Still) -> Path:
    """The file of a picture of `video`. OutputError if it can be neither read nor made."""
    file = video.with_name(f"{video.stem}.{kind}.jpg")
    with _ONE_AT_A_TIME:
        if not file.is_file():
            _keep(_MAKERS[kind](video), file)
            if not video.is_file():  # removed meanwhile, with all files of its name but this one
                file.unlink(missing_ok=True)
                raise OutputError(f"{short_path(video, 1)} has just been removed.")
    return file


def thumbnail(video: Path) -> bytes:
    """The middle frame as a JPEG with sides of at most THUMBNAIL_SIDE."""
    return jpeg(read_frame(video, probe(video).frames // 2), max_side=THUMBNAIL_SIDE)


def spritesheet(video: Path) -> bytes:
    """Frames from the first to the last at equal distances, row by row, as one JPEG."""
    info = probe(video)
    count = min(SHEET_FRAMES, info.frames)
    shown = [round(number * (info.frames - 1) / max(1, count - 1)) for number in range(count)]
    scale = min(1.0, SHEET_SIDE / max(info.width, info.height))
    width, height = max(1, round(info.width * scale)), max(1, round(info.height * scale))
    sheet = Image.new("RGB", (width * min(SHEET_COLUMNS, count), height * -(-count // SHEET_COLUMNS)))
    for number, frame in enumerate(read_frames(video, shown, width, height)):
        row, column = divmod(number, SHEET_COLUMNS)
        sheet.paste(frame, (column * width, row * height))
    return jpeg(sheet)


_MAKERS: dict[Still, Callable[[Path], bytes]] = {"thumbnail": thumbnail, "spritesheet": spritesheet}


def _keep(data: bytes, file: Path) -> None:
    """Write the picture under another name first: a full disk or a kill leaves no half of one."""
    new = file.with_name(file.name + ".new")
    try:
        new.write_bytes(data)
        new.replace(file)
    except OSError as error:
        new.unlink(missing_ok=True)
        raise OutputError(
            f"The picture {short_path(file, 1)} could not be stored: {error.strerror}. Free some disk space."
        ) from None
