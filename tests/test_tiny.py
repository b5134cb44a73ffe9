"""The tiny models are what they claim to be: Wan2.2 folders that the engine's own modules fill exactly."""

from __future__ import annotations

import filecmp
import time
from pathlib import Path

import pytest
import torch
from conftest import TinyModels
from tiny import build_tiny

from lightx2v.config.engine_config import EngineConfig
from lightx2v.loading.model_files import locate
from lightx2v.models.dit import DiTConfig, WanDiT, parameter_dtype
from lightx2v.models.vae import WanVAE
from lightx2v.models.vae_config import VAEConfig
from lightx2v.weights.checkpoint import open_checkpoint
from lightx2v.weights.module_loader import load_into


@pytest.mark.slow
@pytest.mark.parametrize("task", ["t2v", "i2v"])
def test_every_part_fits_its_module(tiny: TinyModels, task: str) -> None:
    files = locate(EngineConfig(model_path=str(getattr(tiny, task)), task=task))
    for path in (files.high, files.low):
        checkpoint = open_checkpoint(path)
        config = DiTConfig.from_checkpoint(files.architecture, checkpoint.shapes)
        assert config.in_dim == (16 if task == "t2v" else 36)
        with torch.device("meta"):
            dit = WanDiT(config)
        load_into(dit, checkpoint, dtype_of=lambda name: parameter_dtype(name, torch.bfloat16), device="cpu")
        assert dit.blocks[0].self_attn.q.weight.dtype == torch.bfloat16
    checkpoint = open_checkpoint(files.vae)
    with torch.device("meta"):
        vae = WanVAE(VAEConfig.from_shapes(checkpoint.shapes))
    load_into(vae, checkpoint, dtype_of=lambda _: torch.float32, device="cpu")


def test_the_same_arguments_give_the_same_bytes_quickly(tiny: TinyModels, tmp_path: Path) -> None:
    start = time.process_time()
    again = build_tiny(tmp_path / "t2v", "t2v")
    assert time.process_time() - start < 3
    names = [path.relative_to(again) for path in again.rglob("*") if path.is_file()]
    assert len(names) == 15
    _, differ, failed = filecmp.cmpfiles(tiny.t2v, again, [str(name) for name in names], shallow=False)
    assert not differ and not failed


def test_the_experts_of_one_model_differ(tiny: TinyModels) -> None:
    high, low = (open_checkpoint(tiny.i2v / f"{which}_noise_model") for which in ("high", "low"))
    assert high.shapes == low.shapes
    assert not any(torch.equal(tensor, low.tensor(name)) for name, tensor in high.tensors())
