"""Which part of a picture the model sees, and at what size: pure arithmetic, without torch.

The pipeline cuts and resizes with it, and the page draws its crop preview from it, so both always agree. The result
depends on the picture's size, the requested size and the mode only; never on the machine or the number of GPUs.

    mode                    output size                                         picture
    None                    area height x width, shape of the picture           stretched slightly, as in Wan2.2
    crop, fixed_shape       height x width                                      centre crop
    keep_ratio_fixed_area   area height x width, shape of the picture           centre crop (a few pixels)
    fixed_min_side          short side min(height, width), shape of the picture centre crop (a few pixels)
    adaptive                bucket of the nearest shape and of the nearest area centre crop
    fixed_min_area          smallest bucket of the nearest shape                centre crop
    fixed_max_area          largest bucket of the nearest shape                 centre crop

All but `crop` are LightX2V's modes; there, `resolution` and `fixed_area` pick the tier that height x width picks here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..errors import BadRequest

CELL = 16
"""Pixels per side of one token: the VAE's stride 8 times the patch size 2. Every output side is a multiple."""

BUCKETS = {
    2 / 3: ((480, 832), (544, 960), (720, 1280)),
    3 / 2: ((832, 480), (960, 544), (1280, 720)),
    1.0: ((480, 480), (576, 576), (960, 960)),
}
"""Shape (height / width) -> (height, width) of the 480p, 540p and 720p tiers."""

TIER_AREAS = (480 * 832, 544 * 960, 720 * 1280)

RESIZE_MODES = (
    "crop",
    "adaptive",
    "keep_ratio_fixed_area",
    "fixed_min_area",
    "fixed_max_area",
    "fixed_shape",
    "fixed_min_side",
)

LONGEST = 8
"""Largest ratio of the sides of a picture whose shape is kept; a longer one leaves no room for tokens."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Framing:
    """`box` is what is used of the picture: left, top, right, bottom in its own pixels, as PIL's crop takes it."""

    box: tuple[int, int, int, int]
    height: int
    width: int
    antialias: bool


def frame_picture(size: tuple[int, int], height: int, width: int, mode: str | None = None) -> Framing:
    """What the model will see of a picture of `size` (width, height: as PIL gives it) when asked for height x width.

    Without a mode the whole picture is stretched by bicubic interpolation without antialiasing, as in the reference.
    """
    out_height, out_width = output_size(size, height, width, mode)
    box = (0, 0, *size) if mode is None else _centre_box(size, out_height, out_width)
    return Framing(box=box, height=out_height, width=out_width, antialias=mode is not None)


def output_size(size: tuple[int, int], height: int, width: int, mode: str | None = None) -> tuple[int, int]:
    """Height and width of the video made from a picture of `size` (width, height)."""
    if mode in ("crop", "fixed_shape"):
        return _to_cells(height), _to_cells(width)
    if mode in ("adaptive", "fixed_min_area", "fixed_max_area"):
        return _bucket(size, height * width, mode)
    _require_shape(size)
    picture_width, picture_height = size
    area = height * width
    if mode is None:
        # floor(sqrt(area * shape) / 16) in integers. In floating point, as in the reference, a picture of exactly the
        # requested shape can come out one cell smaller: 832x480 would give 464 rows.
        rows = math.isqrt(area * picture_height // (picture_width * CELL**2))
        columns = math.isqrt(area * picture_width // (picture_height * CELL**2))
        return max(1, rows) * CELL, max(1, columns) * CELL
    shape = picture_height / picture_width
    if mode == "keep_ratio_fixed_area":
        return _to_cells(round(math.sqrt(area * shape))), _to_cells(round(math.sqrt(area / shape)))
    if mode == "fixed_min_side":
        short = min(height, width)
        if shape < 1:
            return _to_cells(short), _to_cells(round(short / shape))
        return _to_cells(round(short * shape)), _to_cells(short)
    raise ValueError(f"unknown resize mode {mode!r}")


def _to_cells(side: int) -> int:
    return max(CELL, side // CELL * CELL)


def _bucket(size: tuple[int, int], area: int, mode: str) -> tuple[int, int]:
    width, height = size
    sizes = BUCKETS[min(BUCKETS, key=lambda shape: abs(shape - height / width))]
    if mode == "fixed_min_area":
        return sizes[0]
    if mode == "fixed_max_area":
        return sizes[-1]
    tier = min(range(len(TIER_AREAS)), key=lambda i: abs(TIER_AREAS[i] - area))
    return sizes[tier]


def _centre_box(size: tuple[int, int], height: int, width: int) -> tuple[int, int, int, int]:
    """The largest centred box of shape height : width."""
    picture_width, picture_height = size
    if picture_height * width > picture_width * height:
        box_width, box_height = picture_width, max(1, round(picture_width * height / width))
    else:
        box_width, box_height = max(1, round(picture_height * width / height)), picture_height
    left, top = (picture_width - box_width) // 2, (picture_height - box_height) // 2
    return left, top, left + box_width, top + box_height


def _require_shape(size: tuple[int, int]) -> None:
    width, height = size
    if max(width, height) > LONGEST * min(width, height):
        raise BadRequest(
            f"The picture is {width}x{height}, more than {LONGEST} times longer than wide; a video of that shape "
            'cannot be made. Crop the picture, or set resize_mode to "crop".'
        )
