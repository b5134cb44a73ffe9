"""8-bit weights: exact to read, close to the original, found in every dialect, refused without a good scale."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import TinyModels
from safetensors.torch import save_file

from lightx2v.config.lora_spec import LoraSpec
from lightx2v.config.presets import resolve
from lightx2v.config.request import Request
from lightx2v.errors import CheckpointError
from lightx2v.models.quant_linear import Kernel, QuantLinear, dequantised, int_mm, kernel_for, scaled_mm, why_not
from lightx2v.models.umt5 import TextEncoder
from lightx2v.pipeline import LightX2VPipeline
from lightx2v.weights.checkpoint import open_checkpoint
from lightx2v.weights.model_weights import ModelWeights
from lightx2v.weights.quantization import FORMATS, dequantise, quantise, widen

SMALL = {"height": 32, "width": 48, "frames": 5, "steps": 2, "text_len": 512}
FP8, INT8 = torch.float8_e4m3fn, torch.int8
Tensors = dict[str, torch.Tensor]


def weights_of(path: Path, **more: torch.dtype) -> ModelWeights:
    checkpoint = open_checkpoint(path)
    return ModelWeights.of_expert(checkpoint, **more)


def cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    return F.cosine_similarity(a.double().flatten(), b.double().flatten(), dim=0).item()


# ---- the format -----------------------------------------------------------------------------------------------------


def test_every_code_is_widened_exactly() -> None:
    codes = torch.tensor([code for code in range(256) if code & 0x7F != 0x7F], dtype=torch.uint8)
    assert torch.equal(widen(codes.view(FP8)), codes.view(FP8).float())
    every = torch.arange(-128, 128).to(INT8)
    assert torch.equal(widen(every), every.float())


@pytest.mark.parametrize("name", FORMATS)
def test_quantising_is_the_written_formula(name: str) -> None:
    weight = torch.randn(70, 48, generator=torch.Generator().manual_seed(0)) * torch.logspace(-4, 2, 70)[:, None]
    weight[5] = 0
    q, scale = quantise(weight.bfloat16(), FORMATS[name])
    largest = {"fp8": 448.0, "int8": 127.0}[name]
    values = weight.bfloat16().float()
    want_scale = values.abs().amax(1, keepdim=True).clamp(min=1e-5) / largest
    want = (values / want_scale).clamp(-largest, largest)
    assert torch.equal(scale, want_scale) and scale.dtype == torch.float32
    assert torch.equal(q.float(), (want.round() if name == "int8" else want).to(FORMATS[name]).float())
    back = dequantise(q, scale)
    assert (back[5] == 0).all() and cosine(back, values) > 0.999


def test_weights_that_are_not_finite_are_refused() -> None:
    for bad in (float("nan"), float("inf")):
        weight = torch.ones(3, 4)
        weight[1, 2] = bad
        with pytest.raises(ValueError, match="NaN or infinity"):
            quantise(weight, FP8)


def test_only_the_matrices_of_blocks_are_quantised(tiny: TinyModels) -> None:
    weights = weights_of(tiny.t2v / "high_noise_model", quantise=FP8)
    made = dict(weights.tensors())
    assert {n: tuple(t.shape) for n, t in made.items()} == weights.shapes
    assert {n: t.dtype for n, t in made.items()} == weights.dtypes
    eight_bit = {name for name, tensor in made.items() if tensor.dtype == FP8}
    assert len(eight_bit) == 2 * 10 and eight_bit == {n for n in made if f"{n}_scale" in made}
    assert all(n.startswith("blocks.") and n.split(".")[2] in ("self_attn", "cross_attn", "ffn") for n in eight_bit)


# ---- the layer ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [FP8, INT8])
def test_the_layer_is_the_product_with_its_dequantised_weights(dtype: torch.dtype) -> None:
    layer = QuantLinear(16, 24, dtype, bias=True, fast=True)
    q, scale = quantise(torch.randn(24, 16), dtype)
    with torch.no_grad():
        layer.weight.copy_(q)
        layer.weight_scale.copy_(scale)
        assert layer.bias is not None
        layer.bias.normal_()
    x = torch.randn(2, 5, 16)
    assert torch.equal(layer(x), F.linear(x, dequantise(q, scale), layer.bias))
    assert kernel_for(dtype, torch.device("cpu"), torch.float32) is dequantised


@pytest.mark.parametrize(("kernel", "dtype"), [(scaled_mm, FP8), (int_mm, INT8)])
@pytest.mark.parametrize("rows", [1, 17, 48])
def test_kernels_multiply_quantised_tokens_exactly(kernel: Kernel, dtype: torch.dtype, rows: int) -> None:
    """torch has both on the CPU too; there they are slower than widening the weights, so they are not chosen."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(rows, 64, generator=g).bfloat16() * torch.logspace(-2, 2, rows)[:, None].bfloat16()
    q, scale = quantise(torch.randn(32, 64, generator=g) * torch.logspace(-3, 1, 32)[:, None], dtype)
    got, exact = kernel(x, q, scale, None), dequantised(dequantise(*quantise(x, dtype)), q, scale, None)
    assert got.dtype == torch.bfloat16
    sizes = dequantise(q, scale).norm(dim=1) * x.float().norm(dim=1, keepdim=True)
    assert ((got.float() - exact).abs() <= 2**-8 * exact.abs() + 1e-4 * sizes).all()


