"""Two files that cannot be the two experts of a task are refused before they are loaded."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from conftest import TinyModels
from safetensors.torch import load_file, save_file

from lightx2v.errors import CheckpointError
from lightx2v.weights.checkpoint import open_checkpoint
from lightx2v.weights.dit_names import wan_to_diffusers
from lightx2v.weights.expert_pair import check_expert_pair


def check(high: Path, low: Path, task: str) -> tuple[str, ...]:
    return check_expert_pair(open_checkpoint(high), open_checkpoint(low), task)


def merged(folder: Path, path: Path, prefix: str = "", **metadata: str) -> Path:
    tensors = {name: t for shard in sorted(folder.glob("*.safetensors")) for name, t in load_file(shard).items()}
    save_file({prefix + name: tensor for name, tensor in tensors.items()}, path, metadata=metadata or None)
    return path


@pytest.mark.parametrize("task", ["t2v", "i2v", "flf2v"])
def test_the_right_pair_gets_no_warning(tiny: TinyModels, task: str) -> None:
    model = tiny.t2v if task == "t2v" else tiny.i2v
    assert check(model / "high_noise_model", model / "low_noise_model", task) == ()


def test_weights_of_the_other_task_are_refused(tiny: TinyModels) -> None:
    with pytest.raises(CheckpointError, match=r"16 input channels \(text-to-video\); task i2v needs 36"):
        check(tiny.t2v / "high_noise_model", tiny.i2v / "low_noise_model", "i2v")
    with pytest.raises(CheckpointError, match=r"low-noise.*36 input channels \(image-to-video\); task t2v needs 16"):
        check(tiny.t2v / "high_noise_model", tiny.i2v / "low_noise_model", "t2v")


def test_the_task_is_recognised_in_other_layouts_too(tiny: TinyModels, tmp_path: Path) -> None:
    prefixed = merged(tiny.t2v / "high_noise_model", tmp_path / "a.safetensors", "model.diffusion_model.")
    tensors = load_file(prefixed)
    names = {name: wan_to_diffusers(name.removeprefix("model.diffusion_model.")) for name in tensors}
    save_file({names[name]: tensor for name, tensor in tensors.items()}, tmp_path / "b.safetensors")
    for path in (prefixed, tmp_path / "b.safetensors"):
        with pytest.raises(CheckpointError, match="16 input channels"):
            check(path, tiny.t2v / "low_noise_model", "i2v")


def test_one_expert_given_twice_is_refused(tiny: TinyModels, tmp_path: Path) -> None:
    high = tiny.t2v / "high_noise_model"
    shutil.copytree(high, tmp_path / "low_noise_model")
    for low in (high, tmp_path / "low_noise_model"):
        with pytest.raises(CheckpointError, match="are the same"):
            check(high, low, "t2v")


@pytest.mark.parametrize("dtypes", ["float32 float16", "float32 bfloat16", "bfloat16 float16", "float16 float16"])
@pytest.mark.parametrize("renamed", [False, True])
def test_one_expert_given_twice_is_refused_in_any_dtypes_and_names(
    tiny: TinyModels, tmp_path: Path, dtypes: str, renamed: bool
) -> None:
    shards = sorted((tiny.t2v / "high_noise_model").glob("*.safetensors"))
    tensors = {name: tensor.float() for shard in shards for name, tensor in load_file(shard).items()}
    paths = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    for path, dtype in zip(paths, dtypes.split(), strict=True):
        new = wan_to_diffusers if renamed and path == paths[1] else str
        save_file({new(name): tensor.to(getattr(torch, dtype)) for name, tensor in tensors.items()}, path)
    for high, low in (paths, paths[::-1]):
        with pytest.raises(CheckpointError, match="are the same"):
            check(high, low, "t2v")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_two_experts_in_different_dtypes_are_a_pair(tiny: TinyModels, tmp_path: Path, dtype: torch.dtype) -> None:
    for half, wanted in (("high", torch.float16), ("low", dtype)):
        tensors = load_file(merged(tiny.t2v / f"{half}_noise_model", tmp_path / "whole.safetensors"))
        save_file({name: tensor.to(wanted) for name, tensor in tensors.items()}, tmp_path / f"{half}.safetensors")
    assert check(tmp_path / "high.safetensors", tmp_path / "low.safetensors", "t2v") == ()


def test_names_of_swapped_experts_cause_a_warning(tiny: TinyModels, tmp_path: Path) -> None:
    high, low = tiny.t2v / "high_noise_model", tiny.t2v / "low_noise_model"
    warnings = check(low, high, "t2v")
    assert len(warnings) == 2
    assert "high-noise expert is loaded from" in warnings[0] and "is the low-noise one" in warnings[0]
    released = merged(low, tmp_path / "wan2.2_t2v_A14b_low_noise_lightx2v_4step.safetensors")
    plain = merged(high, tmp_path / "plain.safetensors")
    assert len(check(released, plain, "t2v")) == 1
    assert check(plain, released, "t2v") == ()


def test_metadata_names_the_expert_where_the_file_name_does_not(tiny: TinyModels, tmp_path: Path) -> None:
    a = merged(tiny.t2v / "high_noise_model", tmp_path / "a.safetensors", title="Wan2.2 high noise")
    b = merged(tiny.t2v / "low_noise_model", tmp_path / "b.safetensors", title="Wan2.2 low_noise expert")
    assert check(a, b, "t2v") == ()
    assert len(check(b, a, "t2v")) == 2
