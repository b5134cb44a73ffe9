"""`lightx2v-models` lists what was found; the command line, the server and Python run it by its name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from model_tree import comfy_tree, style_lora

from lightx2v.find_models import main
from lightx2v.infer import main as infer
from lightx2v.media.mp4 import read_settings
from lightx2v.pipeline import LightX2VPipeline


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = comfy_tree(tmp_path_factory.mktemp("listed"))
    style_lora(folder)
    return folder


@pytest.fixture(autouse=True)
def user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIGHTX2V_USER_DIR", str(tmp_path / "user"))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)


def test_a_folder_is_remembered_and_its_models_are_listed(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--remember", str(models)]) == 0
    said = capsys.readouterr().out
    for text in (
        "wan2.2_t2v_demo  ", "wan2.2_t2v_high_noise_demo.safetensors", "4.3 MB, fp16, t2v, high noise",
        "rank 16, for Wan Video 2.2 T2V-A14B, triggers: wtrclr style | soft wash",
    ):  # fmt: skip
        assert text in said
    assert main(["--json"]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert [model["name"] for model in listed["models"]][2] == "wan2.2_t2v_demo"
    assert str(models) not in json.dumps(listed)
    assert main(["--forget", str(models)]) == 0
    assert "wan2.2" not in capsys.readouterr().out


def test_mistakes_are_sentences(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--remember", str(tmp_path / "absent")]) == 2
    assert "There is no folder" in capsys.readouterr().err
    assert main(["--model_dirs", str(tmp_path)]) == 0
    assert "expert" not in capsys.readouterr().out


@pytest.mark.slow
def test_a_high_noise_file_is_enough_for_a_video_that_can_be_made_again(
    models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same video as that of the preset with the same weights; its file is found again where it has moved."""
    file = str(models / "diffusion_models/wan2.2_t2v_high_noise_demo.safetensors")
    shared = ["--prompt", "a red ball rolls left", "--steps", "2", "--frames", "5", "--seed", "3"]
    assert infer([*shared, "--high", file, "--save_result_path", str(tmp_path / "mine.mp4")]) == 0
    assert infer([*shared, "--preset", "demo_t2v_base", "--save_result_path", str(tmp_path / "shipped.mp4")]) == 0
    mine, shipped = (read_settings(str(tmp_path / f"{name}.mp4")) for name in ("mine", "shipped"))
    assert mine["preset"] == "wan2.2_t2v_demo"
    assert mine["engine"]["high_noise_original_ckpt"].endswith("wan2.2_t2v_high_noise_demo.safetensors")
    assert mine["request"] == shipped["request"]
    assert [file["role"] for file in mine["files"]] == ["high-noise expert", "low-noise expert", "T5", "VAE"]
    assert mine["files"][0]["size"] == Path(file).stat().st_size
    again = ["--from", str(tmp_path / "mine.mp4"), "--dry_run"]
    assert infer(again) == 0
    Path(file).rename(models / "diffusion_models/moved_high_noise.safetensors")
    capsys.readouterr()
    assert infer(again) == 2
    assert "wan2.2_t2v_high_noise_demo.safetensors (4.3 MB) of this video is neither" in capsys.readouterr().err
    assert infer([*again, "--model_dirs", str(models)]) == 0
    assert "moved_high_noise.safetensors" in capsys.readouterr().out
    (models / "diffusion_models/moved_high_noise.safetensors").rename(file)


@pytest.mark.slow
def test_python_takes_files_too_and_gives_the_presets_frames(models: Path) -> None:
    frames = []
    for pipe, preset in (
        (LightX2VPipeline.from_files(low="wan2.2_t2v_low_noise_demo", model_dirs=[models]), None),
        (LightX2VPipeline(), "demo_t2v_base"),
    ):
        with pipe:
            if preset:
                pipe._overrides = {}
            pipe.create_generator(preset, steps=2)
            made = pipe.generate(prompt="a red ball rolls left", seed=3, frames=5, return_result_tensor=True)
            frames.append(made.frames)
    assert frames[0] is not None and (frames[0] == frames[1]).all()