def broken(x_MI: torch.Tensor, q_OI: torch.Tensor, scale_O1: torch.Tensor, bias_O: torch.Tensor | None) -> torch.Tensor:
    return dequantised(x_MI, q_OI, scale_O1.mean().expand_as(scale_O1), bias_O)  # one scale for all rows


def missing(
    x_MI: torch.Tensor, q_OI: torch.Tensor, scale_O1: torch.Tensor, bias_O: torch.Tensor | None
) -> torch.Tensor:
    raise RuntimeError("CUBLAS_STATUS_NOT_SUPPORTED\nmore")


@pytest.mark.parametrize(
    ("kernel", "says"), [(dequantised, ""), (scaled_mm, ""), (broken, "sizes off"), (missing, "CUBLAS")]
)
def test_a_kernel_that_computes_something_else_is_not_used(kernel: Kernel, says: str) -> None:
    why = why_not(kernel, FP8, torch.device("cpu"), torch.bfloat16)
    assert says in why and bool(says) == bool(why)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [FP8, INT8])
def test_the_kernel_of_this_device_passes_its_gate_at_full_width(dtype: torch.dtype) -> None:
    kernel = kernel_for(dtype, torch.device("cuda"), torch.bfloat16)
    x, w = torch.randn(4096, 5120, device="cuda").bfloat16(), torch.randn(13824, 5120, device="cuda")
    q, scale = quantise(w, dtype)
    assert cosine(kernel(x, q, scale, None), dequantised(x.float(), q, scale, None)) > 0.999


# ---- files ----------------------------------------------------------------------------------------------------------


def scaled(tiny: TinyModels, dtype: torch.dtype = FP8) -> Tensors:
    return dict(weights_of(tiny.t2v / "high_noise_model", quantise=dtype).tensors())


OUTSIDE = ("text_embedding.0.weight", "patch_embedding.weight")


def comfy(tensors: Tensors) -> Tensors:
    """One scale per tensor under ComfyUI's names; some layers outside of the blocks in fp8 too, as in some files."""
    result: Tensors = {"model.diffusion_model.scaled_fp8": torch.empty(2).to(FP8)}
    for name, tensor in tensors.items():
        prefixed = f"model.diffusion_model.{name}"
        if name.endswith(".weight_scale"):
            continue
        if tensor.dtype == FP8 or name in OUTSIDE:
            values = dequantise(tensor, tensors[f"{name}_scale"]) if tensor.dtype == FP8 else tensor
            scale = values.abs().max() / 448
            result[prefixed] = (values / scale).to(FP8)
            result[prefixed.removesuffix(".weight") + ".scale_weight"] = scale
        else:
            result[prefixed] = tensor
    return result


def test_comfyui_files_become_rows_of_scales(tiny: TinyModels, tmp_path: Path) -> None:
    original = scaled(tiny)
    save_file(comfy(original), tmp_path / "comfy.safetensors")
    weights = weights_of(tmp_path / "comfy.safetensors")
    made = dict(weights.tensors())
    assert made.keys() == original.keys()
    for name, tensor in original.items():
        assert made[name].shape == tensor.shape and made[name].dtype == tensor.dtype, name
        if tensor.dtype == FP8:
            got = dequantise(made[name], made[f"{name}_scale"])
            assert cosine(got, dequantise(tensor, original[f"{name}_scale"])) > 0.998
    assert all(cosine(made[name], original[name]) > 0.998 for name in OUTSIDE)


def without(tensors: Tensors, name: str) -> Tensors:
    return {key: tensor for key, tensor in tensors.items() if key != name}


