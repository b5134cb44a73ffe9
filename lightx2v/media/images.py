"""Input images from users: an upload becomes a clean RGB image or a BadRequest, never another error.

`load_image` goes by the content, not by the name. It reads JPEG, PNG and WebP; AVIF where this Pillow can, and HEIC
where the package pillow-heif is installed. A decoder sees no more of a file than the pixels need (image_parts.py).
The size is checked from the header before a pixel is decoded, because 400 kB of PNG can hold an image of 400 MB.
"""

import importlib
import io
import os
import struct
import threading
import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, features

from ..errors import BadRequest, OutputError, short_path
from .image_kinds import describe, readable_kind
from .image_parts import exif_orientation, needed_parts

_NAMES = {"JPEG": "JPEG", "PNG": "PNG", "WEBP": "WebP", "AVIF": "AVIF", "HEIF": "HEIC"}
_SUFFIXES = {"JPEG": ".jpg", "PNG": ".png", "WEBP": ".webp", "AVIF": ".avif", "HEIF": ".heic"}
MAX_BYTES = 20 * 2**20
MAX_PIXELS = 64_000_000
"""Above the 50 megapixels of phone cameras; at most 256 MB while an image with alpha is decoded."""
DECODE_LOCK = threading.Lock()
"""Held while an image is decoded only to check or preview it: a quarter of a gigabyte at a time."""
MIN_SIDE = 16
MAX_RATIO = 10

_BROKEN = (OSError, ValueError, SyntaxError, EOFError, TypeError, IndexError, KeyError, OverflowError)
_BROKEN += (struct.error, zlib.error, MemoryError, RuntimeError)
"""The errors that decoders raise on damaged files."""

_TRANSPOSE = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def load_image(source: str | Path | bytes) -> Image.Image:
    """The first frame of an image as RGB: rotated by its EXIF, transparency on white, 16 bits scaled."""
    data = source if isinstance(source, bytes) else _read(Path(os.path.expanduser(source)))
    if len(data) > MAX_BYTES:
        raise BadRequest(f"The image is {len(data) / 2**20:.1f} MB; at most {MAX_BYTES / 2**20:.0f} MB are accepted.")
    kind = readable_kind(data)
    reader = _reader(kind)
    if kind is None or reader is None:
        what, advice = describe(data)
        *names, last = (name for kind, name in _NAMES.items() if _reader(kind) is not None)
        raise BadRequest(f"The file is {what}. Only {', '.join(names)} and {last} images can be read. {advice}")
    pixels, orientation = needed_parts(kind, data)
    try:
        image = reader(io.BytesIO(pixels))
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise BadRequest(
            f"The image has too many pixels; at most {MAX_PIXELS / 1e6:.0f} million are allowed."
        ) from None
    except _BROKEN:
        raise _broken() from None
    _check_size(image.width, image.height)
    try:
        image.load()
        _check_size(image.width, image.height)  # pillow-heif may find another size in the pixels than in the header
        # Pillow gives an AVIF's rotation, which its container holds, as EXIF; pillow-heif has rotated the image itself.
        turn = _TRANSPOSE.get(exif_orientation(image.info.get("exif") or b"") or orientation)
        return _to_rgb(image if turn is None else image.transpose(turn))
    except _BROKEN:
        raise _broken() from None


def store_image(source: str | Path | bytes, stem: Path) -> Path:
    """Check an image with `load_image` and store its bytes as `stem` plus the suffix of its format."""
    data = source if isinstance(source, bytes) else _read(Path(source))
    with DECODE_LOCK:
        load_image(data)
    target = stem.with_name(stem.name + _SUFFIXES[readable_kind(data) or "PNG"])
    try:
        target.write_bytes(data)
    except OSError as error:
        target.unlink(missing_ok=True)
        raise OutputError(f"The image could not be stored as {short_path(target)}: {error.strerror}.") from None
    return target


def jpeg(source: Image.Image | Any, *, max_side: int | None = None) -> bytes:
    """An image, or a uint8 (H, W, 3) array, as JPEG bytes; smaller where a side is longer than `max_side`."""
    image = source if isinstance(source, Image.Image) else Image.fromarray(np.asarray(source))
    if max_side is not None and max(image.size) > max_side:
        image = image.copy()
        image.thumbnail((max_side, max_side))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=85)
    return buffer.getvalue()


def _reader(kind: str | None) -> Callable[[io.BytesIO], Image.Image] | None:
    """What opens images of a kind; None where this Pillow cannot and no package for it is installed."""
    if kind == "HEIF":
        try:
            return importlib.import_module("pillow_heif").HeifImageFile
        except ImportError:
            return None
    if kind is None or kind == "AVIF" and not features.check("avif"):
        return None
    return partial(Image.open, formats=(kind,))


def _read(path: Path) -> bytes:
    try:
        if not path.is_file():  # a folder; or a pipe or a device, which may never end
            raise BadRequest(f"There is no image file {short_path(path)}.")
        with path.open("rb") as file:
            return file.read(MAX_BYTES + 1)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        reason = getattr(error, "strerror", None) or "not a usable name"
        raise BadRequest(f"The image {short_path(path)} cannot be read: {reason}.") from None


def _check_size(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise BadRequest(
            f"The image is {width}x{height}, {width * height / 1e6:.0f} million pixels; "
            f"at most {MAX_PIXELS / 1e6:.0f} million are accepted. Make it smaller first."
        )
    if min(width, height) < MIN_SIDE:
        raise BadRequest(
            f"The image is {width}x{height}; each side must have at least {MIN_SIDE} pixels. Take a larger one."
        )
    if max(width, height) > MAX_RATIO * min(width, height):
        raise BadRequest(
            f"The image is {width}x{height}; its long side may be at most {MAX_RATIO} times its short side. Crop it."
        )


def _broken() -> BadRequest:
    return BadRequest("The image is damaged or incomplete. Save it again as JPEG or PNG, and use that file.")


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16-bit grey: Pillow's own conversion clips at 255 instead of scaling
        grey = np.asarray(image, dtype=np.float32) / 257
        image = Image.fromarray(np.round(grey).clip(0, 255).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    image = image.convert("RGB")
    image.info.clear()
    return image
