"""What only a CUDA device can show: real streams and pinned memory, kernels compiled for it, bf16 against float32.

python -m pytest -m gpu tests/test_gpu.py tests/test_fp8.py tests/test_progress.py
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from conftest import TinyModels
from lora_files import random_pairs, spec, write
from offload_toys import LAYERS, PLANS
from safetensors.torch import save_file
from tiny import DiTSizes, build_tiny
from torch import nn

from lightx2v.attention import fp8_inputs, resolve_attention
from lightx2v.config.presets import resolve
from lightx2v.config.request import Request
from lightx2v.cost.memory_ladder import MemoryLadder
from lightx2v.loading.model_files import locate
from lightx2v.models import fp8_attention, fused
from lightx2v.models.dit import DiTConfig, WanDiT
from lightx2v.models.quant_linear import swap_linears
from lightx2v.models.vae import WanVAE
from lightx2v.models.vae_config import VAEConfig
from lightx2v.offload.device_copies import CudaCopies, Slot
from lightx2v.offload.host_slabs import HostSlabs
from lightx2v.offload.placement import load_offloaded
from lightx2v.offload.resident import LoadInputs
from lightx2v.offload.weight_streamer import StreamedModule, WeightStreamer
from lightx2v.pipeline import LightX2VPipeline
from lightx2v.weights.checkpoint import open_checkpoint
from lightx2v.weights.quant_layout import is_expert_matrix
from lightx2v.weights.quantization import quantise

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
CUDA = torch.device("cuda", 0)


def off(got: torch.Tensor, expected: torch.Tensor) -> float:
    return ((got.float() - expected.float()).norm() / expected.float().norm()).item()


# ---- kernels --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["torch_sdpa", "cudnn", "auto"])
@pytest.mark.parametrize(("queries", "keys"), [(2000, 2000), (777, 60)])
def test_attention_backends_agree_with_float32(name: str, queries: int, keys: int) -> None:
    choice = resolve_attention(name, CUDA, torch.bfloat16, strict=True)
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, length, 8, 128, device=CUDA).bfloat16() for length in (queries, keys, keys))
    exact = torch.softmax(torch.einsum("blnh,bmnh->bnlm", q.double(), k.double()) / 128**0.5, -1)
    expected = torch.einsum("bnlm,bmnh->blnh", exact, v.double())
    assert off(choice.fn(q, k, v), expected) < 5e-3, choice.reason


@pytest.mark.parametrize(
    ("name", "allowed"), [("flash_attn3_fp8", 0.03), ("int8_kitchen", 0.02), ("sol_attn", 0.3), ("auto_fast", 0.03)]
)
def test_inexact_attention_keeps_the_mean_of_values_and_survives_large_channels(name: str, allowed: float) -> None:
    choice = resolve_attention(name, CUDA, torch.bfloat16)
    if name not in ("auto_fast", choice.name):
        pytest.skip(choice.reason)
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 12000, 4, 128, device=CUDA) for _ in range(3))
    q[..., 3] *= 8
    k[..., 70] *= 8
    k, v = k + 3 * torch.randn(4, 128, device=CUDA), v + torch.randn(4, 128, device=CUDA)
    q, k, v = q.bfloat16(), k.bfloat16(), v.bfloat16()
    some = slice(None, None, 100)
    scores = torch.einsum("blnh,bmnh->bnlm", q[:, some].double(), k.double()) / 128**0.5
    expected = torch.einsum("bnlm,bmnh->blnh", torch.softmax(scores, -1), v.double())
    got = choice.fn(q, k, v)[:, some]
    assert off(got, expected) < allowed, choice.reason
    assert abs((got.double() * expected).sum() / expected.square().sum() - 1) < 5e-3  # nothing has shrunk


def test_the_kernels_of_fp8_attention_are_used_here() -> None:
    pytest.importorskip("triton")
    if torch.cuda.get_device_capability(CUDA)[0] != 9:
        pytest.skip("FP8 attention is for Hopper")
    from lightx2v.attention import triton_fp8

    assert fp8_inputs.why_not(triton_fp8, CUDA) == fp8_attention.why_not(triton_fp8, CUDA) == ""
    assert fp8_attention.tested_kernels(CUDA) is triton_fp8


@pytest.mark.parametrize("name", ["flash_attn3_fp8", "sol_attn"])
def test_a_network_with_inexact_attention_is_close_to_the_exact_one(name: str) -> None:
    choice = resolve_attention(name, CUDA, torch.bfloat16)
    if choice.name != name:
        pytest.skip(choice.reason)
    dit = full_width(3, torch.bfloat16)
    exact = velocity(dit)
    dit.self_attention = choice.fn
    assert 0 < off(velocity(dit), exact) < 2e-2


def test_the_fused_kernels_are_used_here() -> None:
    pytest.importorskip("triton")
    from lightx2v.models import triton_kernels

    assert fused.why_not(triton_kernels, CUDA) == {}
    assert all(fused.kernels_for(CUDA, step) is triton_kernels for step in fused._cases(CUDA, fused.ODD))


def full_width(layers: int, compute: torch.dtype) -> WanDiT:
    """Blocks of the real width with the same random weights in any dtype."""
    torch.manual_seed(0)
    with torch.device(CUDA):
        dit = WanDiT(DiTConfig(num_layers=layers)).eval().requires_grad_(False)
        for name, parameter in dit.named_parameters():
            if parameter.ndim == 1 and "norm" not in name:
                nn.init.normal_(parameter, std=0.1)
    return dit.cast(compute)


@torch.inference_mode()
def velocity(dit: WanDiT) -> torch.Tensor:
    torch.manual_seed(1)
    latents, prompt = torch.randn(16, 5, 30, 40).to(CUDA), torch.randn(40, 4096).to(CUDA)
    return dit(latents, 937.0, [dit.encode_text(prompt.to(dit.compute_dtype))])[0]


def test_bf16_is_close_to_float32_through_whole_blocks_fused_or_not() -> None:
    exact = velocity(full_width(3, torch.float32))
    dit = full_width(3, torch.bfloat16)
    dit.self_attention = resolve_attention("auto", CUDA, torch.bfloat16).fn
    with patch.object(fused, "kernels_for", return_value=None):
        plain = velocity(dit)
    got = velocity(dit)
    assert off(plain, exact) < 1e-2
    assert off(got, exact) < max(1.2 * off(plain, exact), 1e-3)


@pytest.mark.parametrize(("dtype", "allowed"), [(torch.float8_e4m3fn, 0.08), (torch.int8, 0.04)])
def test_8_bit_products_are_close_to_float32_through_whole_blocks(dtype: torch.dtype, allowed: float) -> None:
    exact = velocity(full_width(3, torch.float32))
    dit = full_width(3, torch.bfloat16)
    matrices = {name: p for name, p in dit.named_parameters() if is_expert_matrix(name, tuple(p.shape))}
    made = {name: quantise(tensor, dtype) for name, tensor in matrices.items()}
    biases = {name: dit.get_parameter(name.replace(".weight", ".bias")) for name in made}
    swap_linears(dit, dict.fromkeys(made, dtype))
    for name, (q, scale) in made.items():
        linear = dit.get_submodule(name.removesuffix(".weight"))
        linear.weight, linear.weight_scale, linear.bias = (
            nn.Parameter(part, requires_grad=False) for part in (q, scale, biases[name].data)
        )
    assert off(velocity(dit), exact) < allowed


@torch.inference_mode()
def test_the_vae_in_bf16_is_close_to_float32_and_the_condition_is_the_whole_clips() -> None:
    torch.manual_seed(0)
    with torch.device(CUDA):
        vae = WanVAE(VAEConfig(dim=32)).eval()
    latents, picture = torch.randn(16, 4, 12, 16).to(CUDA), torch.rand(3, 96, 128).to(CUDA) * 2 - 1
    exact = torch.cat(list(vae.decode(latents)), dim=1)
    clip = torch.cat([picture[:, None], torch.zeros(3, 32, 96, 128, device=CUDA)], dim=1)
    whole = vae.encode(clip)
    assert off(vae.encode_condition(33, picture), whole) < 1e-5
    vae.bfloat16()
    assert off(torch.cat(list(vae.decode(latents)), dim=1), exact) < 5e-2
    assert off(vae.encode_condition(33, picture), whole) < 5e-2


# ---- offload --------------------------------------------------------------------------------------------------------


def test_casts_into_host_memory_leave_copies_to_the_gpu_alone(tmp_path: Path) -> None:
    """Both use the buffers of the threads that read: tensors that a model in host memory keeps, and LoRAs' weights."""
    torch.manual_seed(0)
    tensors = {f"w{n:03}": torch.randn(1 << (12 if n % 2 else 20)).bfloat16() for n in range(120)}
    save_file(tensors, tmp_path / "w.safetensors")
    small = {name: torch.empty(tensor.shape) for name, tensor in tensors.items() if len(tensor) == 1 << 12}
    checkpoint = open_checkpoint(tmp_path / "w.safetensors")
    read = dict(checkpoint.tensors(dtype_of=lambda _: torch.float32, device=CUDA, into=small.get))
    torch.cuda.synchronize()
    for name, tensor in tensors.items():
        assert read[name].is_cuda is (name not in small)
        assert torch.equal(read[name].cpu(), tensor.float())