SCALE = "blocks.1.ffn.0.weight_scale"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda t: without(t, SCALE), r"blocks\.1\.ffn\.0\.weight is stored in float8_e4m3fn without a scale"),
        (lambda t: t | {SCALE: torch.ones(7, 1)}, r"weight_scale has shape \[7, 1\], expected \[48, 1\]"),
        (lambda t: t | {SCALE: torch.full((48, 1), float("nan"))}, "weight_scale holds nan"),
        (lambda t: t | {SCALE: torch.zeros(48, 1)}, r"weight_scale holds 0\.0"),
        (lambda t: t | {SCALE: torch.full((48, 1), float("inf"))}, "weight_scale holds inf"),
        (lambda t: t | {SCALE: -torch.ones(48, 1)}, "weight_scale holds -1"),
        (lambda t: t | {"head.head.weight_scale": torch.ones(64, 1)}, "head.head.weight_scale has no quantised weight"),
    ],
)
def test_a_bad_scale_is_an_error_that_names_the_layer(
    tiny: TinyModels, tmp_path: Path, change: Callable[[Tensors], Tensors], says: str
) -> None:
    save_file(change(scaled(tiny)), tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match=says):
        list(weights_of(tmp_path / "x.safetensors").tensors())


def without_scales(tensors: Tensors) -> Tensors:
    return {
        name: tensor for name, tensor in tensors.items() if not name.endswith(("scale", "scale_weight", "scaled_fp8"))
    }


@pytest.mark.parametrize("dialect", [dict, comfy])
@pytest.mark.parametrize("dtype", [FP8, torch.float8_e5m2])
def test_a_scaled_file_that_lost_all_scales_is_no_plain_cast(
    tiny: TinyModels, tmp_path: Path, dialect: Callable[[Tensors], Tensors], dtype: torch.dtype
) -> None:
    stripped = without_scales(dialect(scaled(tiny)))
    scaled_up = 1.0 if dtype == FP8 else 57344 / 448
    save_file(
        {n: (t.float() * scaled_up).to(dtype) if t.dtype == FP8 else t for n, t in stripped.items()},
        tmp_path / "x.safetensors",
    )
    with pytest.raises(CheckpointError, match=r"x\.safetensors: its float8 weights .* The scales were lost"):
        weights_of(tmp_path / "x.safetensors")


@pytest.mark.parametrize("dtype", [FP8, torch.float8_e5m2])
@pytest.mark.parametrize("size", [0.02, 0.3, 1.0])
def test_a_plain_cast_of_weights_of_any_usual_size_loads(
    tiny: TinyModels, tmp_path: Path, dtype: torch.dtype, size: float
) -> None:
    generator = torch.Generator().manual_seed(0)
    original = dict(weights_of(tiny.t2v / "high_noise_model").tensors())
    drawn = {n: torch.randn(t.shape, generator=generator) * size if t.dim() == 2 else t for n, t in original.items()}
    save_file({n: t.to(dtype) for n, t in drawn.items()}, tmp_path / "x.safetensors")
    made = dict(weights_of(tmp_path / "x.safetensors").tensors())
    assert torch.equal(made["blocks.0.ffn.0.weight"].float(), drawn["blocks.0.ffn.0.weight"].to(dtype).float())


# ---- the whole engine -----------------------------------------------------------------------------------------------


def make(folder: Path, **settings: object) -> tuple[torch.Tensor, dict[str, object]]:
    """Latents and report of one request."""
    resolved = resolve({"model_path": str(folder), "device": "cpu"}, SMALL | settings)
    request = Request(prompt="a red ball", **(dict(resolved.request) | {"seed": 3}))
    with LightX2VPipeline.from_config(resolved.engine) as pipe:
        result = pipe.run(request, return_latents=True)
    assert result.latents is not None
    return result.latents, result.report()


@pytest.fixture(scope="module")
def plain(tiny: TinyModels) -> torch.Tensor:
    return make(tiny.t2v)[0]


BUILD = {"build": "fp8", "dit_quantized": True, "dit_quant_scheme": "fp8-sgl"}
QUANTISED_T5 = {"t5_quantized": True, "t5_quant_scheme": "fp8-sgl"}


@pytest.mark.slow
def test_a_built_model_equals_the_file_of_that_build(tiny: TinyModels, tmp_path: Path, plain: torch.Tensor) -> None:
    built = make(tiny.t2v, **BUILD)[0]
    files = {}
    for which in ("high", "low"):
        path = tmp_path / f"{which}.safetensors"
        save_file(dict(weights_of(tiny.t2v / f"{which}_noise_model", quantise=FP8).tensors()), path)
        files[f"{which}_noise_quantized_ckpt"] = str(path)
    read = make(tiny.t2v, dit_quantized=True, dit_quant_scheme="fp8-triton", **files)[0]
    assert torch.equal(built, read)
    assert not torch.equal(built, plain) and cosine(built, plain) > 0.99


