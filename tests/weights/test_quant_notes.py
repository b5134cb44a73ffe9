"""What a file says about its quantised weights is obeyed, or refused by its name."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TinyModels
from safetensors.torch import load_file, save_file

from lightx2v.errors import CheckpointError
from lightx2v.models.quant_linear import QuantLinear, swap_linears
from lightx2v.models.umt5 import TextEncoder
from lightx2v.weights.checkpoint import open_checkpoint
from lightx2v.weights.model_weights import ModelWeights
from lightx2v.weights.quant_layout import is_expert_matrix
from lightx2v.weights.umt5_names import hf_name, text_encoder_names

FP8, INT8 = torch.float8_e4m3fn, torch.int8
Tensors = dict[str, torch.Tensor]
PREFIX = "model.diffusion_model."
LAYER = "blocks.0.ffn.0"


def plain(tiny: TinyModels) -> Tensors:
    folder = tiny.t2v / "high_noise_model"
    return {name: t for shard in sorted(folder.glob("*.safetensors")) for name, t in load_file(shard).items()}


def is_matrix(name: str, tensor: torch.Tensor) -> bool:
    return is_expert_matrix(name, tuple(tensor.shape))


def read(path: Path) -> Tensors:
    weights = ModelWeights.of_expert(open_checkpoint(path))
    made = dict(weights.tensors())
    for name in weights.formats:
        made[name] = made[name].float() * made.pop(name.removesuffix(".weight") + ".weight_scale")
    return made


def text(content: object) -> torch.Tensor:
    return torch.tensor(list(json.dumps(content).encode()), dtype=torch.uint8)


def comfy(tensors: Tensors, note: object, dtype: torch.dtype = FP8) -> Tensors:
    """ComfyUI's present layout with this note beside each weight."""
    result: Tensors = {}
    for name, tensor in tensors.items():
        stem = PREFIX + name.removesuffix(".weight")
        result[PREFIX + name] = tensor
        if is_matrix(name, tensor):
            scale = tensor.abs().max() / (448 if dtype is FP8 else 127)
            values = tensor / scale
            result[PREFIX + name] = (values.round() if dtype is INT8 else values).to(dtype)
            result |= {f"{stem}.weight_scale": scale, f"{stem}.comfy_quant": text(note)}
    return result


def hadamard(size: int) -> np.ndarray:
    four = np.array([[1, 1, 1, -1], [1, 1, -1, 1], [1, -1, 1, 1], [-1, 1, 1, 1]]) / 2
    result = np.ones((1, 1))
    while len(result) < size:
        result = np.kron(result, four)
    return result


@pytest.mark.parametrize("group", [4, None])
@pytest.mark.parametrize("in_header", [False, True])
def test_convrot_is_undone_exactly(tiny: TinyModels, tmp_path: Path, group: int | None, in_header: bool) -> None:
    """The tiny model's widths, 24 and 48, divide by 4; a wider matrix has ComfyUI's own size of 256."""
    note = {"format": "int8_tensorwise", "convrot": True} | ({"convrot_groupsize": group} if group else {})
    tensors, layers, wanted = {}, {}, {}
    for name, tensor in plain(tiny).items():
        tensors[name] = tensor
        if group is None and name == f"{LAYER}.weight":
            tensor = torch.randn(48, 512, generator=torch.Generator().manual_seed(1))
        if is_matrix(name, tensor) and (group or name == f"{LAYER}.weight"):
            size = group or 256
            rotated = (tensor.double().numpy().reshape(len(tensor), -1, size) @ hadamard(size).T).reshape(tensor.shape)
            scale = np.abs(rotated).max(1, keepdims=True).astype(np.float32) / 127
            q = np.round(rotated / scale).astype(np.int8)
            stem = name.removesuffix(".weight")
            tensors |= {name: torch.from_numpy(q), f"{stem}.weight_scale": torch.from_numpy(scale)}
            layers[stem] = note
            dequantised = q.astype(np.float64) * scale
            wanted[name] = (dequantised.reshape(len(q), -1, size) @ hadamard(size)).reshape(q.shape)
            if not in_header:
                tensors[f"{stem}.comfy_quant"] = text(note)
    metadata = (
        {"_quantization_metadata": json.dumps({"format_version": "1.0", "layers": layers})} if in_header else None
    )
    save_file(tensors, tmp_path / "x.safetensors", metadata=metadata)
    got = read(tmp_path / "x.safetensors")
    assert got.keys() == plain(tiny).keys() and wanted
    for name, right in wanted.items():
        assert np.abs(got[name].double().numpy() - right).max() < 1e-6 * np.abs(right).max(), name