def test_host_slabs_are_pinned() -> None:
    slabs = HostSlabs(pin=True)
    [buffer] = slabs.take([3 << 20])
    slabs.wait()
    assert buffer.data_ptr() % 4096 == 0
    # torch asks about the beginning of the storage, and the buffer begins later, on a page of its own.
    assert torch.from_numpy(buffer.numpy()).is_pinned()
    copies = CudaCopies(CUDA)
    slot = Slot(torch.zeros(len(buffer), dtype=torch.uint8, device=CUDA))
    copies.release(slot)
    buffer.random_(0, 255)
    copies.synchronize(copies.load(slot, buffer))
    copies.acquire(slot)
    assert torch.equal(slot.buffer.cpu(), buffer)


@pytest.mark.parametrize("slow", ["copies", "blocks"])
@pytest.mark.parametrize("resident", [0, 3, 8])
def test_blocks_are_used_after_they_came_and_replaced_after_they_ran(slow: str, resident: int) -> None:
    """Wide blocks on few rows make the copies slow; a busy loop in each block makes the blocks slow."""

    def module(seed: int) -> nn.Sequential:
        torch.manual_seed(seed)
        return nn.Sequential(*[nn.Linear(2048, 2048) for _ in range(8)]).requires_grad_(False).to(CUDA)

    modules = {"high": module(1), "low": module(2)}
    x = torch.randn(2, 2048, device=CUDA)
    expected = {name: each(x) for name, each in modules.items()}
    for each in modules.values():
        for block in each:
            if slow == "blocks":
                block.register_forward_hook(lambda *_: torch.cuda._sleep(3_000_000))
    streamed = {name: StreamedModule(module=each, blocks=list(each)) for name, each in modules.items()}
    streamer = WeightStreamer(streamed, CudaCopies(CUDA), CUDA, resident=resident)
    order = ["high", "high", "low", "low", "high", "low", "low"]
    for name, then in zip(order, [*order[1:], "high"], strict=True):
        with streamer.use(name, then) as each:
            assert torch.equal(each(x), expected[name]), (name, then)
    streamer.close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    sizes = DiTSizes(dim=512, ffn_dim=2048, num_heads=4, num_layers=LAYERS)
    return build_tiny(tmp_path_factory.mktemp("gpu") / "t2v", dit=sizes)


