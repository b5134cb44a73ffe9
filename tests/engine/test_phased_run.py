"""Whole runs in phases: equal to the boundary's, with LoRA strengths for each, under every placement."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TinyModels
from lora_files import base_weights, random_pairs, spec, write
from offload_toys import CPU, PLANS
from safetensors.torch import load_file, save_file

from lightx2v.config.presets import resolve
from lightx2v.config.request import Request
from lightx2v.cost.memory_ladder import MemoryLadder
from lightx2v.offload.device_copies import HostCopies
from lightx2v.offload.offloaded import Offloaded
from lightx2v.offload.resident import Resident
from lightx2v.pipeline import LightX2VPipeline

SMALL = {"height": 32, "width": 48, "frames": 5, "steps": 5, "shift": 5.0, "guidance": [3.5, 2.0]}
PHASES = [
    {"expert": "high", "guidance": 3.5},
    {"expert": "high", "from_step": 2, "guidance": 1},
    {"expert": "low", "from_step": 3},
]


@pytest.fixture(scope="module")
def lora(tiny: TinyModels, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """It changes every matrix, and a bias."""
    shapes = base_weights(tiny.t2v).shapes
    path = write(tmp_path_factory.mktemp("loras") / "one.safetensors", random_pairs(shapes, 1))
    bias = {"diffusion_model.blocks.1.ffn.0.diff_b": torch.full(shapes["blocks.1.ffn.0.bias"], 0.3)}
    save_file(load_file(path) | bias, path)
    return path


@pytest.fixture(scope="module")
def settings(tiny: TinyModels, lora: Path) -> Any:
    loras = [replace(spec(lora), strength=(0.0, 1.0, 0.0)).to_json(), spec(lora, "low", 0.5).to_json()]
    return resolve({"model_path": str(tiny.t2v), "device": "cpu", "lora_configs": loras, "phases": PHASES}, SMALL)


@pytest.fixture
def pipe(settings: Any) -> Iterator[LightX2VPipeline]:
    with LightX2VPipeline.from_config(settings.engine) as pipe:
        yield pipe


@pytest.fixture
def request_(settings: Any) -> Request:
    return Request(**{**settings.request, "prompt": "a red ball", "seed": 3})


def made(pipe: LightX2VPipeline, request: Request, **more: Any) -> torch.Tensor:
    latents = pipe.run(request, return_latents=True, **more).latents
    assert latents is not None
    return latents


def test_phases_that_say_what_a_boundary_says_give_its_bits(pipe: LightX2VPipeline, request_: Request) -> None:
    short = replace(request_, loras=(), phases=None, boundary=0.9)
    long = [{"expert": "high"}, {"expert": "low", "below_timestep": 900}]
    assert torch.equal(made(pipe, short), made(pipe, replace(short, boundary=None, phases=long)))


def test_every_phase_has_its_guidance_and_its_strength(
    pipe: LightX2VPipeline, settings: Any, request_: Request, lora: Path
) -> None:
    """Against two engines with one strength each, which take turns."""
    whole = pipe.run(request_, return_latents=True)
    assert whole.report()["phases"] == [
        {"expert": "high", "steps": 2, "guidance": 3.5, "forwards_per_step": 2, "sampler": "unipc"},
        {"expert": "high", "steps": 1, "guidance": 1.0, "forwards_per_step": 1, "sampler": "unipc"},
        {"expert": "low", "steps": 2, "guidance": 2.0, "forwards_per_step": 2, "sampler": "unipc"},
    ]
    assert whole.report()["loras"][0]["strength"] == [0.0, 1.0, 0.0]
    fixed = replace(settings.engine, lora_dynamic_apply=True)
    without, with_one = ((spec(lora, "high", high), spec(lora, "low", 0.5)) for high in (0.0, 1.0))
    with (
        LightX2VPipeline.from_config(replace(fixed, lora_configs=without)) as first,
        LightX2VPipeline.from_config(replace(fixed, lora_configs=with_one)) as second,
    ):
        assert first._engine is not None and second._engine is not None
        plain = replace(request_, loras=None)
        apart = [made(first, plain), made(second, plain)]
        experts = [engine.placement.expert for engine in (first._engine, second._engine)]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(
                first._engine.placement, "expert", lambda which, then=None, phase=0, **_: experts[phase == 1](which)
            )
            mixed = made(first, plain)
    assert whole.latents is not None
    torch.testing.assert_close(whole.latents, mixed, rtol=0, atol=1e-4)
    assert min((whole.latents - other).abs().max() for other in apart) > 0.01


@pytest.mark.parametrize("name", ["swap", "swap, experts leave", "streamed", "one slot"])
def test_strengths_change_under_every_placement(pipe: LightX2VPipeline, request_: Request, name: str) -> None:
    expected = made(pipe, request_)
    engine = pipe._engine
    assert engine is not None and isinstance(engine.placement, Resident)
    copies = HostCopies(poison=True)
    placement = Offloaded(engine.placement, ladder=MemoryLadder(PLANS[name]), device=CPU, copies=copies)
    pipe._engine = replace(engine, placement=placement)
    for _ in range(2):
        assert torch.equal(made(pipe, request_), expected)


def test_strengths_change_where_the_weights_stay_on_the_disk(settings: Any, request_: Request) -> None:
    dynamic = replace(settings.engine, lora_dynamic_apply=True)
    with LightX2VPipeline.from_config(dynamic) as in_memory:
        expected = made(in_memory, request_)
    with LightX2VPipeline.from_config(replace(dynamic, lazy_load=True)) as from_disk:
        for _ in range(2):
            assert torch.equal(made(from_disk, request_), expected)
