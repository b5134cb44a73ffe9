"""The fields of the page become requests, and requests become fields again."""

from __future__ import annotations

import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from app.backend.offer import Offer, settings_of
from app.exposure import PUBLIC_LIMITS, Exposure, Limits
from app.form import editor as editing
from app.form.demo_words import unknown_words
from app.form.editor import form_of
from app.form.examples import COUNT, PICTURES_SHOWN
from app.form.fields import (
    Form,
    fields_of,
    frames_for,
    low_noise_partner,
    mixed_pair,
    setting_fields,
    size_of,
    submit_plan,
)
from app.strings import TABLES, Words
from app.views.stage import departures
from lightx2v.config.lora_spec import LoraSpec
from lightx2v.config.magcache import forwards_of
from lightx2v.errors import BadRequest, LightX2VError, LoraError

PRESETS = {"demo_t2v_distill_lora": "t2v", "t2v_base": "t2v", "i2v_distill_fp8": "i2v", "demo_i2v_base": "i2v"}
HERE = Exposure()
OFFER = Offer()


def values(name: str = "demo_t2v_distill_lora", /, **changes: Any) -> dict[str, Any]:
    """Values as gradio's components give them, including floats and None."""
    base = {"task": PRESETS[name], "prompt": "a red ball", "seed": -1.0, "shape": "1:1", "videos": 1.0}
    return {**setting_fields(settings_of(name).request), "preset": name, **base, **changes}


def form(name: str = "demo_t2v_distill_lora", /, **changes: Any) -> Form:
    return form_of(values(name, **changes))


@pytest.mark.parametrize("preset", [name for name, task in PRESETS.items() if task == "t2v"])
def test_an_untouched_form_is_exactly_its_preset(preset: str) -> None:
    made = submit_plan(form(preset, seed=7.0), OFFER, HERE)
    resolved = settings_of(preset)
    expected = {**resolved.request, "prompt": "a red ball", "seed": 7}
    assert {name: getattr(made.requests[0], name) for name in expected} == expected
    assert replace(made.config, cpu_offload=resolved.engine.cpu_offload) == resolved.engine


def test_every_field_reaches_the_request() -> None:
    changes = {
        "width": 128.0, "height": 64.0, "frames": 9.0, "fps": 8.0, "shift": 3.0, "enable_cfg": True,
        "guidance_high": 2.0, "guidance_low": 1.5, "denoising_step_list": "[900, 600，300]", "boundary_step_index": 1.0,
        "negative_prompt": "blur", "seed": 5.0, "sampler": "lcm", "interpolated_fps": 30.0, "interpolation": "ffmpeg",
        "keep_original": True,
    }  # fmt: skip
    request = submit_plan(form(**changes), OFFER, HERE).requests[0]
    assert (request.width, request.height, request.frames, request.fps) == (128, 64, 9, 8.0)
    assert (request.shift, request.enable_cfg, request.guidance) == (3.0, True, (2.0, 1.5))
    assert (request.denoising_step_list, request.boundary_step_index) == ((900, 600, 300), 1)
    assert (request.negative_prompt, request.seed, request.sampler) == ("blur", 5, "lcm")
    assert (request.interpolated_fps, request.interpolation, request.keep_original) == (30.0, "ffmpeg", True)


def test_a_run_comes_back_into_the_fields_and_out_again() -> None:
    first = submit_plan(form("t2v_base", steps=12.0, guidance_low=2.5, seed=99.0, offload="on"), OFFER, HERE)
    back = fields_of("t2v_base", first.config, first.requests[0], OFFER)
    again = submit_plan(form_of({**values("t2v_base"), **back, "shape": "16:9"}), OFFER, HERE)
    assert again.config == first.config and again.requests == first.requests


@pytest.mark.parametrize(("choice", "skipped"), [("exact", 0), ("1.5x", 28), ("2x", 40), ("preset", 0)])
def test_a_speed_up_is_counted_before_the_run_and_comes_back_into_its_field(choice: str, skipped: int) -> None:
    made = submit_plan(form("t2v_base", speed_up=choice), OFFER, HERE)
    request = made.requests[0]
    said = f"{skipped} of 80 evaluations skipped" if skipped else ""
    assert departures(Words("en"), request) == said and forwards_of(request).skipped == skipped
    back = fields_of("t2v_base", made.config, request, OFFER)
    assert back["speed_up"] == (choice if skipped else "exact")
    with pytest.raises(BadRequest, match="speed_up is '9x'; expected exact, 1.5x, 2x, preset"):
        submit_plan(form("t2v_base", speed_up="9x"), OFFER, HERE)
    assert submit_plan(form(speed_up="2x"), OFFER, HERE).requests[0].speed_up is None, "a distilled preset has none"


