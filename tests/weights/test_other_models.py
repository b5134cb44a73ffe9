"""Other Wan models are named for what they are, wherever an expert is expected."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from model_tree import T2V, put
from safetensors.torch import load_file, save_file

from lightx2v.catalog.choose import FileChoice
from lightx2v.catalog.describe import describe
from lightx2v.catalog.scan import scan
from lightx2v.errors import CheckpointError
from lightx2v.weights.checkpoint import open_checkpoint
from lightx2v.weights.model_weights import ModelWeights

EXPERT = "diffusion_pytorch_model.safetensors"
TI2V = {"patch_embedding.weight": (3072, 48, 1, 2, 2), "head.head.weight": (192, 3072)}
SMALL = {f"blocks.{block}.self_attn.q.weight": (4, 4) for block in range(30)}
SMALL |= {"patch_embedding.weight": (1536, 16, 1, 2, 2), "head.head.weight": (64, 1536)}


@pytest.mark.parametrize(
    ("more", "name"),
    [
        (TI2V, r"Wan2\.2-TI2V-5B \(48 latent channels\)"),
        (SMALL, r"Wan2\.1's 1\.3B model"),
        ({"vace_blocks.0.before_proj.weight": (4, 4)}, "a VACE model"),
        ({"vace_patch_embedding.weight": (4, 96, 1, 2, 2)}, "a VACE model"),
        ({"img_emb.proj.0.weight": (4,), "face_adapter.fuser_blocks.0.q.weight": (4, 4)}, "Wan2.2-Animate"),
        ({"casual_audio_encoder.weights": (1, 25, 1, 1)}, "Wan2.2-S2V"),
        ({"img_emb.proj.0.weight": (1280,)}, r"Wan2\.1's image-to-video model"),
        ({"condition_embedder.image_embedder.norm1.weight": (1280,)}, r"Wan2\.1's image-to-video model"),
        ({"ref_conv.weight": (4, 16, 2, 2)}, "a Fun-Control model"),
        ({"control_adapter.conv.weight": (4, 24, 2, 2)}, "a Fun-Camera model"),
        ({"patch_embedding.weight": (160, 52, 1, 2, 2)}, r"a Fun-Control model \(52 input channels\)"),
        ({"patch_embedding.weight": (160, 48, 1, 2, 2)}, r"a Fun-Control model \(48 input channels\)"),
        ({"patch_embedding.weight": (160, 20, 1, 2, 2)}, r"another Wan model \(20 input channels\)"),
    ],
)
@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_another_wan_model_is_named(prefix: str, more: dict[str, tuple[int, ...]], name: str, tmp_path: Path) -> None:
    """By the loader, by the catalogue, and by the command line and the page, which use the catalogue's words."""
    tensors = load_file(T2V / "high_noise_model" / EXPERT) | {key: torch.ones(shape) for key, shape in more.items()}
    path = tmp_path / "wan_high_noise.safetensors"
    save_file({prefix + key: tensor for key, tensor in tensors.items()}, path)
    with pytest.raises(CheckpointError, match=f"wan_high_noise.safetensors is {name}.*Wan2.2-A14B only"):
        ModelWeights.of_expert(open_checkpoint(path))
    found = describe(path, path.stat().st_size)
    assert found is not None and found.kind == "expert" and "This program runs Wan2.2-A14B only" in found.problem
    low = put(T2V / "low_noise_model" / EXPERT, tmp_path / "wan_low_noise.safetensors")
    with pytest.raises(CheckpointError, match=name):
        FileChoice(high=str(path), low=str(low)).settings({})


def test_the_extra_part_of_a_model_alone_is_named_too(tmp_path: Path) -> None:
    """VACE comes as a file of its own, to be put beside the model's."""
    save_file({"vace_blocks.0.self_attn.q.weight": torch.ones(4, 4)}, tmp_path / "vace_module.safetensors")
    (found,) = scan([tmp_path])
    assert found.kind == "expert" and "is a VACE model" in found.problem


def test_the_vae_of_the_5b_model_is_named(tmp_path: Path) -> None:
    shapes = {"encoder.conv1.weight": (160, 12, 3, 3, 3), "decoder.conv1.weight": (8, 48, 3, 3, 3)}
    shapes |= {"conv2.weight": (48, 48, 1, 1, 1)}
    save_file({name: torch.ones(shape) for name, shape in shapes.items()}, tmp_path / "wan2.2_vae.safetensors")
    (found,) = scan([tmp_path])
    assert found.kind == "VAE" and "48 latent channels" in found.problem and "5B" in found.problem


@pytest.mark.parametrize("task", ["T2V", "I2V"])
def test_a14bs_own_experts_are_none_of_them(task: str) -> None:
    folder = T2V.with_name(f"Wan2.2-{task}-Demo") / "high_noise_model"
    assert ModelWeights.of_expert(open_checkpoint(folder)).plain_shapes
