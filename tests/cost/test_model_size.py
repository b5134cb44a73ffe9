"""The sizes of GGUF models that predictions count with: from names, from files, and as the engine counts them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from gguf_files import build_wide, make, q4_k_m

from lightx2v.config.architecture import DiTConfig
from lightx2v.config.engine_config import EngineConfig
from lightx2v.config.presets import resolve
from lightx2v.config.request import Request
from lightx2v.cost.memory_bytes import block_weights, denoise_bytes, expert_bytes, host_bytes, lora_bytes
from lightx2v.cost.memory_forecast import forecast_for_gpu
from lightx2v.cost.memory_plan import GIB, TEXT_WEIGHTS, MemoryPlan, ModelSize, Workload
from lightx2v.cost.model_size import model_size
from lightx2v.loading.model_files import locate
from lightx2v.loading.networks import Precision
from lightx2v.offload.placement import model_sizes

SWAP = MemoryPlan(mode="swap", resident_blocks=40)
RESIDENT = MemoryPlan(mode="resident", resident_blocks=40)


@pytest.mark.parametrize(("name", "file_gb"), [("q4", 9.65), ("q5", 10.8)])
@pytest.mark.parametrize("task", ["t2v", "i2v"])
def test_presets_count_the_published_files_before_they_are_here(task: str, name: str, file_gb: float) -> None:
    model = model_size(resolve(f"{task}_distill_gguf_{name}").engine, 2)
    assert model.dequantised and not model.loras_beside
    assert model.weight * 40 * block_weights(model.dit) / 1e9 == pytest.approx(file_gb - 0.46, rel=0.02)
    assert model.text == TEXT_WEIGHTS
    assert model.loras / 1e9 == pytest.approx(2 * 1.23, rel=0.01), "two of rank 64 in float32"


@pytest.mark.parametrize(
    ("settings", "weight"),
    [
        ({"high_noise_original_ckpt": "a/wan_high_Q8_0.gguf", "low_noise_original_ckpt": "b.gguf"}, 34 / 32),
        ({"dit_quantized": True, "dit_quant_scheme": "gguf-Q6_K", "high_noise_quantized_ckpt": "a.bin"}, 210 / 256),
        ({"high_noise_original_ckpt": "a/unnamed.gguf"}, 2),
        ({"high_noise_original_ckpt": "a/wan_Q8_0.safetensors"}, 2),
    ],
)
def test_a_name_or_a_scheme_says_the_bytes_of_a_weight(settings: dict[str, object], weight: float) -> None:
    assert model_size(EngineConfig(**settings), 2).weight == pytest.approx(weight)  # type: ignore[arg-type]


def test_a_text_encoder_in_gguf_is_counted_without_its_table() -> None:
    config = EngineConfig(t5_original_ckpt="umt5-xxl-encoder-Q8_0.gguf")
    assert model_size(config, 2).text == int(TEXT_WEIGHTS * 34 / 32)


@pytest.mark.slow
def test_the_forecast_of_a_files_size_agrees_with_its_header(tmp_path: Path) -> None:
    folder = build_wide(tmp_path / "model")
    named, _ = make(tmp_path, folder, q4_k_m)
    resolved = resolve({"model_path": str(folder), "device": "cpu", "dtype": "bf16"}, named)
    exact = model_sizes(locate(resolved.engine), resolved.engine, Precision.of(resolved.engine))
    guessed = model_size(resolved.engine, 2)
    assert guessed.dequantised and exact.dequantised
    # The tiny model's weights outside of the blocks are a third of it, and some of them are in float32.
    assert 1 <= expert_bytes(guessed) / expert_bytes(exact) < 1.3


def test_a_running_block_counts_its_dequantised_weights() -> None:
    need = Workload.of((16, 21, 60, 104), guided=False)
    shape = DiTConfig()
    plain = ModelSize(weight=0.65)
    eight_bits = need.tokens * shape.dim
    gguf = denoise_bytes(replace(plain, dequantised=True), need)
    matrices = 2 * (8 * shape.dim**2 + 2 * shape.dim * shape.ffn_dim)
    assert denoise_bytes(plain, need) - eight_bits < gguf <= denoise_bytes(plain, need) + matrices
    short = Workload.of((16, 1, 30, 52), guided=False)
    assert denoise_bytes(replace(plain, dequantised=True), short) == denoise_bytes(ModelSize(), short) + matrices


def test_a_strength_that_changes_keeps_both_loras_beside_the_weights() -> None:
    varying, fixed = (model_size(resolve(f"t2v_{name}").engine, 2) for name in ("three_phase", "distill_lora"))
    assert (fixed.loras, fixed.loras_beside) == (0, False)
    assert varying.loras_beside and 0.5 * GIB < varying.loras < 3 * GIB


def test_attention_that_makes_8_bit_copies_counts_them() -> None:
    """An H200 took 1.45 GB more with sol_attn at 720p: 35.33 GB instead of 33.88."""
    need = Workload.of((16, 21, 90, 160), guided=False)
    sizes = {name: model_size(EngineConfig(self_attn_1_type=name), 2) for name in ("auto", "sol_attn")}
    more = denoise_bytes(sizes["sol_attn"], need) - denoise_bytes(sizes["auto"], need)
    assert 1.45e9 <= more < 1.1 * 1.45e9
    assert replace(sizes["sol_attn"], attention=0) == sizes["auto"]


def test_loras_wait_where_the_weights_do() -> None:
    model = ModelSize(weight=0.65, dequantised=True, loras=1000)
    assert (lora_bytes(model, RESIDENT), lora_bytes(model, SWAP)) == (1000, 0)
    assert host_bytes(SWAP, model) - host_bytes(SWAP, replace(model, loras=0)) == 1000
    assert lora_bytes(replace(model, loras_beside=True), SWAP) == 1000


@pytest.mark.parametrize("task", ["t2v", "i2v"])
def test_a_card_of_8_gb_holds_the_smallest_preset(task: str) -> None:
    resolved = resolve(f"{task}_distill_gguf_q4")
    image = {} if task == "t2v" else {"image_path": "x.png"}
    found = forecast_for_gpu(resolved.engine, Request(prompt="x", **resolved.request | image), 8)
    assert found.fits and found.plan.mode == "stream"
    assert found.host < 26 * GIB
