"""The Python API as the tutorial uses it: what is enabled is loaded, LoRAs of both experts, threads, a clean end."""

from __future__ import annotations

import asyncio
import gc
import itertools
import json
import os
import re
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TinyModels
from patience import PATIENCE

from lightx2v import pipeline
from lightx2v.config.engine_config import EngineConfig, ParallelConfig
from lightx2v.config.model_paths import PROJECT
from lightx2v.config.request import SAMPLERS
from lightx2v.errors import BadRequest, Busy, Cancelled, ConfigError
from lightx2v.media.mp4 import read_settings
from lightx2v.pipeline import LightX2VPipeline
from lightx2v.progress import CancelToken, Progress

DEMO = PROJECT / "assets" / "demo"
LORAS = [
    {"name": f"{expert}_noise_model", "path": str(file), "strength": 1.0}
    for expert in ("high", "low")
    for file in (DEMO / "loras").glob(f"wan2.2_t2v_demo_{expert}_noise*")
]
SMALL: dict[str, Any] = {"infer_steps": 2, "num_frames": 5, "height": 32, "width": 32}


@pytest.fixture
def pipe(tiny: TinyModels) -> Iterator[LightX2VPipeline]:
    with LightX2VPipeline(tiny.t2v, "wan2.2_moe", "t2v") as pipe:
        pipe.create_generator(**SMALL)
        yield pipe


def tutorials_example(tmp_path: Path) -> str:
    """With our paths: the demo model, a small configuration, a video in tmp_path."""
    example = (Path(__file__).parents[1] / "data" / "tutorial_wan_moe_t2v.txt").read_text(encoding="utf-8")
    config = json.loads((PROJECT / "presets" / "demo_t2v_base.json").read_text())
    small = {"infer_steps": 2, "target_video_length": 5, "target_height": 64, "target_width": 64}
    (tmp_path / "config.json").write_text(json.dumps(config | small))
    for path, ours in (
        ("/home/user/models/Wan-AI/Wan2.2-T2V-A14B", DEMO / "Wan2.2-T2V-Demo"),
        ("/home/user/LightX2V/configs/wan22/wan_moe_t2v.json", tmp_path / "config.json"),
        ("/home/user/LightX2V/save_results/output_lightx2v_wan22_moe_t2v.mp4", tmp_path / "video.mp4"),
    ):
        assert path in example
        example = example.replace(path, str(ours))
    return example


@pytest.mark.slow
def test_the_tutorials_example_runs_with_its_paths_replaced(tmp_path: Path) -> None:
    example = tutorials_example(tmp_path)
    exec(compile(example, "wan_moe_t2v.py", "exec"), {})
    request = read_settings(tmp_path / "video.mp4")["request"]
    assert request["seed"] == 42 and request["negative_prompt"].startswith("镜头晃动") and request["steps"] == 2


@pytest.mark.slow
def test_the_tutorials_variable_shows_what_each_stage_took(tmp_path: Path) -> None:
    command = [sys.executable, "-c", tutorials_example(tmp_path)]
    shown: dict[str, str] = {}
    for level in ("0", "2"):
        environment = os.environ | {"PYTHONPATH": str(PROJECT), "PROFILING_DEBUG_LEVEL": level}
        ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=True)
        shown[level] = ended.stderr
    lines = ("Load models", "Run Text Encoder", "Run DiT", "Run VAE Decoder", "RUN pipeline")
    assert not [line for line in lines if line in shown["0"]]
    assert all(re.search(rf"INFO +{line} cost \d+\.\d+ seconds$", shown["2"], re.MULTILINE) for line in lines)


def test_what_is_enabled_is_what_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[EngineConfig] = []
    monkeypatch.setattr(pipeline, "load_engine", lambda config, **more: loaded.append(config))
    pipe = LightX2VPipeline(
        "m",
        "wan2.2_moe_distill",
        "i2v",
        high_noise_original_ckpt="h.safetensors",
        low_noise_original_ckpt="l.safetensors",
    )
    pipe.enable_offload(
        cpu_offload=True,
        offload_granularity="block",
        text_encoder_offload=True,
        image_encoder_offload=False,
        vae_offload=False,
    )
    pipe.enable_quantize(
        dit_quantized=True,
        text_encoder_quantized=True,
        high_noise_quantized_ckpt="h8.safetensors",
        low_noise_quantized_ckpt="l8.safetensors",
        text_encoder_quantized_ckpt="t8.pth",
    )
    pipe.enable_lora(LORAS, lora_dynamic_apply=True, lora_allow_partial=True)
    pipe.create_generator(
        attn_mode="torch_sdpa", denoising_step_list=[1000, 500], boundary_step_index=1, guidance_scale=3.5
    )
    (config,) = loaded
    assert (config.model_path, config.model_cls, config.task) == ("m", "wan2.2_moe_distill", "i2v")
    assert (config.high_noise_original_ckpt, config.low_noise_original_ckpt) == ("h.safetensors", "l.safetensors")
    assert (config.cpu_offload, config.offload_granularity) == (True, "block")
    assert (config.t5_cpu_offload, config.vae_cpu_offload) == (True, False)
    assert (config.dit_quantized, config.dit_quant_scheme, config.t5_quantized) == (True, "fp8-sgl", True)
    assert (config.high_noise_quantized_ckpt, config.low_noise_quantized_ckpt) == ("h8.safetensors", "l8.safetensors")
    assert config.t5_quantized_ckpt == "t8.pth" and config.self_attn_1_type == config.cross_attn_1_type == "torch_sdpa"
    assert [lora.expert for lora in config.lora_configs] == ["high", "low"] and config.lora_dynamic_apply
    assert config.lora_allow_partial


