"""GGUF experts and text encoders through the whole engine: the same latents as a float model with their weights."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import TinyModels
from dit_reference import relative
from gguf_files import (
    EXPERTS,
    T5_FILE,
    Tensors,
    build_wide,
    expert,
    in_blocks,
    make,
    q4_k_m,
    quantised,
    reference,
    stored,
    write_gguf,
)
from lora_files import random_pairs, spec, write
from safetensors.torch import save_file
from tiny_runs import latents

from lightx2v.attention import resolve_attention
from lightx2v.config.lora_spec import LoraSpec
from lightx2v.config.presets import resolve
from lightx2v.config.request import Request
from lightx2v.errors import BadRequest, CheckpointError, LoraError
from lightx2v.loading.conversion import Conversion, convert
from lightx2v.loading.expert_loras import ExpertLoras, match_loras
from lightx2v.loading.model_files import locate
from lightx2v.loading.networks import Precision, expert_weights, load_expert
from lightx2v.models import gguf_linear
from lightx2v.models.gguf_linear import GGUFLinear, dequantise_once, same_weights
from lightx2v.models.umt5 import TextEncoder
from lightx2v.pipeline import LightX2VPipeline
from lightx2v.weights.checkpoint import open_checkpoint
from lightx2v.weights.gguf_blocks import FORMATS, BlockFormat, dequantise
from lightx2v.weights.lora_match import match_lora
from lightx2v.weights.model_weights import ModelWeights

SMALL = {"height": 32, "width": 48, "frames": 5, "steps": 2, "text_len": 512, "dtype": "fp32", "seed": 3}


Named = tuple[dict[str, object], dict[str, object]]
"""Settings that name GGUF files, and settings that name float files of the same weights."""


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_wide(tmp_path_factory.mktemp("wide"))


def run(folder: Path, **settings: object) -> torch.Tensor:
    resolved = resolve({"model_path": str(folder), "device": "cpu"}, SMALL | settings)
    with LightX2VPipeline.from_config(resolved.engine) as pipe:
        return latents(pipe, Request(prompt="a red ball", **resolved.request))


@pytest.fixture(scope="module")
def mixed(wide: Path, tmp_path_factory: pytest.TempPathFactory) -> Named:
    return make(tmp_path_factory.mktemp("mixed"), wide, q4_k_m)


@pytest.fixture(scope="module")
def expected(wide: Path, mixed: Named) -> torch.Tensor:
    return run(wide, **mixed[1])


@pytest.mark.slow
def test_a_mix_makes_the_latents_of_its_float_weights(wide: Path, mixed: Named, expected: torch.Tensor) -> None:
    assert torch.equal(run(wide, **mixed[0]), expected)


@pytest.mark.slow
@pytest.mark.parametrize("name", [*FORMATS, "F16", "BF16", "F32"])
def test_every_format_makes_the_latents_of_its_float_weights(wide: Path, tmp_path: Path, name: str) -> None:
    ours, theirs = make(tmp_path, wide, name)
    assert torch.equal(run(wide, **ours), run(wide, **theirs))


@pytest.mark.slow
def test_products_in_16_bits_round_the_weights_once(wide: Path, mixed: Named) -> None:
    ours, theirs = mixed
    assert torch.equal(run(wide, **ours, dtype="bf16"), run(wide, **theirs, dtype="bf16"))


@pytest.mark.slow
def test_the_file_decides_and_lightx2vs_schemes_are_accepted(wide: Path, mixed: Named, expected: torch.Tensor) -> None:
    named = {key.replace("original", "quantized"): value for key, value in mixed[0].items()}
    schemes = {"dit_quantized": True, "dit_quant_scheme": "gguf-Q4_K_M"}
    schemes |= {"t5_quantized": True, "t5_quant_scheme": "gguf-Q8_0"}
    assert torch.equal(run(wide, **named, **schemes), expected)


@pytest.mark.slow
def test_the_architecture_comes_from_the_shapes(wide: Path, mixed: Named, tmp_path: Path) -> None:
    """Without a config.json a head has 128 channels, as in every released model: here two, as the model has."""
    parts = tmp_path / "parts"
    parts.mkdir()
    for item in ("Wan2.1_VAE.pth", "google"):
        (parts / item).symlink_to(wide / item)
    assert torch.equal(run(parts, **mixed[0]), run(wide, **mixed[0]))


@pytest.mark.slow
def test_prefixes_and_flattened_tensors_are_understood(wide: Path, mixed: Named, tmp_path: Path) -> None:
    """`model.diffusion_model.` in front, and a patch embedding in blocks with the shape that it had."""
    ours, theirs = {}, {}
    for which in EXPERTS:
        written, floats = stored(expert(wide, which), "Q8_0")
        patch = "patch_embedding.weight"
        flat = in_blocks(floats[patch].flatten(1), "Q8_0")
        floats[patch] = torch.from_numpy(reference(*flat)).view(floats[patch].shape)
        prefixed = {f"model.diffusion_model.{name}": flat if name == patch else t for name, t in written.items()}
        shape = {f"comfy.gguf.orig_shape.model.diffusion_model.{patch}": list(floats[patch].shape)}
        path = write_gguf(tmp_path / f"{which}.gguf", prefixed, architecture=None, **shape)
        save_file(floats, tmp_path / f"{which}.safetensors")
        ours[f"{which}_noise_original_ckpt"] = str(path)
        theirs[f"{which}_noise_original_ckpt"] = str(tmp_path / f"{which}.safetensors")
    assert torch.equal(run(wide, **ours), run(wide, **theirs))


@pytest.mark.slow
def test_a_folder_of_one_gguf_file_stands_for_an_expert(
    wide: Path, mixed: Named, tmp_path: Path, expected: torch.Tensor
) -> None:
    for which, folder in zip(EXPERTS, ("HighNoise", "LowNoise"), strict=True):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "wan.gguf").symlink_to(str(mixed[0][f"{which}_noise_original_ckpt"]))
    named = {f"{w}_noise_original_ckpt": str(tmp_path / f"{w.title()}Noise") for w in EXPERTS}
    assert torch.equal(run(wide, **mixed[0] | named), expected)


# ---- LoRAs ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def lora_files(wide: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two LoRAs over every matrix, of which the second also changes a bias and has 16-bit values."""
    folder = tmp_path_factory.mktemp("loras")
    shapes = {name: tuple(tensor.shape) for name, tensor in expert(wide, "high").items()}
    one = write(folder / "one.safetensors", random_pairs(shapes, 1), alpha=2.0)
    pairs = random_pairs(shapes, 2)
    tensors = {f"{stem}.lora_{kind}.weight": t.bfloat16() for stem, pair in pairs.items() for kind, t in pair.items()}
    tensors["blocks.1.ffn.0.diff_b"] = torch.full(shapes["blocks.1.ffn.0.bias"], 0.3)
    tensors["blocks.1.ffn.2.diff"] = torch.full(shapes["blocks.1.ffn.2.weight"], 0.02)
    del tensors["blocks.1.ffn.2.lora_up.weight"], tensors["blocks.1.ffn.2.lora_down.weight"]
    save_file(tensors, folder / "two.safetensors")
    return [one, folder / "two.safetensors"]


