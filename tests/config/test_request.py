from __future__ import annotations

import dataclasses
import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from junk import JUNK

from lightx2v.config.lora_spec import LoraSpec
from lightx2v.config.request import DEFAULT_NEGATIVE_PROMPT, MAX_PROMPT, MAX_TOKENS, Request, clean_text
from lightx2v.errors import BadRequest

LORAS = (LoraSpec(expert="high", path="a.safetensors"), LoraSpec(expert="low", path="o/r/b.safetensors", strength=0.5))
DISTILLED = {"denoising_step_list": (1000, 750, 500, 250), "boundary_step_index": 2, "enable_cfg": False}


def refused(**changes: object) -> str:
    with pytest.raises(BadRequest) as caught:
        Request(**{"prompt": "a cat", **changes})  # type: ignore[arg-type]
    return str(caught.value)


def test_the_defaults_are_480p_for_five_seconds() -> None:
    request = Request(prompt="a cat")
    assert request.latent_shape == (16, 21, 60, 104)
    assert request.tokens == 32_760
    assert request.seconds == 81 / 16
    assert not request.distilled


def test_720p_has_the_tokens_of_the_reference() -> None:
    request = Request(prompt="a cat", height=720, width=1280)
    assert (request.latent_shape, request.tokens) == ((16, 21, 90, 160), 75_600)


def test_it_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Request(prompt="a cat").seed = 1  # type: ignore[misc]


@pytest.mark.parametrize(
    ("field", "value", "nearest"),
    [
        ("height", 481, "480"),
        ("height", 489, "496"),
        ("width", 0, "32"),
        ("width", -16, "32"),
        ("width", 10**6, "4096"),
        ("height", 16, "32"),
        ("frames", 80, "81"),
        ("frames", 0, "1"),
        ("frames", 82, "81"),
        ("frames", 10**9, "1001"),
        ("steps", 0, "1"),
        ("steps", 10_000, "200"),
        ("fps", 0, "1"),
        ("fps", 1000, "120"),
        ("fps", math.inf, "120"),
        ("fps", 10**400, "120"),
        ("shift", 0, "0.01"),
        ("shift", -3, "0.01"),
        ("seed", -2, "-1"),
        ("seed", 2**32, str(2**32 - 1)),
        pytest.param("seed", 10**5000, str(2**32 - 1), id="seed-of-5000-digits"),
        ("boundary", 1.5, "1"),
        ("guidance", (3.0, 1e9), "100"),
        ("height", 480.5, "480"),
    ],
)
def test_a_number_out_of_range_is_refused_with_the_nearest_valid_one(field: str, value: object, nearest: str) -> None:
    message = refused(**{field: value})
    assert message.startswith(f"{field} is ")
    assert message.endswith(f"Nearest valid value: {nearest}.")


@given(field=st.sampled_from(["height", "width", "frames", "steps"]), value=st.integers(-(10**7), 10**7))
def test_the_nearest_value_it_names_is_valid_and_none_is_nearer(field: str, value: int) -> None:
    size = {"height": 32, "width": 32, "frames": 1}
    try:
        Request(prompt="a cat", **{**size, field: value})
        return
    except BadRequest as error:
        nearest = int(str(error).rsplit(" ", 1)[1].rstrip("."))
    assert getattr(Request(prompt="a cat", **{**size, field: nearest}), field) == nearest
    distance = abs(nearest - value)
    for other in (value - distance + 1, value + distance - 1):
        with pytest.raises(BadRequest):
            Request(prompt="a cat", **{**size, field: other})


@pytest.mark.parametrize(
    "field", ["seed", "height", "width", "frames", "steps", "fps", "shift", "boundary", "guidance"]
)
@pytest.mark.parametrize("value", [True, "7", [], {}, math.nan, object(), b"77"])
def test_what_is_no_number_is_refused(field: str, value: object) -> None:
    assert refused(**{field: value}).startswith(f"{field} is ")


@pytest.mark.parametrize("value", [1.5, 7.0, None])
def test_a_seed_is_whole(value: object) -> None:
    assert "whole number" in refused(seed=value)


@pytest.mark.parametrize("seed", [-1, 0, 42, 2**32 - 1])
def test_every_seed_that_a_generator_takes_is_valid(seed: int) -> None:
    assert Request(prompt="a cat", seed=seed).seed == seed


def test_too_many_tokens_are_refused_with_sizes_that_fit() -> None:
    message = refused(height=4096, width=4096)
    assert f"the limit is {MAX_TOKENS}" in message
    assert "Nearest: 13 frames at this size or 1776x1776 at this length." in message
    assert Request(prompt="a cat", height=4096, width=4096, frames=13).tokens <= MAX_TOKENS
    assert Request(prompt="a cat", height=1776, width=1776).tokens <= MAX_TOKENS


def test_a_lower_ceiling_names_what_fits_below_it() -> None:
    with pytest.raises(BadRequest, match="the limit is 1000. Nearest: 96x96 at this length"):
        Request(prompt="a cat").check_tokens(1000)