@pytest.fixture(scope="module")
def settings(folder: Path) -> Any:
    small = {"height": 64, "width": 96, "frames": 9, "steps": 4, "boundary": 0.9, "shift": 5.0}
    return resolve({"model_path": str(folder), "device": "cuda"}, small)


@pytest.fixture(scope="module")
def pipe(settings: Any) -> Iterator[LightX2VPipeline]:
    with LightX2VPipeline.from_config(settings.engine) as pipe:
        yield pipe


@pytest.fixture(scope="module")
def expected(pipe: LightX2VPipeline, settings: Any) -> torch.Tensor:
    return latents(pipe, settings)


def latents(pipe: LightX2VPipeline, settings: Any, **more: Any) -> torch.Tensor:
    request = Request(**settings.request | {"prompt": "a red ball", "seed": 3} | more)
    result = pipe.run(request, return_latents=True, return_frames=True)
    assert result.latents is not None and result.frames is not None
    return result.latents


@pytest.mark.parametrize("lazy", [False, True])
@pytest.mark.parametrize("name", PLANS)
def test_every_plan_gives_the_resident_models_latents(
    pipe: LightX2VPipeline, settings: Any, expected: torch.Tensor, name: str, lazy: bool
) -> None:
    engine = pipe._engine
    assert engine is not None and engine.placement.plan is not None and engine.placement.plan["mode"] == "resident"
    attention = engine.self_attention, engine.cross_attention
    inputs = LoadInputs(locate(settings.engine), settings.engine, engine.precision, *attention)
    placement = load_offloaded(inputs, MemoryLadder(replace(PLANS[name], from_disk=lazy)))
    other = LightX2VPipeline.from_config(settings.engine)
    other._engine = replace(engine, placement=placement)
    assert torch.equal(latents(other, settings), expected)
    assert not torch.equal(latents(other, settings, prompt="something else", steps=3), expected)
    assert torch.equal(latents(other, settings), expected)
    placement.close()