@pytest.mark.parametrize("hint", ["note", "marker", "none"])
def test_full_precision_is_obeyed(tiny: TinyModels, tmp_path: Path, hint: str) -> None:
    note = {"format": "float8_e4m3fn"} | ({"full_precision_matrix_mult": True} if hint == "note" else {})
    tensors = comfy(plain(tiny), note)
    tensors |= {f"{PREFIX}scaled_fp8": torch.zeros(2).to(FP8)} if hint == "marker" else {}
    save_file(tensors, tmp_path / "x.safetensors")
    weights = ModelWeights.of_expert(open_checkpoint(tmp_path / "x.safetensors"))
    layer = torch.nn.ModuleDict(
        {
            "blocks": torch.nn.ModuleDict(
                {"0": torch.nn.ModuleDict({"ffn": torch.nn.ModuleList([torch.nn.Linear(24, 48)])})}
            )
        }
    )
    swap_linears(layer, {f"{LAYER}.weight": FP8}, exact=weights.layout.full_precision)
    swapped = layer.get_submodule(LAYER)
    assert isinstance(swapped, QuantLinear) and swapped.fast is (hint == "none")


@pytest.mark.parametrize("everything", [False, True])
@pytest.mark.parametrize("dtype", [FP8, torch.float8_e5m2])
def test_fp8_without_any_scale_is_a_plain_cast(
    tiny: TinyModels, tmp_path: Path, dtype: torch.dtype, everything: bool
) -> None:
    original = plain(tiny)
    cast = {name: t.to(dtype) if everything or is_matrix(name, t) else t for name, t in original.items()}
    save_file(cast, tmp_path / "x.safetensors")
    got = read(tmp_path / "x.safetensors")
    assert all(torch.equal(got[name], cast[name].float()) for name in original)


def test_fp8_with_a_scale_for_some_weights_only_stays_an_error(tiny: TinyModels, tmp_path: Path) -> None:
    original = plain(tiny)
    cast = {name: t.to(FP8) if is_matrix(name, t) else t for name, t in original.items()}
    for more in ({f"{LAYER}.weight_scale": torch.ones(())}, {"scaled_fp8": torch.zeros(0).to(FP8)}):
        save_file(cast | more, tmp_path / "x.safetensors")
        with pytest.raises(CheckpointError, match="without a scale"):
            read(tmp_path / "x.safetensors")


def test_int8_without_a_scale_is_never_a_cast(tiny: TinyModels, tmp_path: Path) -> None:
    save_file(plain(tiny) | {f"{LAYER}.weight": torch.ones(48, 24, dtype=INT8)}, tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match="int8 without a scale"):
        read(tmp_path / "x.safetensors")


