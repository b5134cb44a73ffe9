from __future__ import annotations

import json
import logging
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lightx2v.config.engine_config import ParallelConfig
from lightx2v.config.environment import Environment
from lightx2v.config.model_paths import PROJECT
from lightx2v.config.presets import PRESETS, Resolved, read_json, resolve
from lightx2v.config.request import Request
from lightx2v.errors import BadRequest, ConfigError, LightX2VError
from lightx2v.hub import find_all

DISTILLED = {"denoising_step_list": [1000, 750, 500, 250], "boundary_step_index": 2}


def refused(preset: str | Path | dict[str, Any], overrides: dict[str, Any] | None = None) -> str:
    with pytest.raises(LightX2VError) as caught:
        resolve(preset, overrides)
    assert isinstance(caught.value, (BadRequest, ConfigError))
    return str(caught.value)


def written(folder: Path, content: str | bytes) -> Path:
    path = folder / "mine.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


# ---- what wins over what ---------------------------------------------------------------------------------------------


def test_an_override_wins_over_the_preset_and_the_preset_over_the_default() -> None:
    preset = {"infer_steps": 30, "target_height": 720, "dtype": "fp32"}
    resolved = resolve(preset, {"steps": 20, "dtype": "bf16"})
    assert (resolved.request["steps"], resolved.engine.dtype) == (20, "bf16")
    assert (resolved.request["height"], resolved.request["width"]) == (720, 832)


@pytest.mark.parametrize(
    ("overrides", "field", "value"),
    [
        ({"infer_steps": 7}, "steps", 7),
        ({"num_frames": 9}, "frames", 9),
        ({"target_video_length": 9}, "frames", 9),
        ({"sample_shift": 3}, "shift", 3.0),
        ({"guidance_scale": 2}, "guidance", (2.0, 2.0)),
        ({"sample_guide_scale": [2, 1]}, "guidance", (2.0, 1.0)),
        ({"target_shape": [96, 128]}, "width", 128),
    ],
)
def test_overrides_may_use_the_keys_of_files(overrides: dict[str, Any], field: str, value: object) -> None:
    assert resolve("t2v_base", overrides).request[field] == value


def test_one_attention_mode_sets_both_attentions() -> None:
    engine = resolve({"attn_mode": "torch_sdpa"}).engine
    assert (engine.self_attn_1_type, engine.cross_attn_1_type) == ("torch_sdpa", "torch_sdpa")


def test_a_request_is_made_of_what_is_resolved_and_what_is_shown() -> None:
    resolved = resolve("i2v_base", {"seed": 7})
    request = Request(prompt="a cat", image_path="a.png", **resolved.request)
    assert (request.task, request.seed, request.guidance) == ("i2v", 7, (3.5, 3.5))


def test_an_empty_model_path_keeps_the_presets() -> None:
    assert resolve("demo_t2v_base", {"model_path": ""}).engine.model_path == "assets/demo/Wan2.2-T2V-Demo"


def test_resolving_changes_no_argument() -> None:
    preset, overrides = {"preset": {"title": "T"}, "steps": 3}, {"target_shape": [96, 96]}
    first = resolve(preset, overrides)
    assert (preset, overrides) == ({"preset": {"title": "T"}, "steps": 3}, {"target_shape": [96, 96]})
    assert resolve(preset, overrides) == first