def test_loras_give_the_same_bits_wherever_the_experts_live_and_after_an_exchange(folder: Path) -> None:
    low_rank = random_pairs(open_checkpoint(folder / "high_noise_model").shapes)
    path = write(folder.parent / "lora.safetensors", low_rank)
    small = {
        "height": 64,
        "width": 96,
        "frames": 9,
        "steps": 4,
        "boundary": 0.9,
        "shift": 5.0,
        "lora_configs": [spec(path, strength=0.1)],
    }
    made = []
    for offload in ({}, {"cpu_offload": True, "offload_granularity": "block"}):
        settings = resolve({"model_path": str(folder), "device": "cuda"} | offload, small)
        with LightX2VPipeline.from_config(settings.engine) as pipe:
            made.append(latents(pipe, settings))
            bare = latents(pipe, settings, loras=())
            assert not torch.equal(bare, made[0])
            made.append(latents(pipe, settings))
    assert all(torch.equal(each, made[0]) for each in made)


def test_image_to_video_runs_and_repeats_itself(tiny: TinyModels, tmp_path: Path) -> None:
    from PIL import Image

    picture = tmp_path / "picture.png"
    Image.new("RGB", (96, 64), (200, 40, 40)).save(picture)
    small = {"height": 64, "width": 96, "frames": 9, "steps": 2, "boundary": 0.9, "task": "i2v"}
    settings = resolve({"model_path": str(tiny.i2v), "device": "cuda", "task": "i2v"}, small)
    with LightX2VPipeline.from_config(settings.engine) as pipe:
        first, second = (latents(pipe, settings, image_path=str(picture)) for _ in range(2))
    assert torch.equal(first, second) and first.isfinite().all()


def test_the_demo_models_video_is_that_of_the_cpu() -> None:
    made = {}
    for device, dtype in (("cpu", "fp32"), ("cuda", "fp32"), ("cuda", "bf16")):
        settings = resolve("demo_t2v_distill_lora", {"device": device, "dtype": dtype, "vae_dtype": "fp32"})
        with LightX2VPipeline.from_config(settings.engine) as pipe:
            made[device, dtype] = latents(pipe, settings)
    assert off(made["cuda", "fp32"], made["cpu", "fp32"]) < 1e-2
    assert off(made["cuda", "bf16"], made["cpu", "fp32"]) < 0.2