def test_a_mesh_needs_its_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[EngineConfig] = []
    monkeypatch.setattr(pipeline, "load_engine", lambda config, **more: loaded.append(config))
    monkeypatch.setenv("WORLD_SIZE", "8")
    pipe = LightX2VPipeline("m")
    pipe.enable_parallel(cfg_p_size=2, seq_p_size=4, seq_p_attn_type="ulysses")
    pipe.create_generator()
    assert loaded[0].parallel == ParallelConfig(cfg_p_size=2, seq_p_size=4)
    pipe.enable_parallel(cfg_p_size=2, seq_p_size=2)
    with pytest.raises(ConfigError, match="8"):
        pipe.create_generator()


@pytest.mark.slow
def test_the_loras_of_both_experts_are_exchanged_and_taken_away_without_a_trace() -> None:
    with LightX2VPipeline(DEMO / "Wan2.2-T2V-Demo", "wan2.2_moe", "t2v") as pipe:
        pipe.create_generator(infer_steps=4, num_frames=5, height=64, width=64)
        latents = []
        for loras in ([], LORAS, LORAS[:1], []):
            pipe.switch_lora(loras)
            result = pipe.generate(prompt="a red ball", seed=1, return_latents=True)
            assert result.latents is not None
            assert [lora["expert"] for lora in result.loras] == ["high", "low"][: len(loras)]
            latents.append(result.latents)
    assert torch.equal(latents[0], latents[3])
    assert not any(torch.equal(latents[0], other) for other in latents[1:3])
    assert not torch.equal(latents[1], latents[2]), "the low-noise expert's counts too"


@pytest.mark.slow
def test_settings_come_before_loading(pipe: LightX2VPipeline) -> None:
    for call in (pipe.enable_offload, pipe.enable_quantize, pipe.enable_parallel, pipe.create_generator):
        with pytest.raises(ConfigError, match="must come before the model is loaded"):
            call()


@pytest.mark.slow
def test_asyncio_goes_on_while_a_video_is_made_and_what_would_disturb_it_is_refused(pipe: LightX2VPipeline) -> None:
    begun, token = threading.Event(), CancelToken()

    def on_progress(event: Progress) -> None:
        if event.stage == "denoise" and not begun.is_set():
            begun.set()
            while not token.cancelled:
                time.sleep(0.005)

    async def story() -> None:
        run = asyncio.to_thread(pipe.generate, prompt="a cat", on_progress=on_progress, cancel=token)
        task = asyncio.create_task(run)
        assert await asyncio.to_thread(begun.wait, PATIENCE)
        for disturbing in (lambda: pipe.generate(prompt="a dog"), lambda: pipe.switch_lora([]), pipe.close):
            with pytest.raises(Busy):
                disturbing()
        token.cancel()
        with pytest.raises(Cancelled):
            await task

    asyncio.run(story())
    assert pipe.generate(prompt="a cat", return_result_tensor=True).frames.shape == (5, 32, 32, 3)


@pytest.mark.slow
def test_the_end_of_the_block_frees_every_weight(tiny: TinyModels) -> None:
    with LightX2VPipeline(tiny.t2v) as pipe:
        pipe.create_generator(**SMALL)
        pipe.generate(prompt="a cat")
        assert pipe._engine is not None
        with pipe._engine.placement.expert("high") as high, pipe._engine.placement.vae() as vae:
            weights = [weakref.ref(weight) for module in (high, vae) for weight in module.parameters()]
        del high, vae
    gc.collect()
    assert len(weights) > 50 and not [ref for ref in weights if ref() is not None]
    with pytest.raises(ConfigError, match="No model is loaded"):
        pipe.generate(prompt="a cat")
    pipe.create_generator(**SMALL)
    assert pipe.generate(prompt="a cat").seed == 42
    pipe.close()
    pipe.close()


STEP_LIST: dict[str, Any] = {"denoising_step_list": [1000, 750, 500], "boundary_step_index": 1}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("schedule", "default"), [({"steps": 3}, "unipc"), (STEP_LIST, "euler")], ids=["shift", "list"]
)
def test_every_sampler_makes_a_video_of_its_own_with_either_schedule(
    pipe: LightX2VPipeline, tmp_path: Path, schedule: dict[str, Any], default: str
) -> None:
    latents: dict[str | None, torch.Tensor] = {}
    for name in (None, *SAMPLERS):
        path = tmp_path / f"{name}.mp4"
        made = pipe.generate(
            prompt="a cat", seed=1, sampler=name, save_result_path=path, return_latents=True, **schedule
        )
        assert made.report()["sampler"] == (name or default)
        assert read_settings(path)["request"]["sampler"] == name
        assert made.latents is not None and bool(made.latents.isfinite().all())
        latents[name] = made.latents
    assert torch.equal(latents[None], latents[default])
    for first, second in itertools.combinations(SAMPLERS, 2):
        assert not torch.equal(latents[first], latents[second])


@pytest.mark.slow
def test_a_keyword_that_is_no_setting_and_a_blank_prompt_are_refused(pipe: LightX2VPipeline) -> None:
    with pytest.raises(BadRequest, match="generate: unknown key 'guidence'. Did you mean 'guidance'"):
        pipe.generate(prompt="a cat", guidence=3.0)  # type: ignore[call-arg]
    with pytest.raises(BadRequest, match="prompt is '&nbsp;'; expected a description of the video"):
        pipe.generate(prompt="&nbsp;")
    pipe.close()
    with pytest.raises(ConfigError, match="override: unknown key 'infer_step'. Did you mean 'infer_steps'"):
        pipe.create_generator(infer_step=3)  # type: ignore[call-arg]
