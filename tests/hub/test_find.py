"""Where the parts of a model are found on this machine, and what is missing then."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest
from hub_models import point_here

from lightx2v.config.engine_config import EngineConfig
from lightx2v.config.lora_spec import LoraSpec
from lightx2v.config.model_paths import parts, shard_names
from lightx2v.errors import LoraError
from lightx2v.hub import find, find_all, find_cached, find_lora, find_part, missing, model_folder

MODEL = "Wan-AI/Wan2.2-T2V-A14B"
CONFIG = EngineConfig(model_path=MODEL)
OFFICIAL = [
    "high_noise_model/model.safetensors",
    "low_noise_model/model.safetensors",
    "models_t5_umt5-xxl-enc-bf16.pth",
    "google/umt5-xxl/tokenizer.json",
    "Wan2.1_VAE.pth",
]
DIFFUSERS = [
    "transformer/model.safetensors",
    "transformer_2/model.safetensors",
    "text_encoder/model.safetensors",
    "tokenizer/tokenizer.json",
    "original/Wan2.1_VAE.pth",
]


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder, empty, with an empty cache below it."""
    point_here(monkeypatch, tmp_path / "home")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def touch(*paths: Path) -> Path:
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return paths[0]


@pytest.mark.parametrize("layout", [OFFICIAL, DIFFUSERS], ids=["official", "diffusers"])
def test_a_local_folder_in_either_layout_is_complete(here: Path, layout: list[str]) -> None:
    assert list(find_all(CONFIG).values()) == [None] * 5
    touch(*(here / MODEL / path for path in layout))
    assert missing(CONFIG) == []
    places = find_all(CONFIG)
    assert list(places) == [part.name for part in parts(CONFIG)]
    first = [path.split("/")[0] for path in layout]
    assert [place and place.relative_to(here / MODEL).parts[0] for place in places.values()] == first


@pytest.mark.parametrize("layout", [OFFICIAL, DIFFUSERS], ids=["official", "diffusers"])
def test_a_repository_in_the_shared_cache_is_complete(here: Path, layout: list[str]) -> None:
    commit = "a" * 40
    repo = here / "home" / "hub" / f"models--{MODEL.replace('/', '--')}"
    touch(repo / "refs" / "main").write_text(commit)
    touch(*(repo / "snapshots" / commit / path for path in layout))
    assert missing(CONFIG) == [] and model_folder(CONFIG) == repo / "snapshots" / commit
    touch(repo / "snapshots" / commit / Path(layout[0]).parent / "part-00001-of-00002.safetensors")
    assert missing(CONFIG) == [f"{MODEL}/high_noise_model/"]


def test_a_named_part_inside_the_model_folder_is_found_and_not_asked_for_on_the_hub(here: Path) -> None:
    touch(*(here / MODEL / path for path in OFFICIAL))
    config = replace(CONFIG, high_noise_original_ckpt="distill_models/high/model.safetensors")
    assert missing(config) == ["distill_models/high/model.safetensors"]
    file = touch(here / MODEL / "distill_models" / "high" / "model.safetensors")
    assert missing(config) == [] and find_all(config)["distill_models/high/model.safetensors"] == file


def test_the_architecture_may_be_anywhere_in_the_model_folder(here: Path) -> None:
    config = replace(CONFIG, high_noise_original_ckpt="/high.safetensors", low_noise_original_ckpt="/low.safetensors")
    (architecture,) = [part for part in parts(config) if part.title == "architecture"]
    assert architecture.name == f"{MODEL}/high_noise_model/config.json" and find_part(architecture, config) is None
    file = touch(here / MODEL / "transformer" / "config.json")
    assert find_part(architecture, config) == file


def test_a_vae_may_be_named_by_its_folder(here: Path) -> None:
    config = replace(CONFIG, vae_path="vae")
    vae = parts(config)[-1]
    (here / "vae").mkdir()
    assert find_part(vae, config) is None
    file = touch(here / "vae" / "Wan2.1_VAE.pth")
    assert find_part(vae, config) == file


@pytest.mark.parametrize("folder", ["models", ".", MODEL, "Wan-AI"])
def test_a_lora_is_looked_for_below_the_roots_and_in_and_beside_the_model(here: Path, folder: str) -> None:
    (here / MODEL).mkdir(parents=True)
    config = replace(CONFIG, models_dir=str(here / "models"))
    with pytest.raises(LoraError, match="There is no LoRA style.safetensors. Looked for .*models/style.safetensors"):
        find_lora("style.safetensors", config)
    file = touch(here / folder / "style.safetensors")
    assert os.path.samefile(find_lora("style.safetensors", config), file)
    assert find_all(replace(config, lora_configs=(LoraSpec(path=str(file)),)))[str(file)] == file


def test_a_name_that_no_file_can_have_is_nowhere() -> None:
    assert find("a" * 300, CONFIG) is None and find("a\0b", CONFIG) is None and find_cached("a\0b/c/d") is None


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("model-00002-of-00003.safetensors", 3),
        ("diffusion_pytorch_model-00001-of-00006.bin", 6),
        ("model.safetensors", 0),
        ("model-2-of-3.safetensors", 0),
        ("model-00001-of-99999.safetensors", 0),
    ],
)
def test_a_shard_names_the_whole_set(name: str, count: int) -> None:
    names = shard_names(name)
    assert len(names) == count and (not names or name in names)