# ---- R1: keys and files ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("preset", "message"),
    [
        ({"infer_stepz": 4}, "settings: unknown key 'infer_stepz'. Did you mean 'infer_steps'"),
        ({"steps": 4, "infer_steps": 4}, "steps and infer_steps both set steps"),
        ({"target_height": 720, "target_shape": [720, 1280]}, "target_height and target_shape both set height"),
        ({"target_shape": 720}, "expected [height, width]"),
        ({"prompt": "a cat"}, "prompt cannot be set here"),
        ({"target_height": 481}, "settings: target_height is 481;"),
        ({"infer_steps": "40"}, "settings: infer_steps is '40'"),
        ({"dtype": 16}, "settings: dtype is 16"),
        ({"feature_caching": "Tea"}, "feature_caching is 'Tea'; expected NoCaching or Mag"),
        ({"use_image_encoder": True}, "Wan2.2-A14B has no image encoder"),
        ({"use_tae": 1}, "use_tae"),
        ({"dit_original_ckpt": "a"}, "Use {high,low}_noise_original_ckpt"),
        ({"dim": 5120}, "read from the checkpoint"),
        ({"rainfusion_attn_setting": {}}, "sparse attention"),
        ({"cross_attn_2_type": "flash"}, "cross_attn_2_type"),
        ({"cross_attn_2_type": 2}, "cross_attn_2_type is 2"),
        ({"preset": []}, "expected an object"),
        ({"preset": {"titel": "T"}}, "Did you mean 'title'"),
        ({"preset": {"title": 3}}, "preset.title is 3; expected text"),
        ({"preset": {"variant": "fast"}}, "expected base, hybrid, three_phase, distill_lora"),
        ({"height": 1600, "width": 2560}, "the limit is"),
    ],
)
def test_a_wrong_preset_is_a_config_error_naming_the_key(preset: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        resolve(preset)
    assert message in str(caught.value)


def test_a_wrong_override_is_named_in_the_word_that_was_used() -> None:
    with pytest.raises(BadRequest, match=r"^num_frames is 80;.* Nearest valid value: 81\.$"):
        resolve("t2v_base", {"num_frames": 80})
    assert refused("t2v_base", {"dtype": "f16"}).startswith("dtype is 'f16'")
    assert refused("t2v_base", {"heigth": 96}).startswith("override: unknown key 'heigth'. Did you mean 'height'")


def test_keys_without_effect_are_accepted_and_said(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "lightx2v.config"):
        resolved = resolve(
            {"rope_type": "torch_complex_rope", "feature_caching": "NoCaching", "use_image_encoder": False}
        )
    assert resolved.warnings == ("settings: rope_type has no effect here; the result is the same without it.",)
    assert caplog.messages == list(resolved.warnings)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"steps": 4,}', "line 1, column 13"),
        ('{\n  "steps": 4\n  "seed": 1\n}', "line 3, column 3"),
        ("", "not valid JSON"),
        ('{"steps": 4, "steps": 5}', "the key 'steps' is given twice"),
        ('{"parallel": {"seq_p_size": 1, "seq_p_size": 2}}', "'seq_p_size' is given twice"),
        ("[4]", "holds a list; expected one object"),
        ('{"shift": NaN}', "NaN is not a number in JSON"),
        ('{"shift": -Infinity}', "-Infinity is not a number in JSON"),
        ('{"a":' * 100_000, "nested too deeply"),
        ('{"seed": ' + "1" * 5000 + "}", "too long"),
        ('{"steps": 4}'.encode("utf-16"), "not UTF-8"),
        (b"\xff\xfe\x00", "not UTF-8"),
        ('{"steps": 4}' + " " * (1 << 20), "larger than"),
        ('{"steps": 4} // four', "not valid JSON"),
    ],
    ids=range(14),
)
def test_a_file_that_is_no_json_object_is_refused_by_name(tmp_path: Path, content: str | bytes, message: str) -> None:
    text = refused(written(tmp_path, content))
    assert message in text
    assert "mine.json" in text


def test_a_byte_order_mark_is_no_fault(tmp_path: Path) -> None:
    assert resolve(written(tmp_path, b"\xef\xbb\xbf" + b'{"steps": 4}')).request["steps"] == 4


def test_a_preset_that_is_not_there_names_the_nearest(tmp_path: Path) -> None:
    assert "Did you mean 't2v_base'" in refused("t2v_bse")
    assert "no file" in refused(tmp_path / "none.json")
    assert refused("../presets/t2v_base").startswith("There is no preset")
    assert "preset is ''" in refused("")
    assert "expected a name" in refused("a\0b")


def test_a_folder_is_no_preset(tmp_path: Path) -> None:
    (tmp_path / "x.json").mkdir()
    assert "no file" in refused(tmp_path / "x.json")


FILES = st.binary(max_size=60) | st.text(max_size=60).map(str.encode)


@pytest.mark.slow
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(content=FILES)
def test_any_bytes_are_an_object_or_a_config_error(tmp_path: Path, content: bytes) -> None:
    try:
        assert isinstance(read_json(written(tmp_path, content)), dict)
    except ConfigError as error:
        assert "mine.json" in str(error)