@pytest.mark.slow
def test_loras_are_added_to_the_dequantised_weights_as_exactly_as_merged_ones(
    wide: Path, mixed: Named, lora_files: list[Path]
) -> None:
    ours, theirs = mixed
    inside = [replace(spec(path, expert), strength=0.7) for path in lora_files for expert in EXPERTS]
    blocks_only = {"lora_configs": inside}
    for dtype in ("fp32", "bf16"):
        merged = run(wide, **theirs, **blocks_only, dtype=dtype)
        got = run(wide, **ours, **blocks_only, dtype=dtype)
        beside = run(wide, **ours, **blocks_only, dtype=dtype, lora_dynamic_apply=True)
        # The layers outside of the blocks have LoRAs beside them, so the sums differ by their rounding.
        assert relative(got, merged) < (1e-5 if dtype == "fp32" else 2e-2)
        assert relative(beside, merged) < (1e-4 if dtype == "fp32" else 5e-2)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_layer_with_loras_has_the_weights_of_a_merged_model(
    wide: Path, lora_files: list[Path], dtype: torch.dtype, tmp_path: Path
) -> None:
    _, floats = stored(expert(wide, "high"), "Q4_K")
    save_file(floats, tmp_path / "high.safetensors")
    weights = ModelWeights.of_expert(open_checkpoint(tmp_path / "high.safetensors"))
    loras = [match_lora(path, weights.plain_shapes, strength=0.7) for path in lora_files]
    merged = dict(weights.with_loras(loras).tensors(dtype_of=lambda _: dtype))
    for name in ("blocks.0.self_attn.v.weight", "blocks.1.ffn.2.weight"):
        blocks = stored(expert(wide, "high"), "Q4_K")[0][name]
        rows, columns = floats[name].shape
        layer = GGUFLinear(columns, rows, FORMATS["Q4_K"], bias=False)
        with torch.no_grad():
            layer.weight.copy_(torch.from_numpy(blocks[0]))  # type: ignore[index]
        layer.merged = [lora.delta(name, "cpu", torch.float32) for lora in loras]
        assert torch.equal(layer.values(dtype), merged[name])


