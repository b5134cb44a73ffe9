"""Offload combined with weights on disk, LoRAs, 8-bit weights and tiles."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TinyModels
from gguf_files import build_wide, make, q4_k_m
from lora_files import random_pairs, spec, write
from offload_toys import Exhausted
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_runs import latents

import lightx2v.offload.placement
from lightx2v.attention import resolve_attention
from lightx2v.config.engine_config import EngineConfig
from lightx2v.config.lora_spec import LoraSpec
from lightx2v.config.presets import resolve
from lightx2v.config.request import Request
from lightx2v.cost.memory_bytes import block_bytes, expert_bytes
from lightx2v.cost.memory_ladder import MemoryLadder, MemoryPlanner
from lightx2v.cost.memory_plan import GIB, MemoryPlan, OffloadOptions, Workload
from lightx2v.errors import CheckpointError, LoraError, OutOfMemory
from lightx2v.loading.expert_loras import ExpertLoras, match_loras
from lightx2v.loading.model_files import ModelFiles, locate
from lightx2v.loading.networks import Precision, expert_weights, load_expert
from lightx2v.loading.prebuilt_cache import find_prebuilt
from lightx2v.offload.device_copies import HostCopies
from lightx2v.offload.placement import load_offloaded, model_sizes, planner_for
from lightx2v.offload.resident import LoadInputs
from lightx2v.pipeline import LightX2VPipeline
from lightx2v.weights.checkpoint import open_checkpoint
from lightx2v.weights.lora import MatchedLora
from lightx2v.weights.model_weights import ModelWeights

pytestmark = pytest.mark.slow

SMALL = {"height": 32, "width": 48, "frames": 5, "steps": 2, "boundary": 0.95, "shift": 5.0}
SWAP = MemoryPlan(mode="swap", resident_blocks=2, text="move", vae="move")
STREAM = replace(SWAP, mode="stream", resident_blocks=0, text="stream", keep_experts=False)


def configured(folder: Path, **overrides: Any) -> tuple[EngineConfig, Request]:
    resolved = resolve({"model_path": str(folder), "device": "cpu"}, SMALL | overrides)
    picture: dict[str, Any] = {} if resolved.engine.task == "t2v" else {"image_path": "first.png"}
    fields: dict[str, Any] = {**resolved.request, "prompt": "a red ball", "seed": 3, **picture}
    return resolved.engine, Request(**fields)


@contextmanager
def loaded(
    config: EngineConfig, plan: MemoryPlan | None, planner: MemoryPlanner | None = None, files: ModelFiles | None = None
) -> Iterator[LightX2VPipeline]:
    """A pipeline; with a plan, offloaded as on a GPU, with the CPU as the device."""
    with LightX2VPipeline.from_config(config) as pipe:
        if plan is not None:
            precision = Precision.of(config)
            choice = resolve_attention("torch_sdpa", precision.device, precision.compute)
            copies = HostCopies(poison=True)
            inputs = LoadInputs(files or locate(config), config, precision, choice, choice)
            placement = load_offloaded(inputs, MemoryLadder(plan, planner), copies=copies)
            assert pipe._engine is not None
            pipe._engine = replace(pipe._engine, placement=placement)
        yield pipe


def resident(config: EngineConfig, request: Request) -> torch.Tensor:
    with loaded(config, None) as pipe:
        return latents(pipe, request)


@pytest.mark.parametrize("plan", [replace(SWAP, from_disk=True), replace(STREAM, from_disk=True)])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_weights_left_on_disk(tiny: TinyModels, plan: MemoryPlan, dtype: str) -> None:
    config, request = configured(tiny.t2v, dtype=dtype)
    with loaded(config, plan) as pipe:
        assert pipe._engine is not None
        with pipe._engine.placement.expert("high"):
            pass
        streamer = pipe._engine.placement._streamers["experts"]  # type: ignore[attr-defined]
        assert all(weights.host is None for weights in streamer.packed.values()), "no copy of the model in memory"
        assert torch.equal(latents(pipe, request), resident(config, request))


@pytest.mark.parametrize("plan", [SWAP, STREAM, replace(STREAM, from_disk=True)])
def test_gguf_weights_wait_and_travel_in_their_blocks(tmp_path: Path, plan: MemoryPlan) -> None:
    folder = build_wide(tmp_path / "model")
    named, floats = make(tmp_path, folder, q4_k_m)
    pair = write(tmp_path / "lora.safetensors", random_pairs({"blocks.0.ffn.0.weight": (512, 256)}, 1))
    loras = [spec(pair, "high"), spec(pair, "low")]
    config, request = configured(folder, dtype="bf16", **named, lora_configs=loras)
    with loaded(config, plan) as pipe:
        assert pipe._engine is not None
        with pipe._engine.placement.expert("high"):
            pass
        streamer = pipe._engine.placement._streamers["experts"]  # type: ignore[attr-defined]
        model = model_sizes(locate(config), config, Precision.of(config))
        block = streamer.packed["high", 0].nbytes
        assert model.dequantised and model.loras and not model.loras_beside and model.weight < 0.8
        assert abs(block - block_bytes(model)) < 0.06 * block, "matrices, and float32 norms in steps of 256 bytes"
        got = latents(pipe, request)
    assert torch.equal(got, resident(config, request))
    unmerged, plain = configured(folder, dtype="bf16", **floats)
    assert not torch.equal(got, resident(unmerged, plain))


def test_8_bit_weights(tiny: TinyModels) -> None:
    config, request = configured(tiny.t2v, dit_quantized=True, dit_quant_scheme="fp8-sgl", build="fp8", dtype="bf16")
    expected = resident(config, request)
    for plan in (SWAP, STREAM, replace(STREAM, from_disk=True)):
        with loaded(config, plan) as pipe:
            assert torch.equal(latents(pipe, request), expected)


@pytest.fixture
def loras(tiny: TinyModels, tmp_path: Path) -> tuple[LoraSpec, LoraSpec]:
    config, _ = configured(tiny.t2v)
    shapes = expert_weights(locate(config), "high", config).shapes
    files = [write(tmp_path / f"{seed}.safetensors", random_pairs(shapes, seed)) for seed in (1, 2)]
    return spec(files[0], "high"), spec(files[1], "low")


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("plan", [SWAP, STREAM])
def test_loras_are_exchanged_in_host_memory(
    tiny: TinyModels, loras: tuple[LoraSpec, LoraSpec], plan: MemoryPlan, dynamic: bool
) -> None:
    config, request = configured(tiny.t2v, lora_dynamic_apply=dynamic)
    with loaded(config, None) as pipe:
        bare = latents(pipe, request)
        with_loras = latents(pipe, replace(request, loras=loras))
    assert not torch.equal(bare, with_loras)
    with loaded(config, plan) as pipe:
        for _ in range(2):
            assert torch.equal(latents(pipe, request), bare)
            assert torch.equal(latents(pipe, replace(request, loras=loras)), with_loras)


def test_loras_stay_right_after_experts_left_the_device_within_a_run(
    tiny: TinyModels, loras: tuple[LoraSpec, LoraSpec]
) -> None:
    config, request = configured(tiny.t2v)
    with loaded(config, None) as pipe:
        bare, with_loras = latents(pipe, request), latents(pipe, replace(request, loras=loras))
    with loaded(config, MemoryPlan(mode="resident", resident_blocks=2)) as pipe:
        assert pipe._engine is not None
        placement = pipe._engine.placement
        with torch.inference_mode():  # as during a run
            assert placement.reduce_memory("denoise") and placement.reduce_memory("denoise")
        assert placement.plan is not None and placement.plan["mode"] == "swap"
        assert torch.equal(latents(pipe, replace(request, loras=loras)), with_loras)
        assert torch.equal(latents(pipe, request), bare)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("start", [0, 20, 30])
def test_a_lora_exchange_continues_after_out_of_memory_with_less_on_the_device(
    tiny: TinyModels, loras: tuple[LoraSpec, LoraSpec], monkeypatch: pytest.MonkeyPatch, dynamic: bool, start: int
) -> None:
    """Memory runs out within the first expert, at its end, or within the second. Half exchanged experts never run."""
    config, request = configured(tiny.t2v, lora_dynamic_apply=dynamic)
    styled = replace(request, loras=loras)
    with loaded(config, None) as pipe:
        bare, with_loras = latents(pipe, request), latents(pipe, styled)
    fault = Exhausted(2, start)
    with loaded(config, MemoryPlan(mode="resident", resident_blocks=2)) as pipe:
        with monkeypatch.context() as patch:
            patch.setattr(MatchedLora, "checked", starved(fault))
            result = pipe.run(styled, return_latents=True)
        assert fault.times == 0 and result.latents is not None and torch.equal(result.latents, with_loras)
        assert len(result.warnings) == 2 and all("while exchanging LoRAs; the run" in w for w in result.warnings)
        again = pipe.run(request, return_latents=True)
        assert again.warnings == () and again.report()["plan"] == result.report()["plan"]
        assert again.latents is not None and torch.equal(again.latents, bare)


def starved(fault: Exhausted) -> Callable[..., dict[str, torch.Tensor]]:
    """In place of looking at what was read for one layer of a LoRA."""
    checked = MatchedLora.checked
    return lambda *given: fault() or checked(*given)


def test_a_failed_exchange_leaves_the_old_loras_alone(
    tiny: TinyModels, loras: tuple[LoraSpec, LoraSpec], monkeypatch: pytest.MonkeyPatch
) -> None:
    config, request = configured(tiny.t2v)
    with loaded(config, None) as pipe:  # resident, and there is nowhere to step down to
        bare = latents(pipe, request)
        with monkeypatch.context() as patch:
            fault = Exhausted(10**6, 7)
            patch.setattr(MatchedLora, "checked", starved(fault))
            with pytest.raises(OutOfMemory, match="while exchanging LoRAs"):
                pipe.run(replace(request, loras=loras))
        assert torch.equal(latents(pipe, request), bare)


def test_loras_are_added_on_the_device_that_computes_also_to_weights_in_host_memory(
    tiny: TinyModels, loras: tuple[LoraSpec, LoraSpec], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(configured(tiny.t2v)[0], lora_configs=loras)
    precision, files = Precision.of(config), locate(config)
    choice = resolve_attention("torch_sdpa", precision.device, precision.compute)
    weights = expert_weights(files, "high", config)
    merged = weights.with_loras(match_loras(loras, "high", weights, config))
    real, asked = ModelWeights.tensors, []

    def tensors(self: ModelWeights, names: Any = None, *, dtype_of: Any = None, device: Any = "cpu", **_: Any) -> Any:
        asked.append(torch.device(device).type)
        return real(self, names, dtype_of=dtype_of)

    monkeypatch.setattr(ModelWeights, "tensors", tensors)
    elsewhere = torch.device("cuda")
    for each in (weights, merged):
        load_expert(files, each, precision, choice, choice, compute_device=elsewhere)
    dit = load_expert(files, merged, precision, choice, choice)
    on = ExpertLoras(dit, "high", weights, list(merged.loras), config, elsewhere)
    on.use(())
    assert asked == ["cpu", "cuda", "cpu", "cuda"]
    assert torch.equal(dit.blocks[0].ffn[0].weight, dict(real(weights))["blocks.0.ffn.0.weight"])


def shapes_of(folder: Path) -> dict[str, tuple[int, ...]]:
    return open_checkpoint(folder / "high_noise_model").shapes


@pytest.fixture
def everywhere(tiny: TinyModels, loras: tuple[LoraSpec, LoraSpec], tmp_path: Path) -> tuple[LoraSpec, ...]:
    """LoRAs on all matrices, and on parameters that are no matrices."""
    shapes = shapes_of(tiny.t2v)
    names = {"blocks.0.norm3.diff": "blocks.0.norm3.weight", "blocks.1.ffn.0.diff_b": "blocks.1.ffn.0.bias"}
    names |= {"blocks.1.diff_m": "blocks.1.modulation", "patch_embedding.diff": "patch_embedding.weight"}
    small = {f"diffusion_model.{key}": torch.full(shapes[name], 0.1) for key, name in names.items()}
    save_file(small, tmp_path / "small.safetensors")
    return (*loras, spec(tmp_path / "small.safetensors", "high"), spec(tmp_path / "small.safetensors", "low"))


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("given", ["by the configuration", "by the request"])
def test_loras_beside_weights_on_disk(
    tiny: TinyModels, everywhere: tuple[LoraSpec, ...], dtype: str, given: str, tmp_path: Path
) -> None:
    """Matrices run beside the weights; the rest is added as it is read."""
    config, request = configured(tiny.t2v, lora_dynamic_apply=True, dtype=dtype)
    styled = replace(request, loras=everywhere)
    with loaded(config, None) as pipe:
        bare, expected = latents(pipe, request), latents(pipe, styled)
    broken = {"diffusion_model.blocks.0.norm3.diff": torch.full((24,), float("nan"))}
    save_file(broken, tmp_path / "broken.safetensors")
    at_load = replace(config, lora_configs=everywhere) if given == "by the configuration" else config
    with loaded(at_load, replace(STREAM, from_disk=True)) as pipe:
        for _ in range(2):
            assert torch.equal(latents(pipe, styled), expected)
            with pytest.raises(LoraError, match="NaN"):
                pipe.run(replace(request, loras=(*everywhere[:2], spec(tmp_path / "broken.safetensors"))))
            assert torch.equal(latents(pipe, styled), expected)
            assert torch.equal(latents(pipe, replace(request, loras=())), bare)


def test_a_request_brings_loras_to_weights_on_disk(tiny: TinyModels, loras: tuple[LoraSpec, LoraSpec]) -> None:
    """Files cannot take merged weights, so LoRAs run beside them, with lora_dynamic_apply or without."""
    config, request = configured(tiny.t2v, lora_dynamic_apply=True)
    with loaded(config, None) as pipe:
        bare, expected = latents(pipe, request), latents(pipe, replace(request, loras=loras))
    with loaded(replace(config, lora_dynamic_apply=False), replace(STREAM, from_disk=True)) as pipe:
        assert torch.equal(latents(pipe, replace(request, loras=loras)), expected)
        assert torch.equal(latents(pipe, request), bare)


def test_a_built_model_stays_on_disk_too(tiny: TinyModels, loras: tuple[LoraSpec, LoraSpec]) -> None:
    config, request = configured(tiny.t2v, build="merged", lora_configs=loras)
    expected = resident(config, request)  # builds it
    files = locate(config)
    built = replace(files, prebuilt=find_prebuilt(files, config, "fp32"))
    assert built.prebuilt is not None
    with loaded(config, replace(STREAM, from_disk=True), files=built) as pipe:
        assert torch.equal(latents(pipe, request), expected)
        with pytest.raises(LoraError, match="cannot be exchanged"):
            pipe.run(replace(request, loras=()))
        assert torch.equal(latents(pipe, request), expected)
    EngineConfig(build="merged", lora_configs=loras, lazy_load=True, cpu_offload=True)  # and so it may be asked for


def test_weights_that_cannot_be_stored_are_built_at_each_read(
    tiny: TinyModels, loras: tuple[LoraSpec, LoraSpec], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LIGHTX2V_CACHE_DIR", "/proc/nowhere")
    fp8 = {"build": "fp8", "dit_quantized": True, "dit_quant_scheme": "fp8-sgl"}
    for settings in ({"build": "merged"}, fp8):
        config, request = configured(tiny.t2v, lora_configs=loras, **settings)
        expected = resident(config, request)
        with loaded(config, replace(STREAM, from_disk=True)) as pipe:
            assert torch.equal(latents(pipe, request), expected)


@pytest.mark.parametrize("tiling", [True, "auto"])
def test_lazy_load_reads_from_disk_on_a_cpu_too(
    tiny: TinyModels, everywhere: tuple[LoraSpec, ...], tiling: bool | str
) -> None:
    more = {"lora_dynamic_apply": True, "lora_configs": everywhere, "use_tiling_vae": tiling}
    config, request = configured(tiny.t2v, **more)
    expected = resident(config, request)
    with LightX2VPipeline.from_config(replace(config, lazy_load=True)) as pipe:
        assert pipe._engine is not None
        streamer = pipe._engine.placement._streamers["experts"]  # type: ignore[attr-defined]
        assert all(weights.host is None for weights in streamer.packed.values())
        result = pipe.run(request, return_latents=True)
        assert result.latents is not None and torch.equal(result.latents, expected)
        plan = result.report()["plan"]
        assert plan["lazy"] and plan["tiling"] is (tiling is True) and "stay on disk" in plan["reason"]
        assert torch.equal(latents(pipe, request), expected)


@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf")])
def test_damaged_weights_that_stay_on_disk_are_found_when_they_are_first_read(
    tiny: TinyModels, tmp_path: Path, value: float
) -> None:
    shutil.copytree(tiny.t2v, tmp_path / "model")
    damaged = "blocks.1.ffn.0.weight"
    (shard,) = (
        path for path in (tmp_path / "model" / "low_noise_model").glob("*.safetensors") if damaged in load_file(path)
    )
    tensors = load_file(shard)
    tensors[damaged] = torch.full_like(tensors[damaged], value)
    save_file(tensors, shard)
    config, request = configured(tmp_path / "model")
    with LightX2VPipeline.from_config(replace(config, lazy_load=True)) as pipe:
        for _ in range(2):
            with pytest.raises(CheckpointError, match=rf"low_noise_model.*{damaged}.*damaged: download it again"):
                pipe.run(request)


def test_image_encoding_continues_after_out_of_memory_with_less_on_the_device(tiny: TinyModels, tmp_path: Path) -> None:
    Image.new("RGB", (48, 32), (200, 40, 40)).save(tmp_path / "first.png")
    config, request = configured(tiny.i2v, task="i2v")
    request = replace(request, image_path=str(tmp_path / "first.png"))
    expected = resident(config, request)
    with loaded(config, MemoryPlan(mode="resident", resident_blocks=2)) as pipe:
        assert pipe._engine is not None
        with pipe._engine.placement.vae() as vae:
            fault = Exhausted(2)
            vae.conv1.register_forward_pre_hook(fault)
        result, again = (pipe.run(request, return_latents=True) for _ in range(2))
    assert fault.times == 0 and result.latents is not None and torch.equal(result.latents, expected)
    assert len(result.warnings) == 2 and all("in the stage image" in warning for warning in result.warnings)
    assert again.warnings == () and again.report()["plan"] == result.report()["plan"]


@pytest.mark.parametrize("asked", [True, False])
def test_use_tiling_vae_is_obeyed(tiny: TinyModels, asked: bool, tmp_path: Path, monkeypatch: Any) -> None:
    from lightx2v.models.vae import WanVAE

    Image.effect_mandelbrot((320, 80), (-2, -1, 1, 1), 20).convert("RGB").save(tmp_path / "first.png")
    config, request = configured(tiny.i2v, task="i2v", height=64, width=512, use_tiling_vae=asked)
    request = replace(request, image_path=str(tmp_path / "first.png"))
    seen: list[bool] = []
    for name in ("decode", "encode_condition"):
        original = getattr(WanVAE, name)

        def spy(*args: Any, _original: Any = original, **more: Any) -> Any:
            if "tiling" in more:  # a tile is decoded by another call, without
                seen.append(more["tiling"] is not None)
            return _original(*args, **more)

        monkeypatch.setattr(WanVAE, name, spy)
    with LightX2VPipeline.from_config(config) as pipe:
        result = pipe.run(request, return_frames=True)
    assert seen == [asked, asked]
    assert result.frames is not None and result.frames.shape[0] == request.frames


def test_loras_do_not_keep_a_model_in_host_memory_that_is_too_small(
    tiny: TinyModels, everywhere: tuple[LoraSpec, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (GIB, GIB))
    monkeypatch.setattr(lightx2v.offload.placement, "host_memory", lambda: (2**16, 2**17))

    def planned(**settings: Any) -> tuple[MemoryPlan, int]:
        config, request = configured(tiny.t2v, device="auto", cpu_offload=True, lora_configs=everywhere, **settings)
        on_gpu = replace(Precision.of(config), device=torch.device("cuda"))
        choice = resolve_attention("torch_sdpa", torch.device("cpu"), on_gpu.compute)
        planner = planner_for(LoadInputs(locate(config), config, on_gpu, choice, choice))
        assert planner is not None
        return planner.plan(Workload.of(request.latent_shape, guided=True)), planner.model.loras

    plan, size = planned()
    sizes = [sum(pair.numel() for pair in pairs.values()) for pairs in random_pairs(shapes_of(tiny.t2v)).values()]
    small = 24 + 48 + 6 * 24 + 24 * 16 * 4
    assert plan.from_disk and plan.mode == "swap" and size == 2 * 4 * (sum(sizes) + small)
    plan, size = planned(build="merged")
    assert not plan.from_disk and size == 0, "no file has what is only made in memory"


def test_a_planner_counts_this_model_and_plans_for_each_request(tiny: TinyModels) -> None:
    config, request = configured(tiny.t2v)
    model = model_sizes(locate(config), config, Precision.of(config))
    parameters = expert_weights(locate(config), "high", config).shapes.values()
    assert expert_bytes(model) == pytest.approx(4 * sum(torch.Size(shape).numel() for shape in parameters), rel=0.3)
    planner = MemoryPlanner(vram=4 * GIB, ram=GIB, model=model, options=OffloadOptions(cpu_offload=True))
    expected = resident(config, request)
    with loaded(config, STREAM, planner) as pipe:
        result = pipe.run(request, return_latents=True)
        plan = result.report()["plan"]
        assert plan["mode"] == "swap" and plan["bytes"]["denoise"] > 0 and "one expert" in plan["reason"]
        assert result.latents is not None and torch.equal(result.latents, expected)
        assert pipe._engine is not None and pipe._engine.placement.reduce_memory("denoise")
        lowered = pipe.run(request, return_latents=True)
        assert lowered.report()["plan"]["mode"] == "stream"
        assert lowered.latents is not None and torch.equal(lowered.latents, expected)