KEYS = (
    st.sampled_from([*json.loads((PRESETS / "i2v_distill_fp8.json").read_text()), "parallel", "rope_type"]) | st.text()
)
VALUES = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.lists(st.integers(), max_size=4)
)


@pytest.mark.slow
@given(preset=st.dictionaries(KEYS, VALUES, max_size=5), overrides=st.dictionaries(KEYS, VALUES, max_size=3))
def test_any_object_resolves_or_is_refused(preset: dict[str, Any], overrides: dict[str, Any]) -> None:
    try:
        assert isinstance(resolve(preset, overrides), Resolved)
    except (BadRequest, ConfigError) as error:
        str(error).encode("utf-8")


# ---- which sampler ---------------------------------------------------------------------------------------------------


def test_the_model_class_follows_from_the_step_list() -> None:
    assert resolve({}).engine.model_cls == "wan2.2_moe"
    distilled = resolve(DISTILLED)
    assert distilled.engine.model_cls == "wan2.2_moe_distill"
    assert distilled.request["enable_cfg"] is False
    assert resolve(DISTILLED | {"enable_cfg": True}).request["enable_cfg"] is True


def test_a_model_class_that_disagrees_with_the_step_list_is_refused() -> None:
    assert "there is no denoising_step_list" in refused("t2v_base", {"model_cls": "wan2.2_moe_distill"})
    assert "Use model_cls wan2.2_moe_distill" in refused(DISTILLED, {"model_cls": "wan2.2_moe"})


def test_a_distilled_preset_refuses_what_it_would_ignore() -> None:
    assert "makes the 4 steps of its denoising_step_list" in refused("t2v_distill_lora", {"steps": 8})
    assert "boundary_step_index" in refused("t2v_distill_lora", {"boundary": 0.9})
    assert resolve("t2v_distill_lora", {"infer_steps": 4}).request["steps"] == 4


def test_the_preset_of_another_task_is_refused_unless_its_model_is_replaced() -> None:
    assert "t2v_base is for t2v, not for i2v" in refused("t2v_base", {"task": "i2v"})
    assert resolve("t2v_base", {"task": "i2v", "model_path": "/models/i2v"}).engine.task == "i2v"
    assert resolve("i2v_base", {"task": "flf2v"}).request["task"] == "flf2v"


def test_lightx2vs_distilled_files_have_a_guidance_branch_without_guidance() -> None:
    resolved = resolve("t2v_base_cfg_ulysses", {"enable_cfg": False})
    assert resolved.engine.parallel == ParallelConfig(cfg_p_size=2, seq_p_size=4)


# ---- environment -----------------------------------------------------------------------------------------------------


def test_the_environment_is_read_in_one_place() -> None:
    variables = {
        "LIGHTX2V_MODELS_DIR": "/m",
        "LIGHTX2V_OUTPUT_DIR": "",
        "RANK": "3",
        "LOCAL_RANK": "1",
        "WORLD_SIZE": "8",
    }
    expected = Environment(models_dir="/m", output_dir=None, rank=3, local_rank=1, world_size=8)
    assert Environment.read(variables) == expected
    assert Environment.read({}) == Environment(world_size=None)


@pytest.mark.parametrize("value", ["eight", "-1", "1.5", "9" * 5000, "０", "２", "²", "0"])
def test_a_rank_that_is_no_number_is_refused(value: str) -> None:
    with pytest.raises(ConfigError, match="WORLD_SIZE is"):
        Environment.read({"WORLD_SIZE": value})


