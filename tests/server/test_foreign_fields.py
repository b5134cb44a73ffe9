"""Bodies as the clients of other servers write them: what changes nothing is taken and named, the rest refused by name.

The fields are those of SGLang's VideoGenerationsRequest and vLLM-Omni's VideoGenerationRequest.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from served import BASE, SIZE, T2V, Served, serve

GOOD = {"prompt": "a cat", **SIZE}
SGLANG = {
    **{"prompt": "a cat", "size": "", "width": 64, "height": 64, "num_frames": 5, "fps": 16, "seed": 1024, "n": 1},
    **{"input_reference": None, "reference_url": None, "model": None, "negative_prompt": None, "guidance_scale": None},
    **{"num_outputs_per_prompt": 1, "generator_device": "cuda", "max_sequence_length": None, "flow_shift": None},
    **{"enable_teacache": False, "enable_frame_interpolation": False, "frame_interpolation_exp": 1},
    **{"frame_interpolation_scale": 1.0, "frame_interpolation_model_path": None, "enable_upscaling": False},
    **{"upscaling_model_path": None, "upscaling_scale": 4, "output_quality": "default", "output_compression": None},
    **{"output_path": None, "perf_dump_path": None, "task": None, "profile": False, "task_type": "T2V"},
    **{"num_profiled_timesteps": None, "profile_all_stages": False},
}
VLLM_OMNI = {
    **{"prompt": "a cat", "seconds": "4", "user": "somebody", "generate_sound": False, "sound_duration": None},
    **{"video_params": {"width": 64, "height": 64, "num_frames": 5, "fps": 8}, "extra_params": {"sample_solver": "x"}},
    **{"enable_frame_interpolation": False, "frame_interpolation_exp": 1, "response_format": "b64_json"},
}


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    with serve(tmp_path, presets=(T2V, BASE)) as served:
        yield served


def post(served: Served, body: dict[str, Any], path: str = "/v1/videos") -> dict[str, Any]:
    answer = served.client.post(path, json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()


def refusal(served: Served, body: Any, path: str = "/v1/videos") -> str:
    answer = served.client.post(path, json=body)
    assert answer.status_code == 422, answer.text
    return answer.json()["error"]["message"]


def test_sglangs_own_body_is_taken_and_what_has_no_effect_is_named(served: Served) -> None:
    made = post(served, SGLANG)
    (warning,) = made["warnings"]
    for name in ("task_type", "generator_device", "output_quality", "upscaling_scale", "frame_interpolation_exp"):
        assert name in warning
    for name in ("num_frames", "enable_teacache", "output_path"):
        assert name not in warning, "it has an effect, is off as here, or was not given"
    assert (made["size"], made["num_frames"], made["seed"]) == ("64x64", 5, 1024)


def test_vllm_omnis_own_body_is_taken_with_its_block_of_settings(served: Served) -> None:
    made = post(served, VLLM_OMNI)
    assert (made["size"], made["num_frames"], made["fps"]) == ("64x64", 5, 8.0)
    assert all(name in made["warnings"][0] for name in ("user", "extra_params", "response_format"))


def test_the_fields_of_extra_body_are_the_bodys_own(served: Served) -> None:
    assert post(served, {"prompt": "a cat", "extra_body": {**SIZE, "seed": 7, "user": "x"}})["seed"] == 7
    form = {"prompt": (None, "a cat"), "extra_body": (None, json.dumps({**SIZE, "seed": 8}))}
    assert served.client.post("/v1/videos", files=form).json()["seed"] == 8
    assert "secret" in refusal(served, {"prompt": "a cat", "extra_body": {"secret": 1}})
    assert "extra_body" in refusal(served, {"prompt": "a cat", "extra_body": "x"})


def test_a_form_may_carry_the_same(served: Served) -> None:
    body = {"user": "x", "task_type": "t2v", "extra_params": "{}", "n": "1", "enable_teacache": "false", "size": ""}
    form = {name: (None, value) for name, value in {"prompt": "a cat", "num_frames": "5", **body}.items()}
    answer = served.client.post("/v1/videos", files=form)
    assert answer.status_code == 200, answer.text
    assert all(name in answer.json()["warnings"][0] for name in ("user", "task_type", "extra_params"))


def test_a_body_without_them_has_no_warning(served: Served) -> None:
    assert post(served, GOOD)["warnings"] == []
    assert post(served, {"prompt": "a cat", "target_video_length": 5}, "/v1/tasks/video/")["warnings"] == []


def test_lightx2vs_own_fields_of_other_models_are_named_too(served: Served) -> None:
    made = post(served, {"prompt": "a cat", "video_duration": 5, "reuse": True, "user": "x"}, "/v1/tasks/video/")
    assert all(name in made["warnings"][0] for name in ("user", "video_duration", "reuse"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("n", 2), ("num_outputs_per_prompt", 4), ("max_sequence_length", 256), ("stream", True)),
        *(("enable_teacache", True), ("enable_upscaling", True), ("enable_frame_interpolation", True)),
        *(("generate_sound", True), ("n", "many"), ("n", True)),
        *(("aspect_ratio", "16:9"), ("lora", {"name": "x"}), ("true_cfg_scale", 4.0), ("diffusers_kwargs", {"a": 1})),
        *(("video_path", "a.mp4"), ("audio_flow_shift", 1.0), ("progressive_mode", "x"), ("webhook_url", "http://x")),
        *(("conditions", []), ("target", {}), ("seed", [1, 2]), ("guidance_rescale", 0.5)),
    ],
)
def test_what_would_change_the_video_and_cannot_be_done_is_refused_by_name(
    served: Served, name: str, value: Any
) -> None:
    for path in ("/v1/videos", "/v1/tasks/video/"):
        message = refusal(served, {"prompt": "a cat", name: value}, path)
        assert message.startswith(name) and len(message) < 300
    assert not served.jobs.list()


@pytest.mark.slow
@pytest.mark.parametrize("size", ["auto", "1280*720", "720p", "16:9", "1280X720", "x720", "1280x720\n", "12800x72000"])
def test_a_size_in_other_words_is_refused_with_an_example(served: Served, size: str) -> None:
    assert refusal(served, {"prompt": "a cat", "size": size}) == "size: expected WIDTHxHEIGHT, such as 832x480."


@pytest.mark.slow
@pytest.mark.parametrize("body", [[], "a cat", 7, [GOOD]])
def test_a_body_that_is_no_object_is_refused_with_an_example(served: Served, body: Any) -> None:
    assert refusal(served, body) == 'the body: expected a JSON object, such as {"prompt": "A cat surfs."}.'


def test_an_unknown_field_is_refused_with_the_nearest_known_one(served: Served) -> None:
    message = refusal(served, {**GOOD, "num_frame": 5})
    assert message == (
        "num_frame: this server has no such field. Did you mean 'num_frames'? Leave it out, or see /docs."
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fields", "word"),
    [
        ([("guidance_scale[]", "4"), ("guidance_scale", "3")], "twice"),
        ([("guidance_scale", "4"), ("guidance_scale[]", "3")], "twice"),
        ([("input_reference[image_url]", "a"), ("input_reference[image_url]", "b")], "twice"),
        ([("input_reference[image_url]", "a"), ("input_reference", "b")], "twice"),
        ([("input_reference", "a"), ("input_reference[image_url]", "b")], "once, as JSON"),
        ([("loras[][path]", "a")], "once, as JSON"),
        ([("a[b][c][d][e][f]", "a")], "no such field"),
        ([("seed[]", "7")], "seed"),
        ([("prompt[x]", "7")], "prompt"),
        ([("[]", "7")], "no such field"),
        ([("a[b", "7")], "no such field"),
    ],
    ids=str,
)
def test_brackets_in_a_forms_names_that_make_no_sense_are_refused(
    served: Served, fields: list[tuple[str, str]], word: str
) -> None:
    form = [(name, (None, value)) for name, value in [("prompt", "a cat"), ("model", BASE), *fields]]
    form = [(name, value) for name, value in form if not (name == "prompt" and fields[0][0].startswith("prompt"))]
    answer = served.client.post("/v1/videos", files=form)
    assert answer.status_code == 422 and word in answer.json()["error"]["message"], answer.text