def test_the_text_encoder_is_built_and_read_in_8_bits(tiny: TinyModels, tmp_path: Path) -> None:
    source = tiny.t2v / "models_t5_umt5-xxl-enc-bf16.pth"
    tokenizer = tiny.t2v / "google" / "umt5-xxl"
    checkpoint = open_checkpoint(source)
    load = lambda path, **more: TextEncoder.load(path, tokenizer, dtype=torch.float32, **more)  # noqa: E731
    states = lambda encoder: encoder.encode("a red ball moves left").states_LD  # noqa: E731
    original = states(load(source))
    for dtype in (FP8, INT8):
        made = dict(ModelWeights.of_text_encoder(checkpoint, quantise=dtype).tensors())
        torch.save(made, tmp_path / "t5.pth")
        built = load(source, quantise=dtype)
        assert torch.equal(states(built), states(load(tmp_path / "t5.pth")))
        assert cosine(states(built), original) > 0.995
        kinds = [module.weight.dtype for module in built.modules() if isinstance(module, QuantLinear)]
        assert kinds == [dtype] * 14


@pytest.mark.slow
def test_a_preset_that_builds_merges_then_quantises(tiny: TinyModels, tmp_path: Path, plain: torch.Tensor) -> None:
    g = torch.Generator().manual_seed(1)
    save_file(
        {
            "diffusion_model.blocks.0.ffn.0.lora_up.weight": torch.randn(48, 2, generator=g),
            "diffusion_model.blocks.0.ffn.0.lora_down.weight": torch.randn(2, 24, generator=g),
        },
        tmp_path / "lora.safetensors",
    )
    loras = [LoraSpec(expert=which, path=str(tmp_path / "lora.safetensors")) for which in ("high", "low")]
    merged, report = make(tiny.t2v, build="merged", lora_configs=loras)
    quantised, _ = make(tiny.t2v, lora_configs=loras, **BUILD, **QUANTISED_T5)
    assert [entry["applied"] for entry in report["loras"]] == [1, 1]  # type: ignore[attr-defined]
    assert cosine(quantised, merged) > 0.99 and not torch.equal(merged, plain)


@pytest.mark.slow
def test_a_lora_beside_8_bit_weights_is_the_merged_one(tiny: TinyModels, tmp_path: Path) -> None:
    g = torch.Generator().manual_seed(1)
    pair = {"up": torch.randn(48, 2, generator=g), "down": torch.randn(2, 24, generator=g)}
    save_file({f"blocks.0.ffn.0.lora_{k}.weight": v for k, v in pair.items()}, tmp_path / "lora.safetensors")
    files = {}
    for which in ("high", "low"):
        tensors = scaled(tiny)
        if which == "low":  # two equal experts are refused
            tensors |= {name: tensors[name] * 1.01 for name in tensors if tensors[name].dtype == torch.float32}
        save_file(tensors, tmp_path / f"{which}.safetensors")
        files[f"{which}_noise_quantized_ckpt"] = str(tmp_path / f"{which}.safetensors")
    quantised = {"dit_quantized": True, "dit_quant_scheme": "fp8-sgl", **files}
    loras = (LoraSpec(expert="high", path=str(tmp_path / "lora.safetensors")),)
    resolved = resolve({"model_path": str(tiny.t2v), "device": "cpu"}, SMALL | quantised)
    request = Request(prompt="a red ball", **(dict(resolved.request) | {"seed": 3}))
    with LightX2VPipeline.from_config(resolved.engine) as pipe:
        run = lambda request: pipe.run(request, return_latents=True).latents  # noqa: E731
        before, changed, after = run(request), run(replace(request, loras=loras)), run(request)
    assert torch.equal(before, after) and not torch.equal(before, changed)
    tensors = scaled(tiny)
    weight = dequantise(tensors["blocks.0.ffn.0.weight"], tensors[SCALE.replace("1", "0", 1)])
    bf16 = {n: t for n, t in tensors.items() if not n.endswith("_scale")}
    for name, tensor in bf16.items():
        if tensor.dtype == FP8:
            bf16[name] = dequantise(tensor, tensors[f"{name}_scale"])
    bf16["blocks.0.ffn.0.weight"] = weight + pair["up"] @ pair["down"]
    save_file(bf16, tmp_path / "high.safetensors")
    merged = make(
        tiny.t2v,
        **quantised
        | {"dit_quantized": False, "dit_quant_scheme": None}
        | {
            "high_noise_quantized_ckpt": None,
            "low_noise_quantized_ckpt": None,
            "high_noise_original_ckpt": files["high_noise_quantized_ckpt"],
            "low_noise_original_ckpt": files["low_noise_quantized_ckpt"],
        },
    )[0]
    assert torch.allclose(changed, merged, rtol=1e-4, atol=1e-4)


def test_unquantised_files_are_not_taken_for_quantised_ones(tiny: TinyModels) -> None:
    with pytest.raises(CheckpointError, match="holds no quantised weights"):
        make(tiny.t2v, dit_quantized=True, dit_quant_scheme="fp8-sgl")