def test_quanto_of_wan2gp_is_read(tiny: TinyModels, tmp_path: Path) -> None:
    tensors, wanted = {}, {}
    for name, tensor in plain(tiny).items():
        if not is_matrix(name, tensor):
            tensors[name] = wanted[name] = tensor
            continue
        scale = (tensor.abs().amax(1, keepdim=True) / 127).bfloat16()
        q = (tensor / scale.float()).round().clamp(-127, 127).to(INT8)
        stem = name.removesuffix(".weight")
        tensors |= {f"{name}._data": q, f"{name}._scale": scale}
        tensors |= {f"{stem}.{part}_scale": torch.ones(()) for part in ("input", "output")}
        wanted[name] = q.float() * scale.float()
    save_file(tensors, tmp_path / "x.safetensors")
    got = read(tmp_path / "x.safetensors")
    assert got.keys() == wanted.keys() and all(torch.equal(got[name], wanted[name]) for name in wanted)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("note", "says"),
    [
        ({"format": "nvfp4"}, "that is NVFP4, 4-bit weights for Blackwell"),
        ({"format": "mxfp8"}, "that is MXFP8"),
        ({"format": "svdquant_w4a4"}, "that is SVDQuant"),
        ({"format": "awq_w4a16"}, "that is AWQ"),
        ({"format": "convrot_w4a4"}, "4-bit weights and activations"),
        ({"format": "int8_blockwise"}, "a scale for each block"),
        ({"format": "float7"}, "says format 'float7'"),
        ({}, "says format None"),
        ({"format": ["float8_e4m3fn"]}, "says format"),
        ({"format": "float8_e4m3fn", "sparsity": "2:4"}, "says 'sparsity', which is not known"),
        ({"format": "float8_e4m3fn", "full_precision_matrix_mult": "yes"}, "expected true or false"),
        ({"format": "int8_tensorwise"}, "is float8_e4m3fn, its note says int8"),
        ({"format": "float8_e4m3fn", "convrot": True, "convrot_groupsize": 48}, "convrot_groupsize 48"),
        ({"format": "float8_e4m3fn", "convrot": True}, "has 24 inputs, no multiple of 256"),
        ([1], "is no JSON object"),
    ],
)  # fmt: skip
def test_what_is_not_understood_is_refused_by_its_name(
    tiny: TinyModels, tmp_path: Path, note: object, says: str
) -> None:
    save_file(comfy(plain(tiny), note), tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError) as refused:
        read(tmp_path / "x.safetensors")
    assert says in str(refused.value) and len(str(refused.value)) < 500


@pytest.mark.parametrize(
    "note", [torch.zeros(2, 3, dtype=torch.uint8), torch.tensor(1, dtype=torch.uint8), torch.zeros(5)]
)
def test_a_note_that_is_no_text_is_refused(tiny: TinyModels, tmp_path: Path, note: torch.Tensor) -> None:
    tensors = comfy(plain(tiny), {"format": "float8_e4m3fn"})
    save_file(tensors | {f"{PREFIX}{LAYER}.comfy_quant": note}, tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match="must be a text in bytes"):
        read(tmp_path / "x.safetensors")


@pytest.mark.parametrize(
    ("header", "says"),
    [
        ("{", "is no JSON object"),
        ({"format_version": "2.0", "layers": {}}, "has the version '2.0'"),
        ({"layers": {}, "calibration": 1}, "has 'calibration', which is not known"),
        ({"layers": {"blocks.9.ffn.0": {"format": "float8_e4m3fn"}}}, "blocks.9.ffn.0, which is not in the file"),
        ({"layers": {LAYER: {"format": "nvfp4"}}}, "NVFP4"),
        ({"layers": {LAYER: {"format": "float8_e4m3fn", "full_precision_matrix_mult": True}}}, "contradict"),
    ],
)
def test_a_header_that_is_not_understood_is_refused(
    tiny: TinyModels, tmp_path: Path, header: object, says: str
) -> None:
    entry = header if isinstance(header, str) else json.dumps(header)
    tensors = comfy(plain(tiny), {"format": "float8_e4m3fn"})
    save_file(tensors, tmp_path / "x.safetensors", metadata={"_quantization_metadata": entry})
    with pytest.raises(CheckpointError) as refused:
        read(tmp_path / "x.safetensors")
    assert says in str(refused.value)


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ({f"{LAYER}.weight_scale_2": torch.ones(())}, "NVFP4"),
        ({f"{LAYER}.weight_scale": torch.full((48, 1), 127, dtype=torch.uint8)}, "MXFP8"),
        ({f"{LAYER}.wscales": torch.ones(2)}, "SVDQuant"),
        ({f"{LAYER}.qweight": torch.ones(2, dtype=torch.int32)}, "AWQ"),
        ({f"{LAYER}.weight_scale_inv": torch.ones(1, 1)}, "a scale for each block"),
        ({f"{LAYER}.weight.absmax": torch.ones(2)}, "bitsandbytes"),
        ({f"{LAYER}.weight._shift": torch.ones(2)}, "4-bit quanto"),
    ],
)
def test_other_formats_are_called_what_they_are(tiny: TinyModels, tmp_path: Path, more: Tensors, says: str) -> None:
    save_file(plain(tiny) | more, tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match=rf"belongs to .*{says}.*Take the bf16 or fp16 file"):
        read(tmp_path / "x.safetensors")