def test_what_changes_the_result_is_named_and_motion_is_for_pictures() -> None:
    picture = {"image_path": "a.png", "motion_amplitude": 1.5, "nag_scale": 11.0}
    request = submit_plan(form("i2v_distill_fp8", **picture), OFFER, HERE).requests[0]
    assert departures(Words("en"), request) == "NAG 11 · motion 1.5" and request.motion_amplitude == 1.5
    assert departures(Words("zh"), request) == "NAG 11 · 运动幅度 1.5"
    assert submit_plan(form("t2v_base", motion_amplitude=1.5), OFFER, HERE).requests[0].motion_amplitude == 1


def test_seeds_are_drawn_when_queued_and_counted_up_from_a_fixed_one() -> None:
    drawn = [request.seed for request in submit_plan(form(videos=3.0), OFFER, HERE).requests]
    assert len(set(drawn)) == 3 and -1 not in drawn
    assert [r.seed for r in submit_plan(form(videos=3.0, seed=40.0), OFFER, HERE).requests] == [40, 41, 42]


def test_lines_and_videos_multiply_up_to_the_limit() -> None:
    made = submit_plan(form(prompt="one\n\n two \nthree", per_line=True, videos=2.0), OFFER, HERE)
    assert [request.prompt for request in made.requests] == ["one", "one", "two", "two", "three", "three"]
    few = replace(HERE, limits=Limits(batch=4))
    with pytest.raises(BadRequest, match="6 videos; one click can queue 4"):
        submit_plan(form(prompt="one\ntwo\nthree", per_line=True, videos=2.0), OFFER, few)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"prompt": " "}, "prompt"),
        ({"preset": "../../etc/passwd"}, "preset"),
        ({"task": "i2v"}, "preset"),
        ({"width": 33.0}, "width"),
        ({"width": None}, "width"),
        ({"frames": 16.0}, "frames"),
        ({"frames": 16.5}, "frames"),
        ({"offload": "always"}, "offload"),
        ({"denoising_step_list": "1000; rm -rf"}, "denoising_step_list"),
        ({"denoising_step_list": "１０００, ７５０"}, "denoising_step_list"),
        ({"boundary_step_index": 9.0}, "boundary_step_index"),
        ({"videos": 0.0}, "videos"),
    ],
)
def test_an_invalid_field_is_named(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(LightX2VError, match=named):
        submit_plan(form(**changes), OFFER, HERE)


def test_an_image_preset_asks_for_its_image() -> None:
    with pytest.raises(BadRequest, match="first frame"):
        submit_plan(form("i2v_distill_fp8"), OFFER, HERE)
    made = submit_plan(form("i2v_distill_fp8", image_path="a.png", shape="match"), OFFER, HERE).requests[0]
    assert (made.task, made.resize_mode, made.image_path) == ("i2v", None, "a.png")
    forced = form("demo_i2v_base", image_path="a.png", last_frame_path="b.png", shape="1:1")
    made = submit_plan(forced, OFFER, HERE).requests[0]
    assert (made.task, made.resize_mode) == ("flf2v", "fixed_shape")


def test_loras_come_on_top_of_the_presets_own_without_a_new_engine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "me" / "style").mkdir(parents=True)
    (tmp_path / "me" / "style" / "high.safetensors").touch()
    monkeypatch.chdir(tmp_path)
    rows = {"lora_0_high": "me/style/high.safetensors", "lora_0_low": "", "lora_0_strength_high": 0.5}
    plain, styled = (submit_plan(form(**extra), OFFER, HERE) for extra in ({}, rows))
    assert plain.config == styled.config
    own = settings_of("demo_t2v_distill_lora").engine.lora_configs
    added = LoraSpec(expert="high", path="me/style/high.safetensors", strength=0.5)
    assert plain.requests[0].loras is None
    assert styled.requests[0].loras == (*own, added)


@pytest.mark.parametrize(
    ("path", "advice"),
    [
        ("me/style/high.safetensors", "hf download me/style high.safetensors"),
        ("/nowhere/low.safetensors", "Check the path."),
        ("~nobody/low.safetensors", "Check the path."),
        ("x" * 300, "Check the path."),
    ],
)
def test_a_missing_lora_is_reported_before_anything_is_queued(path: str, advice: str) -> None:
    for part in ("high", "low"):
        with pytest.raises(LoraError, match="There is no LoRA") as caught:
            submit_plan(form(**{f"lora_1_{part}": path}), OFFER, HERE)
        assert advice in str(caught.value)