@pytest.mark.parametrize(
    ("variables", "says"),
    [
        ({"RANK": "5", "WORLD_SIZE": "2"}, "RANK is 5 with WORLD_SIZE=2; expected a number below it"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK is 2 with WORLD_SIZE=2"),
        ({"LOCAL_RANK": "4", "LOCAL_WORLD_SIZE": "4"}, "LOCAL_RANK is 4 with LOCAL_WORLD_SIZE=4"),
        ({"LOCAL_WORLD_SIZE": "0"}, "LOCAL_WORLD_SIZE is '0'; expected a whole number from 1"),
        ({"MASTER_PORT": "99999"}, "MASTER_PORT is '99999'; expected a whole number from 1 to 65535"),
        ({"MASTER_PORT": "0"}, "MASTER_PORT is '0'"),
    ],
)
def test_ranks_and_ports_outside_their_range_are_refused(variables: dict[str, str], says: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(says)):
        Environment.read(variables)
    assert Environment.read({"RANK": "1", "WORLD_SIZE": "2", "MASTER_PORT": "65535"}).port == 65535


def test_no_other_part_of_the_engine_reads_environment_variables() -> None:
    for path in (PROJECT / "lightx2v").rglob("*.py"):
        if path.parent.name != "config":
            assert not re.search(r"\bgetenv\b|\bos\.environ\b", path.read_text("utf-8")), path.name


def test_the_models_folder_of_the_environment_is_a_fallback() -> None:
    environment = Environment(models_dir="/env")
    assert resolve({}, environment=environment).engine.models_dir == "/env"
    assert resolve({}, {"models_dir": "/flag"}, environment=environment).engine.models_dir == "/flag"


def test_a_world_of_the_wrong_size_is_refused_at_resolve() -> None:
    resolve("t2v_base_cfg_ulysses", environment=Environment(world_size=8))
    resolve("t2v_base_cfg_ulysses", environment=Environment())
    with pytest.raises(ConfigError, match="but 4 were started"):
        resolve("t2v_base_cfg_ulysses", environment=Environment(world_size=4))


# ---- files -----------------------------------------------------------------------------------------------------------


def test_a_merged_preset_does_not_need_the_base_experts() -> None:
    files = list(find_all(resolve("i2v_distill_merged").engine))
    assert not [name for name in files if name.endswith("_noise_model/")]
    assert "Wan-AI/Wan2.2-I2V-A14B/high_noise_model/config.json" in files


def test_one_replaced_expert_leaves_the_other_one_of_the_base_model() -> None:
    files = list(find_all(resolve({"low_noise_original_ckpt": "o/r/low.safetensors"}).engine))
    assert files[:2] == ["Wan-AI/Wan2.2-T2V-A14B/high_noise_model/", "o/r/low.safetensors"]


def test_the_quantised_text_encoder_is_the_one_that_is_needed() -> None:
    engine = resolve({"t5_quantized": True, "t5_quant_scheme": "int8-vllm", "model_path": "/m"}).engine
    assert "/m/models_t5_umt5-xxl-enc-int8.pth" in list(find_all(engine))
    built = resolve("demo_t2v_fp8").engine
    assert "assets/demo/Wan2.2-T2V-Demo/models_t5_umt5-xxl-enc-bf16.pth" in list(find_all(built))


# ---- interpolation ---------------------------------------------------------------------------------------------------


def test_lightx2vs_interpolation_sets_the_rate_and_the_method() -> None:
    made = resolve({"video_frame_interpolation": {"algo": "rife", "target_fps": 32}}).request
    assert (made["interpolated_fps"], made["interpolation"]) == (32.0, "rife")
    for off in (None, {}):
        assert resolve({"video_frame_interpolation": off}).request["interpolated_fps"] is None
    found = resolve({"video_frame_interpolation": {"target_fps": 24, "model_path": "train_log"}})
    assert found.request["interpolated_fps"] == 24.0 and "model_path has no effect here" in found.warnings[0]
    assert resolve("t2v_base", {"video_frame_interpolation": {"target_fps": 48}}).request["interpolated_fps"] == 48.0


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"algo": "rife"}, "has no target_fps"),
        ({"target_fps": 32, "scale": 2}, "unknown key 'scale'"),
        ({"algo": "film", "target_fps": 32}, "video_frame_interpolation.algo is 'film'; expected \"rife\""),
        (32, "expected an object"),
        ({"target_fps": 8}, "video_frame_interpolation is 8.0; expected more than fps"),
    ],
)
def test_another_interpolation_is_refused_by_name(value: object, message: str) -> None:
    assert message in refused({"video_frame_interpolation": value})


def test_two_words_for_the_rate_exclude_each_other() -> None:
    assert "both set interpolated_fps" in refused(
        {"video_frame_interpolation": {"target_fps": 32}, "interpolated_fps": 24}
    )
