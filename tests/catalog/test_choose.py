"""Files that a person names are taken as they are; what is left out is found."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from model_tree import T2V, comfy_tree, style_lora

from lightx2v.catalog.choose import FileChoice, named_preset
from lightx2v.config.presets import resolve
from lightx2v.errors import CheckpointError, ConfigError


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = comfy_tree(tmp_path_factory.mktemp("choice"))
    style_lora(folder)
    return folder


def choice(models: Path, **files: str) -> FileChoice:
    return FileChoice(model_dirs=(str(models),), **files)  # type: ignore[arg-type]


def test_one_file_finds_all_others(models: Path) -> None:
    path = models / "diffusion_models/wan2.2_t2v_high_noise_demo.safetensors"
    found = FileChoice(high=str(path)).settings({})  # the folder that it is in tells where to look
    assert found == choice(models, high="wan2.2_t2v_high_noise_demo").settings({})
    engine = resolve(found).engine
    assert engine.low_noise_original_ckpt == str(path).replace("high", "low")
    assert engine.vae_path == str(models / "vae/wan_2.1_vae.pth")


def test_a_pair_outside_of_every_folder_of_models_is_found(tmp_path: Path) -> None:
    for half in ("high", "low"):
        shutil.copy(
            T2V / f"{half}_noise_model/diffusion_pytorch_model.safetensors", tmp_path / f"x_{half}_noise.safetensors"
        )
    model = FileChoice(low=str(tmp_path / "x_low_noise.safetensors")).model
    assert (model.high.path.name, model.low.path.name) == ("x_high_noise.safetensors", "x_low_noise.safetensors")


def test_what_a_person_chose_is_never_overruled(models: Path) -> None:
    """The halves exchanged, and one file's name says the other half: they are taken as they are given."""
    model = choice(models, high="wan2.2_t2v_low_noise_demo", low="wan2.2_t2v_high_noise_demo").model
    assert (model.high.expert, model.low.expert) == ("low", "high") and not model.problems


def test_the_settings_of_the_video_may_be_another_presets(models: Path) -> None:
    start = resolve("t2v_base").request
    made = resolve(choice(models, high="wan2.2_t2v_high_noise_demo").settings("t2v_base"))
    assert made.request == start and made.engine.high_noise_original_ckpt
    assert made.engine.model_path != resolve("t2v_base").engine.model_path


def test_parts_go_over_a_preset(models: Path) -> None:
    named = choice(
        models, t5="umt5_demo_bf16", vae="wan_2.1_vae.pth", lora=["watercolour:0.5", "high=watercolour.safetensors"]
    )
    engine = resolve("demo_t2v_fp8", named.overrides("demo_t2v_fp8"))
    assert (engine.engine.t5_quantized, engine.engine.t5_quantized_ckpt) == (False, None)
    assert engine.engine.t5_original_ckpt == str(models / "text_encoders/umt5_demo_bf16.pth")
    own = resolve("demo_t2v_fp8").engine.lora_configs
    loras = engine.request["loras"]
    assert loras[: len(own)] == own
    path = str(models / "loras/watercolour.safetensors")
    assert [(lora.expert, lora.path, lora.strength) for lora in loras[len(own) :]] == [
        ("high", path, 0.5), ("low", path, 0.5), ("high", path, 1.0),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("{lora}", ("auto", "{lora}", 1.0)),
        ("{lora}:-.5", ("auto", "{lora}", -0.5)),
        ("low={lora}:2", ("low", "{lora}", 2.0)),
        ("someone/loras/style.safetensors:0.8", ("auto", "someone/loras/style.safetensors", 0.8)),
    ],
)
def test_a_lora_may_be_a_path_or_a_name_on_the_hub(models: Path, text: str, expected: tuple[str, str, float]) -> None:
    lora = str(models / "loras/watercolour.safetensors")
    (made,) = choice(models, lora=[text.format(lora=lora)]).overrides({})["loras"]
    names = {"auto": "auto", "low": "low_noise_model"}
    assert made == {"name": names[expected[0]], "path": expected[1].format(lora=lora), "strength": expected[2]}


def test_wrong_files_are_refused_by_name(models: Path) -> None:
    with pytest.raises(CheckpointError, match="--high: .*wan_2.1_vae.pth is of the kind VAE; expected expert"):
        _ = choice(models, high=str(models / "vae/wan_2.1_vae.pth")).model
    with pytest.raises(ConfigError, match="--vae: there is no file .*nothing.pth"):
        choice(models, vae="/nowhere/nothing.pth").overrides({})
    with pytest.raises(ConfigError, match="no LoRA called 'watercolors'.*watercolour"):
        choice(models, lora=["watercolors"]).overrides({})
    with pytest.raises(ConfigError, match="no expert called"):
        _ = choice(models, high="a\0b").model


@pytest.mark.parametrize(
    ("content", "why"), [(b"", "empty|incomplete|damaged"), (b"\x40\0\0\0\0\0\0\0{", "incomplete|damaged")]
)
def test_a_broken_file_that_a_person_named_says_what_is_wrong(tmp_path: Path, content: bytes, why: str) -> None:
    """A download that ended early is a common one."""
    file = tmp_path / "wan_high_noise.safetensors"
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match=why):
        _ = FileChoice(high=str(file)).model


def test_a_found_models_name_is_a_presets_name(models: Path) -> None:
    content = named_preset("wan2.2_t2v_demo", [models])
    assert isinstance(content, dict) and resolve(content).engine.high_noise_original_ckpt
    assert named_preset("demo_t2v_base", [models]) == "demo_t2v_base", "a shipped preset comes first"
    with pytest.raises(
        ConfigError, match="no preset and no found model 'wan2.2_t2v_dem'. Did you mean 'wan2.2_t2v_demo'"
    ):
        named_preset("wan2.2_t2v_dem", [models])