def test_an_empty_prompt_has_one_message() -> None:
    blank = ({"prompt": ""}, {"prompt": " \n "}, {"prompt": "&nbsp;\u200b"})
    for changes in (*blank, {"prompt": "\n\u200b\n&nbsp;", "per_line": True}):
        with pytest.raises(BadRequest, match="The prompt is empty. Describe the scene"):
            submit_plan(form(**changes), OFFER, HERE)


def test_a_page_for_others_takes_no_paths_and_no_offload() -> None:
    public = Exposure(open_to_others=True, limits=PUBLIC_LIMITS)
    sent = form(offload="on", attention="sage_attn2", lora_0_high="/etc/shadow")
    made = submit_plan(sent, OFFER, public)
    assert made.requests[0].loras is None
    assert made.config == settings_of("demo_t2v_distill_lora").engine
    with pytest.raises(BadRequest, match="frames"):
        submit_plan(form(frames=121.0), OFFER, public)


@pytest.mark.parametrize(
    ("high", "low"),
    [
        ("a/wan_high_noise_lora.safetensors", "a/wan_low_noise_lora.safetensors"),
        ("high/Style-HIGH.safetensors", "high/Style-LOW.safetensors"),
        ("me/HighNoise.safetensors", "me/LowNoise.safetensors"),
        ("me/style.safetensors", ""),
        ("me/highlander_style.safetensors", ""),
        ("me/highres_low_noise.safetensors", ""),
        ("me/highres_high_noise.safetensors", "me/highres_low_noise.safetensors"),
    ],
)
def test_the_low_noise_partner_is_found_by_name(high: str, low: str) -> None:
    assert low_noise_partner(high) == low


def test_sizes_are_the_official_ones_and_whole_tokens() -> None:
    assert [size_of(632, "16:9"), size_of(632, "9:16"), size_of(960, "16:9")] == [(480, 832), (832, 480), (720, 1280)]
    assert size_of(960, "1:1") == (960, 960)
    for tier in (64, 96, 128, 632, 960):
        for shape in ("16:9", "9:16", "1:1"):
            assert all(side % 16 == 0 and side >= 32 for side in size_of(tier, shape))
    assert [frames_for(seconds, 16) for seconds in (2, 3, 5, 0.01)] == [33, 49, 81, 1]


@pytest.mark.parametrize(
    ("prompt", "unknown"),
    [
        ("a red ball rolls left over green grass at night", []),
        ("日落时的海面上，一颗黄色的星星在旋转", []),
        ("…", []),
        ("a ball that is too large", ["too", "large"]),
        ("A Cat plays the guitar, on a red ball with a cat!", ["Cat", "plays", "guitar", "cat"]),
        ("夜晚的草地上，一只猫在弹吉他", ["猫", "弹吉他"]),
        ("two red balls,dinosaur", ["two", "balls", "dinosaur"]),
        ("红色的robot,在海面上", ["robot"]),
    ],
)
def test_words_unknown_to_the_demo_model_are_found(prompt: str, unknown: list[str]) -> None:
    assert unknown_words(prompt) == unknown


def test_every_example_of_the_demo_is_within_its_world() -> None:
    prefixes = ("example_demo_", "picture_")
    texts = [text for table in TABLES.values() for key, text in table.items() if key.startswith(prefixes)]
    assert len(texts) == 2 * (COUNT + len(PICTURES_SHOWN))
    assert [text for text in texts if unknown_words(text)] == []


@pytest.mark.slow
def test_images_are_decoded_one_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each may take a quarter of a gigabyte, and gradio answers forty visitors at a time."""
    now, most = 0, 0

    def look(path: str) -> Image.Image:
        nonlocal now, most
        now += 1
        most = max(most, now)
        time.sleep(0.05)
        now -= 1
        return Image.new("RGB", (64, 64))

    monkeypatch.setattr(editing, "load_image", look)
    sizes = range(32, 32 + 8 * 16, 16)
    threads = [threading.Thread(target=editing._crop, args=("en", "a.png", 64, width, None)) for width in sizes]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert most == 1


@pytest.mark.parametrize(
    ("high", "low", "mixed"),
    [
        ("styleB_high_noise.safetensors", "styleA_low_noise.safetensors", True),
        ("/loras/styleA_high_noise.safetensors", "/loras/styleA_low_noise.safetensors", False),
        ("styleB_high_noise.safetensors", "", False),
        ("style.safetensors", "other.safetensors", False),
    ],
)
def test_a_pair_of_two_different_loras_is_noticed(high: str, low: str, mixed: bool) -> None:
    assert mixed_pair(high, low) is mixed