# ---- the text encoder -----------------------------------------------------------------------------------------------


def spelled(tensors: Tensors, kind: str) -> Tensors:
    spellings = {
        "official": lambda name: name,
        "transformers": hf_name,
        "without encoder.": lambda name: hf_name(name).removeprefix("encoder."),
        "a copy of the table": lambda name: hf_name(name).replace("shared.", "encoder.embed_tokens."),
        "in a pipeline": lambda name: f"text_encoders.umt5xxl.transformer.{hf_name(name)}",
        "compiled": lambda name: f"text_encoder._orig_mod.{name}",
    }
    return {spellings[kind](name): tensor for name, tensor in tensors.items()}


SPELLINGS = ["official", "transformers", "without encoder.", "a copy of the table", "in a pipeline", "compiled"]


@pytest.mark.slow
@pytest.mark.parametrize("kind", SPELLINGS)
@pytest.mark.parametrize("quantised", ["", "table too", "unscaled"])
def test_text_encoders_of_every_spelling_give_the_same_states(
    tiny: TinyModels, tmp_path: Path, kind: str, quantised: str
) -> None:
    original = torch.load(tiny.t2v / "models_t5_umt5-xxl-enc-bf16.pth", weights_only=True)
    file, right = {}, {}
    for name, tensor in original.items():
        file[name] = right[name] = tensor.float()
        if quantised and tensor.dim() == 2 and "pos_embedding" not in name:
            scale = tensor.float().abs().max() / 448 if quantised == "table too" else torch.ones(())
            file[name] = (tensor.float() / scale).to(FP8)
            right[name] = file[name].float() * scale
            if quantised == "table too":
                file[name.removesuffix("weight") + "weight_scale"] = scale
    save_file(spelled(file, kind), tmp_path / "x.safetensors")
    save_file(right, tmp_path / "right.safetensors")
    states = [
        TextEncoder.load(tmp_path / name, tiny.t2v / "google/umt5-xxl", dtype=torch.float32)
        .encode("a red ball")
        .states_LD
        for name in ("x.safetensors", "right.safetensors")
    ]
    assert torch.allclose(states[0], states[1], rtol=0, atol=1e-6) and states[1].abs().max() > 0.1


def test_the_decoder_of_a_whole_model_is_left_out() -> None:
    names = [
        "shared.weight",
        "encoder.embed_tokens.weight",
        "decoder.block.0.layer.0.layer_norm.weight",
        "lm_head.weight",
    ]
    assert text_encoder_names(names) == {"shared.weight": "token_embedding.weight"}
    with pytest.raises(CheckpointError, match=r"token_embedding\.weight twice"):
        text_encoder_names(["shared.weight", "text_encoder.shared.weight"])


def test_a_file_that_holds_a_tensor_twice_is_named(tmp_path: Path) -> None:
    cases = {
        "t5": (ModelWeights.of_text_encoder, ["shared.weight", "text_encoder.shared.weight"]),
        "dit": (ModelWeights.of_expert, ["head.head.weight", "model.head.head.weight"]),
    }
    for name, (read, names) in cases.items():
        save_file({name: torch.ones(4, 2) for name in names}, tmp_path / f"{name}.safetensors")
        with pytest.raises(CheckpointError, match=rf"/{name}\.safetensors holds \S+ twice, as"):
            read(open_checkpoint(tmp_path / f"{name}.safetensors"))


@pytest.mark.parametrize("word", ["quantization_config", "quantization", "quantization_metadata", "quant_method"])
def test_another_word_about_quantisation_in_the_header_is_refused(tiny: TinyModels, tmp_path: Path, word: str) -> None:
    save_file(plain(tiny), tmp_path / "x.safetensors", metadata={word: "{}"})
    with pytest.raises(CheckpointError, match=f"the header's {word} describes a quantisation"):
        read(tmp_path / "x.safetensors")
