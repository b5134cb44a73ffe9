"""Framing of an input image: the part that the model sees, and its size. Pure arithmetic, without torch.

The engine crops and resizes with it, and the page draws its crop preview from it, so both always agree. The result
depends only on the image's size, the requested size and the mode, never on the machine or the number of GPUs.

    mode                    output size                                         image
    None                    area height x width, shape of the image             stretched slightly, as in Wan2.2
    crop, fixed_shape       height x width                                      centre crop
    keep_ratio_fixed_area   area height x width, shape of the image             centre crop (a few pixels)
    fixed_min_side          short side min(height, width), shape of the image   centre crop (a few pixels)
    adaptive                bucket of the nearest shape and of the nearest area centre crop
    fixed_min_area          smallest bucket of the nearest shape                centre crop
    fixed_max_area          largest bucket of the nearest shape                 centre crop

All but `crop` are LightX2V's modes. There, `resolution` and `fixed_area` select the tier; here, height x width does.
"""

import math
from dataclasses import dataclass

from ..errors import BadRequest

CELL = 16
"""Pixels per side of one token: the VAE's stride 8 times the patch size 2. Every output side is a multiple of it."""

BUCKETS = {
    2 / 3: ((480, 832), (544, 960), (720, 1280)),
    3 / 2: ((832, 480), (960, 544), (1280, 720)),
    1.0: ((480, 480), (576, 576), (960, 960)),
}
"""{shape (height / width): (height, width) of the 480p, 540p and 720p tiers}."""

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

MAX_RATIO = 8
"""Largest ratio of an image's sides where its shape is kept; a longer image leaves no room for tokens."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Framing:
    """`box` is the part of the image that is used: left, top, right, bottom in its own pixels, as for PIL's crop."""

    box: tuple[int, int, int, int]
    height: int
    width: int
    antialias: bool


def framing_of(size: tuple[int, int], height: int, width: int, mode: str | None = None) -> Framing:
    """The framing of an image of `size` (width, height, as in PIL) for a requested height x width.

    Without a mode the whole image is stretched by bicubic interpolation without antialiasing, as in the reference.
    """
    out_height, out_width = output_size(size, height, width, mode)
    box = (0, 0, *size) if mode is None else _centre_box(size, out_height, out_width)
    return Framing(box=box, height=out_height, width=out_width, antialias=mode is not None)


def output_size(size: tuple[int, int], height: int, width: int, mode: str | None = None) -> tuple[int, int]:
    """Height and width of the video for an image of `size` (width, height)."""
    if mode in ("crop", "fixed_shape"):
        return _to_cells(height), _to_cells(width)
    if mode in ("adaptive", "fixed_min_area", "fixed_max_area"):
        return _bucket(size, height * width, mode)
    _require_shape(size)
    image_width, image_height = size
    area = height * width
    if mode is None:
        # floor(sqrt(area * shape) / 16) in integers. In floating point, as in the reference, an image of exactly the
        # requested shape can come out one cell smaller: 832x480 would give 464 rows.
        rows = math.isqrt(area * image_height // (image_width * CELL**2))
        columns = math.isqrt(area * image_width // (image_height * CELL**2))
        return max(1, rows) * CELL, max(1, columns) * CELL
    shape = image_height / image_width
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
    image_width, image_height = size
    if image_height * width > image_width * height:
        box_width, box_height = image_width, max(1, round(image_width * height / width))
    else:
        box_width, box_height = max(1, round(image_height * width / height)), image_height
    left, top = (image_width - box_width) // 2, (image_height - box_height) // 2
    return left, top, left + box_width, top + box_height


def _require_shape(size: tuple[int, int]) -> None:
    width, height = size
    if max(width, height) > MAX_RATIO * min(width, height):
        raise BadRequest(
            f"The image is {width}x{height}; its long side may be at most {MAX_RATIO} times its short side. "
            'Crop the image, or set resize_mode to "crop".'
        )
