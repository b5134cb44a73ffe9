"""From a configuration to a model's files, and to a useful message about missing ones."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from conftest import TinyModels

from lightx2v.config.engine_config import EngineConfig
from lightx2v.errors import CheckpointError
from lightx2v.hub import find_all
from lightx2v.hub import missing as download_missing
from lightx2v.loading.model_files import locate


@pytest.fixture
def model(tiny: TinyModels, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny.t2v, tmp_path / "models" / "Wan-AI" / "Wan2.2-T2V-A14B"))


def config(model: Path | str, **more: Any) -> EngineConfig:
    return EngineConfig(model_path=str(model), **more)


def missing(settings: EngineConfig, *words: str) -> str:
    with pytest.raises(CheckpointError) as caught:
        locate(settings)
    assert all(word in str(caught.value) for word in words), caught.value
    return str(caught.value)


def test_the_official_layout_needs_only_its_folder(model: Path) -> None:
    files = locate(config(model))
    assert (files.high, files.low) == (model / "high_noise_model", model / "low_noise_model")
    assert files.t5 == model / "models_t5_umt5-xxl-enc-bf16.pth"
    assert files.vae == model / "Wan2.1_VAE.pth"
    assert files.tokenizer == model / "google" / "umt5-xxl"
    assert files.architecture and files.architecture["in_dim"] == 16


def test_the_folders_of_diffusers_are_known_for_the_experts(model: Path) -> None:
    for ours, theirs in (("high_noise_model", "transformer"), ("low_noise_model", "transformer_2")):
        (model / ours).rename(model / theirs)
    files = locate(config(model))
    assert (files.high.name, files.low.name) == ("transformer", "transformer_2")
    assert files.architecture
    assert set(find_all(config(model)).values()) == {files.high, files.low, files.t5, files.tokenizer, files.vae}
    assert not download_missing(config(model)), "the files that load are the files that count as here"


def test_a_whole_repository_of_diffusers_is_found_by_its_name(model: Path) -> None:
    settings = config("Wan-AI/Wan2.2-T2V-A14B-Diffusers")
    assert download_missing(settings) == [
        f"Wan-AI/Wan2.2-T2V-A14B-Diffusers/{part}/"
        for part in ("transformer", "transformer_2", "text_encoder", "tokenizer", "vae")
    ]
    theirs = model.parent / "Wan2.2-T2V-A14B-Diffusers"
    for part in ("transformer", "transformer_2", "text_encoder", "tokenizer", "vae"):
        (theirs / part).mkdir(parents=True)
        (theirs / part / "diffusion_pytorch_model.safetensors").touch()
    files = locate(config(theirs))
    assert (files.high.name, files.low.name, files.t5.name, files.vae.name) == (
        *("transformer", "transformer_2", "text_encoder", "vae"),
    )
    assert locate(config(model, vae_path=str(theirs / "vae"))).vae == theirs / "vae"


@pytest.mark.parametrize("absolute", [True, False])
def test_original_files_go_before_the_folders(model: Path, absolute: bool) -> None:
    distilled = model.parents[1] / "lightx2v" / "high.safetensors"
    distilled.parent.mkdir()
    distilled.touch()
    named = str(distilled) if absolute else "lightx2v/high.safetensors"
    files = locate(config(model, high_noise_original_ckpt=named, models_dir=str(model.parents[1])))
    assert (files.high, files.low) == (distilled, model / "low_noise_model")


def test_quantised_files_go_before_original_ones_when_asked_for(model: Path) -> None:
    for name in ("fp8.safetensors", "bf16.safetensors"):
        (model / name).touch()
    paths = {
        "high_noise_quantized_ckpt": str(model / "fp8.safetensors"),
        "low_noise_original_ckpt": str(model / "bf16.safetensors"),
    }
    files = locate(config(model, dit_quantized=True, dit_quant_scheme="fp8-sgl", **paths))
    assert (files.high.name, files.low.name) == ("fp8.safetensors", "bf16.safetensors")


@pytest.mark.parametrize("root", ["models_dir", "cwd", "model", "beside the model"])
def test_where_relative_paths_are_looked_for(
    model: Path, tmp_path: Path, root: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders = {
        "models_dir": tmp_path / "dir",
        "cwd": tmp_path / "cwd",
        "model": model,
        "beside the model": model.parent,
    }
    for folder in folders.values():
        folder.mkdir(exist_ok=True)
    (folders[root] / "mine.pth").touch()
    monkeypatch.chdir(folders["cwd"])
    assert locate(config(model, vae_path="mine.pth", models_dir=str(folders["models_dir"]))).vae.samefile(
        folders[root] / "mine.pth"
    )


def test_the_model_itself_may_be_below_models_dir(model: Path) -> None:
    assert locate(config("Wan-AI/Wan2.2-T2V-A14B", models_dir=str(model.parents[1]))).low == model / "low_noise_model"


def test_a_vae_may_be_named_by_its_folder(model: Path, tmp_path: Path) -> None:
    shutil.move(model / "Wan2.1_VAE.pth", tmp_path / "Wan2.1_VAE.pth")
    assert locate(config(model, vae_path=str(tmp_path))).vae == tmp_path / "Wan2.1_VAE.pth"


@pytest.mark.parametrize(("scheme", "kind"), [("fp8-sgl", "fp8"), ("int8-vllm", "int8"), ("fp8", "fp8")])
def test_a_quantised_text_encoder_is_found_by_its_scheme(model: Path, scheme: str, kind: str) -> None:
    (model / "fp8").mkdir()
    file = model / "fp8" / f"models_t5_umt5-xxl-enc-{kind}.pth"
    file.touch()
    assert locate(config(model, t5_quantized=True, t5_quant_scheme=scheme)).t5 == file


def test_lightx2vs_subfolders_go_before_the_root(model: Path) -> None:
    for folder in ("original", "distill_fp8"):
        (model / folder).mkdir()
        (model / folder / "Wan2.1_VAE.pth").touch()
    assert locate(config(model)).vae == model / "distill_fp8" / "Wan2.1_VAE.pth"


def test_all_that_is_missing_is_in_one_error(model: Path) -> None:
    shutil.rmtree(model / "low_noise_model")
    shutil.rmtree(model / "google")
    (model / "Wan2.1_VAE.pth").unlink()
    message = missing(
        config(model, t5_original_ckpt="nowhere/t5.pth"),
        "low-noise expert: looked in …/Wan-AI/Wan2.2-T2V-A14B for low_noise_model, transformer_2",
        "text encoder: t5_original_ckpt is nowhere/t5.pth; looked for",
        "tokenizer: looked in",
        "VAE: looked in",
        "Wan2.1_VAE.pth",
        "Set model_path",
    )
    assert "high-noise" not in message
    assert str(model.parents[1]) not in message


def test_a_model_folder_that_is_not_there(tmp_path: Path) -> None:
    message = missing(config(tmp_path / "absent"), "there is no folder", "absent (model_path)")
    assert message.count("model_path)") == 5


def test_a_model_whose_every_part_is_named_needs_no_folder(model: Path, tmp_path: Path) -> None:
    parts = {
        "high_noise_original_ckpt": model / "high_noise_model",
        "low_noise_original_ckpt": model / "low_noise_model",
        "t5_original_ckpt": model / "models_t5_umt5-xxl-enc-bf16.pth",
        "t5_tokenizer_path": model / "google" / "umt5-xxl",
        "vae_path": model / "Wan2.1_VAE.pth",
    }
    files = locate(config(tmp_path / "absent", **{key: str(path) for key, path in parts.items()}))
    assert files.architecture and files.architecture["num_layers"] == 2


def test_config_json_is_found_where_lightx2v_finds_it_and_may_be_absent(model: Path) -> None:
    description = json.loads((model / "low_noise_model" / "config.json").read_text())
    for expert in ("high", "low"):
        (model / f"{expert}_noise_model" / "config.json").unlink()
    assert locate(config(model)).architecture is None
    (model / "config.json").write_text('{"framework": "pytorch"}')  # of something else
    (model / "original").mkdir()
    (model / "original" / "config.json").write_text(json.dumps(description))
    assert locate(config(model)).architecture == description


def test_a_broken_config_json_is_named(model: Path) -> None:
    (model / "low_noise_model" / "config.json").write_text("{")
    missing(config(model), "low_noise_model/config.json is not valid JSON")


@pytest.mark.parametrize("expert", ["high_noise_model", "low_noise_model"])
@pytest.mark.parametrize(
    "content", ["{", "[]", '{"num_layers": "x"}', '{"dim": 24, "eps": "x"}', '{"eps": true, "dim": 24}']
)
def test_a_damaged_config_beside_either_expert_is_an_error(model: Path, expert: str, content: str) -> None:
    (model / expert / "config.json").write_text(content)
    missing(config(model), f"{expert}/config.json")
