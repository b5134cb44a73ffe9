from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightx2v.errors import BadRequest
from lightx2v.media.framing import BUCKETS, RESIZE_MODES, framing_of, output_size

SIDES = st.integers(16, 6000)
REQUESTED = st.sampled_from([(480, 832), (832, 480), (720, 1280), (544, 960), (64, 64), (480, 480)])


@pytest.mark.parametrize(
    ("area", "size", "expected"),
    [
        ((720, 1280), (1920, 1080), (720, 1280)),
        ((720, 1280), (1000, 1000), (960, 960)),
        ((720, 1280), (768, 1024), (1104, 816)),
        ((480, 832), (1920, 1080), (464, 832)),
        ((480, 832), (1000, 1000), (624, 624)),
        ((832, 480), (1080, 1920), (832, 464)),
    ],
)
def test_the_published_examples_of_the_default_rule(area, size, expected):
    assert output_size(size, *area) == expected


@given(st.tuples(SIDES, SIDES).filter(lambda s: max(s) <= 8 * min(s)), REQUESTED)
def test_the_default_rule_is_the_reference_formula(size, requested):
    """The reference, in double precision; where that lands on a cell's edge, rounding noise decides: left out."""
    (width, height), area = size, requested[0] * requested[1]
    for side, squared in zip(output_size(size, *requested), (height / width, width / height), strict=True):
        cells = math.sqrt(area * squared) / 16
        if abs(cells - round(cells)) > 1e-9:
            assert side == max(1, math.floor(cells)) * 16


@given(REQUESTED, st.integers(1, 5))
def test_a_picture_of_the_requested_shape_gets_exactly_the_requested_size(requested, factor):
    height, width = requested
    assert output_size((width * factor, height * factor), height, width) == requested


@given(st.tuples(SIDES, SIDES), REQUESTED, st.sampled_from([None, *RESIZE_MODES]))
def test_every_mode_gives_whole_cells_and_a_box_inside_the_picture(size, requested, mode):
    try:
        framing = framing_of(size, *requested, mode)
    except BadRequest:
        assert max(size) > 8 * min(size)
        return
    left, top, right, bottom = framing.box
    assert framing.height % 16 == framing.width % 16 == 0
    assert framing.height >= 16 and framing.width >= 16
    assert 0 <= left < right <= size[0] and 0 <= top < bottom <= size[1]


@given(st.tuples(SIDES, SIDES), REQUESTED, st.sampled_from(RESIZE_MODES))
def test_cropping_keeps_shapes_and_loses_one_pair_of_sides_only(size, requested, mode):
    try:
        framing = framing_of(size, *requested, mode)
    except BadRequest:
        return
    left, top, right, bottom = framing.box
    assert (right - left, bottom - top)[0] == size[0] or bottom - top == size[1]
    assert abs(left - (size[0] - right)) <= 1 and abs(top - (size[1] - bottom)) <= 1
    # The shape is right to the pixel.
    short = abs((right - left) * framing.height / framing.width - (bottom - top))
    assert min(short, short * framing.width / framing.height) <= 1


def test_the_default_uses_the_whole_picture_without_antialiasing():
    framing = framing_of((768, 1024), 720, 1280)
    assert framing.box == (0, 0, 768, 1024)
    assert (framing.height, framing.width, framing.antialias) == (1104, 816, False)


@pytest.mark.parametrize("mode", ["crop", "fixed_shape"])
def test_crop_gives_exactly_the_requested_size_from_the_centre(mode):
    framing = framing_of((1000, 1000), 480, 832, mode)
    assert (framing.height, framing.width, framing.antialias) == (480, 832, True)
    assert framing.box == (0, 211, 1000, 788)


def test_crop_takes_any_shape_of_picture():
    assert output_size((3000, 20), 480, 832, "crop") == (480, 832)


@pytest.mark.parametrize(
    ("mode", "size", "requested", "expected"),
    [
        ("adaptive", (1920, 1080), (480, 832), (480, 832)),
        ("adaptive", (1920, 1080), (544, 960), (544, 960)),
        ("adaptive", (1920, 1080), (720, 1280), (720, 1280)),
        ("adaptive", (1080, 1920), (480, 832), (832, 480)),
        ("adaptive", (1000, 1000), (720, 1280), (960, 960)),
        ("adaptive", (1000, 1000), (544, 960), (576, 576)),
        ("fixed_min_area", (1080, 1920), (720, 1280), (832, 480)),
        ("fixed_max_area", (1000, 1000), (480, 832), (960, 960)),
        ("keep_ratio_fixed_area", (1000, 1000), (480, 832), (624, 624)),
        ("keep_ratio_fixed_area", (768, 1024), (720, 1280), (1104, 816)),
        ("fixed_min_side", (1920, 1080), (480, 832), (480, 848)),
        ("fixed_min_side", (1080, 1920), (720, 1280), (1280, 720)),
    ],
)
def test_lightx2v_modes(mode, size, requested, expected):
    assert output_size(size, *requested, mode) == expected


def test_buckets_have_three_tiers_of_whole_cells_and_their_shape():
    for shape, sizes in BUCKETS.items():
        assert len(sizes) == 3
        for height, width in sizes:
            assert height % 16 == width % 16 == 0
            assert min(BUCKETS, key=lambda other: abs(other - height / width)) == shape


@pytest.mark.parametrize("mode", [None, "keep_ratio_fixed_area", "fixed_min_side"])
def test_a_picture_too_long_to_keep_its_shape_is_refused_with_a_way_out(mode):
    with pytest.raises(BadRequest, match='3000x20.*"crop"'):
        output_size((3000, 20), 480, 832, mode)


def test_an_unknown_mode_is_refused():
    with pytest.raises(ValueError, match="fit"):
        output_size((100, 100), 480, 832, "fit")
