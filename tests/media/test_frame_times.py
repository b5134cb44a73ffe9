"""The new video lasts as long as the original, and its frames are at their true times."""

from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightx2v.media.frame_times import frame_count, frame_times


@pytest.mark.parametrize(
    ("fps", "expected"),
    [
        (32, [(0, 0), (0, 1 / 2), (1, 0), (1, 1 / 2), (2, 0), (2, 1 / 2), (3, 0), (3, 1 / 2), (4, 0), (4, 0)]),
        (24, [(0, 0), (0, 2 / 3), (1, 1 / 3), (2, 0), (2, 2 / 3), (3, 1 / 3), (4, 0), (4, 0)]),
        (20, [(0, 0), (0, 4 / 5), (1, 3 / 5), (2, 2 / 5), (3, 1 / 5), (4, 0)]),
    ],
)
def test_five_frames_at_sixteen(fps: float, expected: list[tuple[int, float]]) -> None:
    times = list(frame_times(5, 16, fps))
    assert [index for index, _ in times] == [index for index, _ in expected]
    assert [float(part) for _, part in times] == pytest.approx([part for _, part in expected])


@pytest.mark.parametrize(("fps", "count"), [(24, 122), (30, 152), (32, 162), (48, 243), (60, 304)])
def test_five_seconds_stay_five_seconds(fps: float, count: int) -> None:
    """81 frames at 16 a second are 5.0625 s."""
    assert frame_count(81, 16, fps) == count
    assert abs(count / fps - 81 / 16) <= 0.5 / fps


@given(
    frames=st.integers(1, 200),
    fps=st.sampled_from([8, 12, 15, 16, 23.976, 24, 29.97, 30]),
    more=st.fractions(1, 8, max_denominator=60),
)
def test_every_frame_is_at_its_time_and_the_last_one_stays(frames: int, fps: float, more: Fraction) -> None:
    new = float(fps * more)
    times = list(frame_times(frames, fps, new))
    assert len(times) == frame_count(frames, fps, new)
    rate, new_rate = Fraction(fps).limit_denominator(1001), Fraction(new).limit_denominator(1001)
    for number, (index, part) in enumerate(times):
        assert 0 <= part < 1 and 0 <= index <= frames - 1
        assert index + part == min(number * rate / new_rate, frames - 1)
