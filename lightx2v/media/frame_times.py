"""When the frames of a video are shown at another rate: each between two frames of the original, or on one of them."""

from collections.abc import Iterator
from fractions import Fraction
from math import floor


def exact_rate(fps: float) -> Fraction:
    """A rate as the fraction that the file holds."""
    return Fraction(fps).limit_denominator(1001)


def frame_count(frames: int, fps: float, new_fps: float) -> int:
    """How many frames at `new_fps` last as long as `frames` at `fps`, to the nearest frame."""
    return floor(frames * exact_rate(new_fps) / exact_rate(fps) + Fraction(1, 2))


def frame_times(frames: int, fps: float, new_fps: float) -> Iterator[tuple[int, Fraction]]:
    """For each frame of the new video (index, part): it is shown `part` (0 <= part < 1) of the way from the original's
    frame `index` to the next. Part 0 is the original's frame itself. After the last one, that one stays."""
    step, last = exact_rate(fps) / exact_rate(new_fps), frames - 1
    for number in range(frame_count(frames, fps, new_fps)):
        place = number * step
        yield (last, Fraction(0)) if place >= last else (floor(place), place % 1)
