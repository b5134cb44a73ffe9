"""The same weights in every layout that is accepted make the same latents, to the last bit."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import TinyModels
from dit_reference import expert_in_diffusers, relative
from safetensors.torch import load_file, save_file
from vae_in_diffusers import vae_in_diffusers

from lightx2v.config.presets import resolve
from lightx2v.config.request import Request
from lightx2v.pipeline import LightX2VPipeline
from lightx2v.weights.umt5_names import hf_name

EXPERTS = ("high_noise_model", "low_noise_model")
SIZE = {"height": 32, "width": 32, "frames": 5, "steps": 4}


def latents(model: Path, **settings: object) -> torch.Tensor:
    resolved = resolve({"model_path": str(model), "device": "cpu"}, SIZE | settings)
    request = Request(prompt="a red ball", **(dict(resolved.request) | {"seed": 3}))
    with LightX2VPipeline.from_config(resolved.engine) as pipe:
        result = pipe.run(request, return_latents=True)
    assert result.latents is not None
    return result.latents


@pytest.fixture
def model(tiny: TinyModels, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny.t2v, tmp_path / "model"))


@pytest.fixture(scope="module")
def expected(tiny: TinyModels) -> torch.Tensor:
    return latents(tiny.t2v)


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def without_an_index(model: Path) -> dict[str, object]:
    for file in model.rglob("*.index.json"):
        file.unlink()
    return {}


def one_file_each(model: Path) -> dict[str, object]:
    without_an_index(model)
    for expert in EXPERTS:
        whole = tensors(model / expert)
        for file in (model / expert).glob("*.safetensors"):
            file.unlink()
        save_file(whole, model / expert / "model.safetensors")
    return {}


def named_files(model: Path) -> dict[str, object]:
    """Beside a model that has nothing but a config.json in its place, as with the distilled files."""
    named: dict[str, object] = {}
    for expert in EXPERTS:
        level, file = expert.split("_")[0], model.parent / f"{expert}.safetensors"
        save_file(tensors(model / expert), file)
        for shard in (model / expert).glob("diffusion*"):
            shard.unlink()
        named[f"{level}_noise_original_ckpt"] = str(file)
    return named


def torch_files(model: Path) -> dict[str, object]:
    named: dict[str, object] = {}
    for expert in EXPERTS:
        level, file = expert.split("_")[0], model.parent / f"{expert}.pt"
        torch.save({"state_dict": tensors(model / expert)}, file)
        named[f"{level}_noise_original_ckpt"] = str(file)
    return named


def as_diffusers_saves_it(model: Path) -> dict[str, object]:
    for expert, folder in zip(EXPERTS, ("transformer", "transformer_2"), strict=True):
        expert_in_diffusers(model / expert).save_pretrained(model / folder, max_shard_size="50KB")
        shutil.rmtree(model / expert)
        assert json.loads((model / folder / "config.json").read_text())["_class_name"] == "WanTransformer3DModel"
        assert len(list((model / folder).glob("*.safetensors"))) > 1
    return {}


def a_whole_repository_of_diffusers(model: Path) -> dict[str, object]:
    as_diffusers_saves_it(model)
    (model / "google/umt5-xxl").rename(model / "tokenizer")
    text = torch.load(model / "models_t5_umt5-xxl-enc-bf16.pth", weights_only=True)
    (model / "text_encoder").mkdir()
    save_file({hf_name(name): tensor for name, tensor in text.items()}, model / "text_encoder/model.safetensors")
    vae_in_diffusers(torch.load(model / "Wan2.1_VAE.pth", weights_only=True)).save_pretrained(model / "vae")
    for file in ("models_t5_umt5-xxl-enc-bf16.pth", "Wan2.1_VAE.pth"):
        (model / file).unlink()
    return {}


def a_vae_with_a_prefix(model: Path) -> dict[str, object]:
    vae = torch.load(model / "Wan2.1_VAE.pth", weights_only=True)
    (model / "Wan2.1_VAE.pth").unlink()
    save_file({f"model.{name}": tensor.contiguous() for name, tensor in vae.items()}, model / "vae.safetensors")
    return {"vae_path": str(model / "vae.safetensors")}


LAYOUTS = [without_an_index, one_file_each, named_files, torch_files, as_diffusers_saves_it]
LAYOUTS += [a_whole_repository_of_diffusers, a_vae_with_a_prefix]


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_same_latents(
    layout: Callable[[Path], dict[str, object]], model: Path, expected: torch.Tensor
) -> None:
    settings = layout(model)
    assert torch.equal(latents(model, **settings), expected)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_shards_in_half_precision_are_read_too(dtype: torch.dtype, model: Path, expected: torch.Tensor) -> None:
    for file in model.rglob("*.safetensors"):
        save_file({name: tensor.to(dtype) for name, tensor in load_file(file).items()}, file)
    assert 0 < relative(latents(model), expected) < 0.05