def test_one_guidance_means_both_experts() -> None:
    assert Request(prompt="a cat", guidance=3).guidance == (3.0, 3.0)  # type: ignore[arg-type]
    assert Request(prompt="a cat", guidance=[4, 3]).guidance == (4.0, 3.0)  # type: ignore[arg-type]
    assert "high-noise expert, low-noise expert" in refused(guidance=[1, 2, 3])
    assert "number" in refused(guidance=(1.0, math.nan))


@pytest.mark.parametrize("prompt", ["", "  \n\t", "\0", "\ud800"])
def test_a_prompt_that_says_nothing_is_refused(prompt: str) -> None:
    assert refused(prompt=prompt).startswith("prompt is ")


@pytest.mark.parametrize("field", ["prompt", "negative_prompt"])
def test_texts_have_a_length_limit_and_are_text(field: str) -> None:
    assert getattr(Request(**{"prompt": "a cat", field: "x" * MAX_PROMPT}), field) == "x" * MAX_PROMPT
    assert f"{MAX_PROMPT + 1} characters; the limit is {MAX_PROMPT}" in refused(**{field: "x" * (MAX_PROMPT + 1)})
    assert refused(**{field: b"cat"}).startswith(f"{field} is ")


def test_nul_and_lone_surrogates_are_removed_and_all_else_is_kept() -> None:
    text = "a\0 猫 🐈 \u202eשלום\u202c \ud83d\ude00 \ud800b\udc00 <b>&amp;</b>\n"
    assert Request(prompt=text).prompt == "a 猫 🐈 \u202eשלום\u202c 😀 b <b>&amp;</b>\n"


@given(st.text(st.characters(), max_size=50))
def test_cleaned_text_can_be_encoded_and_stays_as_it_is(text: str) -> None:
    cleaned = clean_text(text)
    assert cleaned.encode("utf-8").decode("utf-8") == cleaned == clean_text(cleaned)


def test_an_empty_negative_prompt_means_the_models_default() -> None:
    assert Request(prompt="a cat").negative_text == DEFAULT_NEGATIVE_PROMPT
    assert Request(prompt="a cat", negative_prompt="blur").negative_text == "blur"
    assert Request(prompt="a cat", negative_prompt=" ").negative_text == ""
    assert Request(prompt="a cat", enable_cfg=False).negative_text is None


def test_guidance_of_one_needs_no_negative_forward() -> None:
    assert Request(prompt="a cat", guidance=(1.0, 3.0)).guided == (False, True)
    assert Request(prompt="a cat", guidance=(1.0, 1.0)).negative_text is None
    assert Request(prompt="a cat", enable_cfg=False).guided == (False, False)


def test_each_task_takes_its_images() -> None:
    Request(prompt="a cat", task="i2v", image_path="a.png")
    Request(prompt="a cat", task="flf2v", image_path="a.png", last_frame_path="b.png")
    Request(prompt="a cat", image_path="", last_frame_path="")
    assert "needs image_path" in refused(task="i2v")
    assert "needs image_path" in refused(task="i2v", image_path="")
    assert "needs last_frame_path" in refused(task="flf2v", image_path="a.png")
    assert "t2v takes no image" in refused(image_path="a.png")
    assert "Use task flf2v" in refused(task="i2v", image_path="a.png", last_frame_path="b.png")
    for nobodys in ("a\0.png", "\ud800.png"):
        assert "image_path is" in refused(task="i2v", image_path=nobodys)
    assert "task is 't2i'" in refused(task="t2i")


def test_the_boundary_is_the_tasks_official_one_unless_given() -> None:
    assert Request(prompt="a cat").boundary == 0.875
    assert Request(prompt="a cat", task="i2v", image_path="a.png").boundary == 0.9
    assert Request(prompt="a cat", boundary=0.5).boundary == 0.5


def test_a_step_list_makes_it_distilled() -> None:
    request = Request(prompt="a cat", steps=40, boundary=0.875, **DISTILLED)
    assert request.distilled
    assert (request.steps, request.boundary, request.boundary_step_index) == (4, None, 2)


@pytest.mark.parametrize(
    "steps",
    [
        [],
        [1000, 1000],
        [250, 500],
        [1001],
        [0],
        [1000.0],
        [True],
        "1000",
        b"\xc8\x64",
        1000,
        ["1000"],
        list(range(500, 0, -1)),
    ],
)
def test_a_step_list_falls_from_1000_to_1(steps: object) -> None:
    assert refused(denoising_step_list=steps, boundary_step_index=0).startswith("denoising_step_list is ")


@pytest.mark.parametrize("index", [None, -1, 4, True, 1.0])
def test_the_experts_change_at_a_step_of_the_list(index: object) -> None:
    assert refused(**DISTILLED | {"boundary_step_index": index}).startswith("boundary_step_index is ")


def test_a_boundary_step_without_a_list_is_refused() -> None:
    assert "null without a denoising_step_list" in refused(boundary_step_index=2)


def test_resize_modes_are_those_of_the_framing() -> None:
    request = Request(prompt="a cat", task="i2v", image_path="a.png", resize_mode="fixed_shape")
    assert request.resize_mode == "fixed_shape"
    assert "crop" in refused(resize_mode="stretch")