def layer_with_loras(wide: Path, tensors: Tensors, folder: Path, loras: list[LoraSpec], dynamic: bool) -> GGUFLinear:
    """`blocks.1.ffn.0` of the high-noise expert, stored as these tensors, with LoRAs on it."""
    path = write_gguf(folder / "high.gguf", tensors)
    settings = {"high_noise_original_ckpt": str(path), "lora_configs": loras, "lora_dynamic_apply": dynamic}
    config = resolve({"model_path": str(wide), "device": "cpu"}, SMALL | settings).engine
    files, precision = locate(config), Precision.of(config)
    weights = expert_weights(files, "high", config)
    choice = resolve_attention("torch_sdpa", precision.device, precision.compute)
    dit = load_expert(files, weights, precision, choice, choice)
    matched = match_loras(config.lora_configs, "high", weights, config)
    ExpertLoras(dit, "high", weights, matched, config, precision.device)
    layer = dit.get_submodule("blocks.1.ffn.0")
    assert isinstance(layer, GGUFLinear)
    return layer


def other_forms(form: str, rows: int, columns: int) -> dict[str, torch.Tensor]:
    """The tensors of a change that is no plain pair, by their kinds."""
    generator = torch.Generator().manual_seed(7)

    def random(*shape: int) -> torch.Tensor:
        return 0.3 * torch.randn(*shape, generator=generator)

    if form == "lokr":
        return {"lokr_w1": random(4, 8), "lokr_w2": random(rows // 4, columns // 8)}
    if form == "loha":
        return {f"hada_w{i}_{side}": random(*shape) for i in (1, 2) for side, shape in
                (("a", (rows, 3)), ("b", (3, columns)))}  # fmt: skip
    pair = {"lora_up.weight": random(rows, 4), "lora_down.weight": random(4, columns)}
    shape = (rows, 1) if form == "dora by outputs" else (1, columns)
    return pair | {"dora_scale": random(*shape).abs() + 1}


def change(form: str, parts: dict[str, torch.Tensor], base: torch.Tensor) -> torch.Tensor:
    """What it adds at strength 1 to `base`, in float64, by the formulas of LyCORIS and DoRA."""
    if form == "lokr":
        return torch.kron(parts["lokr_w1"], parts["lokr_w2"])
    if form == "loha":
        return (parts["hada_w1_a"] @ parts["hada_w1_b"]) * (parts["hada_w2_a"] @ parts["hada_w2_b"])
    total = base + parts["lora_up.weight"] @ parts["lora_down.weight"]
    lengths = total.norm(dim=1, keepdim=True) if form == "dora by outputs" else total.norm(dim=0, keepdim=True)
    return parts["dora_scale"] * total / lengths - base


@pytest.mark.slow
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("form", ["lokr", "loha", "dora by outputs", "dora by inputs"])
def test_every_form_of_lora_goes_on_a_layer_in_blocks(wide: Path, tmp_path: Path, form: str, dynamic: bool) -> None:
    name = "blocks.1.ffn.0.weight"
    file, floats = stored(expert(wide, "high"), "Q4_K")
    rows, columns = floats[name].shape
    parts = other_forms(form, rows, columns)
    save_file({f"blocks.1.ffn.0.{kind}": part for kind, part in parts.items()}, tmp_path / "lora.safetensors")
    layer = layer_with_loras(wide, file, tmp_path, [spec(tmp_path / "lora.safetensors", strength=0.7)], dynamic)
    base = floats[name].double()
    exact = base + 0.7 * change(form, {kind: part.double() for kind, part in parts.items()}, base)
    x = torch.randn(5, columns, generator=torch.Generator().manual_seed(1))
    assert layer.bias is not None
    with torch.inference_mode():
        got = layer(x) - layer.bias
    assert (
        relative(got.double(), x.double() @ exact.T) < 1e-5 < 0.05 < relative(x.double() @ base.T, x.double() @ exact.T)
    )


def test_a_sum_inside_blocks_that_is_not_finite_is_an_error_at_its_first_use(wide: Path, tmp_path: Path) -> None:
    file, floats = stored(expert(wide, "high"), "Q4_K")
    rows, columns = floats["blocks.1.ffn.0.weight"].shape
    pair = {"up": torch.full((rows, 4), 1e38), "down": torch.ones(4, columns)}
    path = write(tmp_path / "lora.safetensors", {"blocks.1.ffn.0": pair})
    layer = layer_with_loras(wide, file, tmp_path, [spec(path, strength=90.0)], dynamic=False)
    for _ in range(2):
        with pytest.raises(LoraError, match=r"blocks\.1\.ffn\.0\.weight becomes NaN or infinite with .*lora"):
            layer(torch.ones(1, columns))


@pytest.mark.slow
def test_loras_are_exchanged_between_videos(wide: Path, mixed: Named, lora_files: list[Path]) -> None:
    resolved = resolve({"model_path": str(wide), "device": "cpu"}, SMALL | mixed[0])
    request = Request(prompt="a red ball", **resolved.request)
    loras = tuple(spec(lora_files[0], expert) for expert in EXPERTS)
    with LightX2VPipeline.from_config(resolved.engine) as pipe:
        before, changed = latents(pipe, request), latents(pipe, replace(request, loras=loras))
        after = latents(pipe, request)
    assert torch.equal(before, after)
    assert torch.equal(changed, run(wide, **mixed[0], lora_configs=list(loras)))
    assert relative(changed, before) > 0.01


# ---- what is kept, and when -----------------------------------------------------------------------------------------


def test_a_block_dequantises_each_matrix_once_and_keeps_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    counted: list[str] = []

    def count(blocks: torch.Tensor, form: BlockFormat, dtype: torch.dtype) -> torch.Tensor:
        counted.append(form.name)
        return dequantise(blocks, form, dtype)

    monkeypatch.setattr(gguf_linear, "dequantise_on", lambda device, form: count)

    class Unit(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = GGUFLinear(256, 8, FORMATS["Q4_K"], bias=True)

        def forward(self, x: torch.Tensor, *, fails: bool = False) -> torch.Tensor:
            chunks = torch.cat([self.layer(part) for part in x.split(2)])
            if fails:
                raise MemoryError
            return chunks

    unit = Unit()
    dequantise_once(unit)
    unit(torch.randn(6, 256))
    assert len(counted) == 1 and unit.layer._values is None
    with pytest.raises(MemoryError):
        unit(torch.randn(6, 256), fails=True)
    assert len(counted) == 2 and unit.layer._values is None, "memory comes back after an error, too"


def test_a_kernel_with_other_weights_is_not_used() -> None:
    for form in FORMATS.values():
        assert same_weights(dequantise, form, torch.device("cpu"))
        wrong = lambda blocks, form, dtype: dequantise(blocks, form, dtype) * (1 + 2**-8)  # noqa: E731
        assert not same_weights(wrong, form, torch.device("cpu"))


def test_the_token_table_stays_in_the_file(wide: Path, mixed: Named) -> None:
    encoder = TextEncoder.load(str(mixed[0]["t5_original_ckpt"]), wide / "google/umt5-xxl", dtype=torch.float32)
    floats = torch.load(str(mixed[1]["t5_original_ckpt"]), weights_only=True)
    assert encoder.embedding_VD.dtype == torch.uint8
    other = TextEncoder.load(str(mixed[1]["t5_original_ckpt"]), wide / "google/umt5-xxl", dtype=torch.float32)
    prompt = "a red ball moves left"
    assert torch.equal(encoder.encode(prompt).states_LD, other.encode(prompt).states_LD)
    assert floats["token_embedding.weight"].shape[0] == len(encoder.embedding_VD)


# ---- what is refused ------------------------------------------------------------------------------------------------


def test_files_of_other_models_are_refused_by_name(wide: Path, tmp_path: Path) -> None:
    written, _ = stored(expert(wide, "high"), "Q8_0")
    flux = write_gguf(tmp_path / "flux.gguf", written, architecture="flux")
    with pytest.raises(CheckpointError, match="architecture 'flux'; expected wan"):
        run(wide, high_noise_original_ckpt=str(flux))
    wan = write_gguf(tmp_path / "wan.gguf", written)
    with pytest.raises(CheckpointError, match="architecture 'wan'; expected t5encoder or t5"):
        run(wide, t5_original_ckpt=str(wan))


def test_a_lora_in_blocks_and_a_conversion_of_blocks_are_refused(tmp_path: Path, mixed: Named) -> None:
    lora = {"blocks.0.ffn.0.lora_up.weight": quantised(torch.ones(8, 32), "Q8_0")}
    path = write_gguf(tmp_path / "lora.gguf", lora)
    with pytest.raises(LoraError, match="GGUF file with Q8_0 weights"):
        match_lora(path, {"blocks.0.ffn.0.weight": (8, 8)})
    for key in ("high_noise_original_ckpt", "t5_original_ckpt"):
        job = Conversion(source=Path(str(mixed[0][key])), output=tmp_path / "x.safetensors", format="fp8")
        with pytest.raises(BadRequest, match="GGUF file in Q4_K, Q6_K"):
            convert(job)


def test_a_width_that_hides_its_heads_needs_a_config(tiny: TinyModels, tmp_path: Path) -> None:
    named = {}
    for which in EXPERTS:
        path = write_gguf(tmp_path / f"{which}.gguf", stored(expert(tiny.t2v, which), "F16")[0])
        named[f"{which}_noise_original_ckpt"] = str(path)
    parts = tmp_path / "parts"
    parts.mkdir()
    for item in (T5_FILE, "Wan2.1_VAE.pth", "google"):
        (parts / item).symlink_to(tiny.t2v / item)
    with pytest.raises(CheckpointError, match=r"config\.json with num_heads"):
        run(parts, **named)
