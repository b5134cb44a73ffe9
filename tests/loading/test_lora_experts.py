"""Which expert a LoRA file is for: a choice, then its tensors' names, its metadata, its name, a second file's name."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lightx2v.config.engine_config import EngineConfig
from lightx2v.config.lora_spec import LoraSpec
from lightx2v.config.phases import Expert
from lightx2v.loading.lora_experts import LoraFile, lora_files

STEM = "blocks.0.self_attn.q"


def lora(path: Path, prefix: str = "diffusion_model", **metadata: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pair = {"lora_A.weight": torch.ones(1, 2), "lora_B.weight": torch.ones(2, 1)}
    save_file({f"{prefix}.{STEM}.{key}": part for key, part in pair.items()}, path, metadata=metadata or None)
    return path


def placed(*paths: Path, experts: tuple[str, ...] = ()) -> dict[Expert, list[LoraFile]]:
    named = experts or ("auto",) * len(paths)
    specs = [LoraSpec(expert=name, path=str(path)) for path, name in zip(paths, named, strict=True)]  # type: ignore[arg-type]
    return {expert: lora_files(specs, expert, EngineConfig(device="cpu")) for expert in ("high", "low")}


def names(*paths: Path, experts: tuple[str, ...] = ()) -> tuple[list[str], list[str]]:
    found = placed(*paths, experts=experts)
    return [file.path.name for file in found["high"]], [file.path.name for file in found["low"]]


PAIRS = [
    ("wan22_low_light_high_noise", "wan22_low_light_low_noise"),
    ("high-heels-high-noise", "high-heels-low-noise"),
    ("low_poly_HIGH_v1", "low_poly_LOW_v1"),
    ("SwayHighWan2_2", "SwayLowWan2_2"),
    ("style-22-H-e8", "style-22-L-e8"),
    ("style_wan22_HN_v1", "style_wan22_LN_v1"),
    ("style_wan22_hn", "style_wan22_ln"),
    ("styleHN", "styleLN"),
    ("style_I2V_14B_HIGH", "style_I2V_14B_LOW"),
    ("style_000002000_high_noise", "style_000002000_low_noise"),
    ("Wan2.2-HighNoise-Style", "Wan2.2-LowNoise-Style"),
    ("x_H_noise", "x_L_noise"),
    ("noise_high_x", "noise_low_x"),
    ("风格_高噪", "风格_低噪"),
    ("HighNoise/style", "LowNoise/style"),
    ("high/style", "low/style"),
    ("H/style", "L/style"),
]


@pytest.mark.parametrize(("high", "low"), PAIRS)
def test_each_half_of_a_pair_is_for_its_own_expert(tmp_path: Path, high: str, low: str) -> None:
    one, two = (lora(tmp_path / f"{name}.safetensors") for name in (high, low))
    for given in ((one, two), (two, one), (one,), (two,)):
        found = placed(*given)
        assert [[file.path for file in found[expert]] for expert in ("high", "low")] == [[one], [two]]
        assert not any(file.warnings for files in found.values() for file in files)


def test_two_files_that_are_given_together_may_differ_in_numbers_too(tmp_path: Path) -> None:
    one, two = (lora(tmp_path / f"style_{name}.safetensors") for name in ("HIGH_e20", "LOW_e35"))
    assert names(one, two) == ([one.name], [two.name])
    assert names(one)[1] == [one.name]


@pytest.mark.parametrize(
    "name",
    [
        *("Wan2.2_T2V_low_light_v2", "wan2_2_HIGH_detail_v1", "low-poly-style", "high_quality_film", "LowKey"),
        *("camera_angle_low", "highHeels", "style_H", "XL_style", "high/style", "low_and_high"),
    ],
)
def test_a_subject_is_no_expert(tmp_path: Path, name: str) -> None:
    path = lora(tmp_path / f"{name}.safetensors")
    found = placed(path)
    assert [file.path for files in found.values() for file in files] == [path, path]
    assert all("used for both" in file.reason for files in found.values() for file in files)
    warnings = [text for files in found.values() for file in files for text in file.warnings]
    assert ["is used for both experts" in text for text in warnings] == [True] * (name not in ("XL_style",))


def test_a_plain_name_is_for_both_without_a_warning(tmp_path: Path) -> None:
    found = placed(lora(tmp_path / "style.safetensors"))
    assert [(len(files), files[0].warnings) for files in found.values()] == [(1, ()), (1, ())]


def test_a_choice_is_never_overruled(tmp_path: Path) -> None:
    for name in ("style_low_noise", "low_light", "high-heels"):
        path = lora(tmp_path / f"{name}.safetensors")
        assert names(path, path, experts=("high", "low")) == ([path.name], [path.name])
        assert names(path, experts=("high",)) == ([path.name], [])
    second = lora(tmp_path / "second.safetensors", "transformer_2")
    found = placed(second, experts=("high",))
    assert [file.path for file in found["high"]] == [second] and not found["low"]
    assert "as you chose; the names of its tensors say low noise" in found["high"][0].warnings[0]


def test_the_tensors_names_count_more_than_metadata_and_these_more_than_the_name(tmp_path: Path) -> None:
    keys = lora(tmp_path / "a_high_noise.safetensors", "transformer_2", title="x high noise")
    assert names(keys) == ([], [keys.name])
    titled = lora(tmp_path / "b_high_noise.safetensors", "transformer", ss_output_name="b_low_noise")
    assert names(titled) == ([], [titled.name])


@pytest.mark.parametrize(
    ("metadata", "expert"),
    [
        ({"ss_sd_model_name": "wan2.2_t2v_high_noise_14B_fp16.safetensors"}, "high"),
        ({"modelspec.title": "wan low noise"}, "low"),
        ({"ss_min_timestep": "875", "ss_max_timestep": "1000"}, "high"),
        ({"ss_min_timestep": "0", "ss_max_timestep": "875"}, "low"),
        ({"ss_min_timestep": "0", "ss_max_timestep": "1000"}, None),
        ({"ss_min_timestep": "None", "ss_max_timestep": "None"}, None),
        ({"ss_tag_frequency": '{"a photo with high noise": 3}'}, None),
    ],
)
def test_metadata_of_trainers_tell_the_expert(tmp_path: Path, metadata: dict[str, str], expert: str | None) -> None:
    path = lora(tmp_path / "style.safetensors", **metadata)
    wanted = (
        ([path.name], [path.name]) if expert is None else tuple([path.name] * (expert == e) for e in ("high", "low"))
    )
    assert names(path) == wanted


def test_a_file_with_both_halves_is_for_both(tmp_path: Path) -> None:
    path = tmp_path / "style_high_noise.safetensors"
    pair = {"lora_A.weight": torch.ones(1, 2), "lora_B.weight": torch.ones(2, 1)}
    save_file({f"{p}.{STEM}.{k}": t.clone() for p in ("transformer", "transformer_2") for k, t in pair.items()}, path)
    found = placed(path)
    assert [[file.reason for file in files] for files in found.values()] == [["it holds a half for each"]] * 2


def test_a_half_alone_is_for_one_expert_with_a_warning(tmp_path: Path) -> None:
    path = lora(tmp_path / "style_low_noise.safetensors")
    found = placed(path)
    assert not found["high"] and "its other half is not beside it" in found["low"][0].warnings[0]