@pytest.mark.parametrize(
    "value",
    [
        {},
        {"expert": "high"},
        {"name": "middle", "path": "a"},
        {"name": "high_noise_model", "path": ""},
        "a",
        3,
        {"name": [], "path": "a"},
    ],
)
def test_a_lora_needs_an_expert_and_a_path(value: object) -> None:
    assert "LoRA" in refused(loras=[value])


@pytest.mark.parametrize("strength", [math.nan, math.inf, 1e6, "1", True])
def test_a_lora_strength_is_a_finite_number(strength: object) -> None:
    assert "LoRA strength is" in refused(loras=[{"name": "low_noise_model", "path": "a", "strength": strength}])


def test_a_lora_reads_and_writes_lightx2vs_form() -> None:
    data = {"name": "low_noise_model", "path": "o/r/f.safetensors", "strength": -0.5}
    assert LoraSpec.from_json(data) == LoraSpec(expert="low", path="o/r/f.safetensors", strength=-0.5)
    assert LoraSpec.from_json(data).to_json() == data
    assert LoraSpec.from_json({"expert": "low", "path": "p"}) == LoraSpec(expert="low", path="p", strength=1.0)
    with pytest.raises(BadRequest, match="Did you mean 'strength'"):
        LoraSpec.from_json(data | {"strenght": 1})


REQUESTS = st.builds(
    Request,
    prompt=st.text(st.characters(), min_size=1, max_size=30).map(lambda text: "a cat " + text),
    negative_prompt=st.text(max_size=30),
    seed=st.integers(-1, 2**32 - 1),
    height=st.integers(2, 40).map(lambda n: 16 * n),
    width=st.integers(2, 40).map(lambda n: 16 * n),
    frames=st.integers(0, 30).map(lambda n: 4 * n + 1),
    fps=st.floats(1, 120),
    shift=st.floats(0.01, 100),
    guidance=st.tuples(st.floats(-100, 100), st.floats(-100, 100)),
    enable_cfg=st.booleans(),
    boundary=st.none() | st.floats(0, 1),
    loras=st.none() | st.just(()) | st.just(LORAS),
)


@given(request=REQUESTS, distilled=st.booleans())
def test_json_gives_the_same_request_back(request: Request, distilled: bool) -> None:
    if distilled:
        request = dataclasses.replace(request, **DISTILLED)
    assert Request.from_json(json.loads(json.dumps(request.to_json()))) == request
    assert Request.from_json(request.to_json()).to_json() == request.to_json()


def test_json_with_an_unknown_key_names_the_nearest() -> None:
    with pytest.raises(BadRequest, match="request: unknown key 'promt'. Did you mean 'prompt'"):
        Request.from_json({"promt": "a cat"})
    with pytest.raises(BadRequest, match="no prompt"):
        Request.from_json({"seed": 1})
    with pytest.raises(BadRequest, match="expected an object"):
        Request.from_json([])


@pytest.mark.slow
@given(st.dictionaries(st.sampled_from([field.name for field in dataclasses.fields(Request)]), JUNK))
def test_junk_is_a_bad_request_and_nothing_else(data: dict[str, object]) -> None:
    try:
        Request.from_json({"prompt": "a cat"} | data)
    except BadRequest as error:
        assert len(str(error)) < 400
        str(error).encode("utf-8")


def test_a_higher_rate_keeps_the_duration_and_says_how_many_frames_are_written() -> None:
    request = Request(prompt="a cat", interpolated_fps=32)
    assert (request.interpolator, request.video_fps, request.video_frames) == ("rife", 32.0, 162)
    assert (request.frames, request.fps, request.seconds) == (81, 16.0, 81 / 16)
    plain = Request(prompt="a cat", interpolation="ffmpeg", keep_original=True)
    assert (plain.interpolator, plain.keeps_original, plain.video_fps, plain.video_frames) == (None, False, 16.0, 81)
    assert Request(prompt="a cat", interpolated_fps=24, interpolation="ffmpeg", keep_original=True).keeps_original
    for asked in (request, plain):
        assert Request.from_json(asked.to_json()) == asked


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"interpolated_fps": 16}, "interpolated_fps is 16.0; expected more than fps, which is 16, and at most"),
        ({"interpolated_fps": 12, "fps": 24}, "expected more than fps, which is 24"),
        ({"interpolated_fps": 24, "fps": 2}, "at most 8 times it"),
        ({"interpolated_fps": 240}, "Nearest valid value: 120"),
        ({"interpolated_fps": float("nan")}, "expected a number from 1 to 120"),
        ({"interpolated_fps": True}, "expected a number from 1 to 120"),
        ({"interpolated_fps": "32"}, "expected a number from 1 to 120"),
        ({"interpolation": "film"}, "interpolation is 'film'; expected null, rife or ffmpeg"),
        ({"keep_original": 1}, "keep_original is 1; expected true or false"),
    ],
)
def test_an_impossible_interpolation_is_refused(changes: dict[str, object], message: str) -> None:
    assert message in refused(**changes)
