"""What a file is follows from its header; what it is for, from header, name and the notes beside it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from gguf_files import quantised, write_gguf
from model_tree import DEMO, I2V, LORA, T2V, put, style_lora
from safetensors.torch import load_file, save_file

from lightx2v.catalog.catalog import Catalog
from lightx2v.catalog.describe import describe
from lightx2v.catalog.found_file import FoundFile
from lightx2v.catalog.scan import scan
from lightx2v.loading.lora_experts import _evidence

EXPERT = "diffusion_pytorch_model.safetensors"


def described(path: Path) -> FoundFile:
    found = describe(path, path.stat().st_size)
    assert found is not None
    return found


@pytest.mark.parametrize(("source", "task"), [(T2V, "t2v"), (I2V, "i2v")])
@pytest.mark.parametrize(("name", "expert"), [("a_high_noise.safetensors", "high"), ("LowNoise-b.safetensors", "low"),
                                              ("c.safetensors", None)])  # fmt: skip
def test_an_experts_task_comes_from_its_channels_and_its_half_from_its_name(
    tmp_path: Path, source: Path, task: str, name: str, expert: str | None
) -> None:
    found = described(put(source / "high_noise_model" / EXPERT, tmp_path / "models" / name))
    assert (found.kind, found.task, found.expert, found.quantisation) == ("expert", task, expert, "fp16")
    assert (found.width, found.text_width, found.distilled, found.problem) == (160, 64, False, "")


def test_an_expert_under_other_programs_prefixes_is_the_same(tmp_path: Path) -> None:
    tensors = load_file(T2V / "high_noise_model" / EXPERT)
    path = tmp_path / "model.safetensors"
    save_file({f"model.diffusion_model.{name}": tensor for name, tensor in tensors.items()}, path)
    found = described(path)
    assert (found.kind, found.task, found.width) == ("expert", "t2v", 160)


def test_how_most_bytes_are_stored_is_the_quantisation(tmp_path: Path) -> None:
    tensors = load_file(T2V / "high_noise_model" / EXPERT)
    eight = {}
    for name, tensor in tensors.items():
        matrix = name.startswith("blocks.") and tensor.dim() == 2 and name.endswith(".weight")
        eight[name] = tensor.float().to(torch.float8_e4m3fn) if matrix else tensor
        if matrix:
            eight[name.removesuffix("weight") + "scale_weight"] = torch.ones(())
    path = tmp_path / "wan_high_noise_fp8_scaled.safetensors"
    save_file(eight, path)
    found = described(path)
    assert (found.quantisation, found.quantised, found.problem) == ("fp8", True, "")


def test_a_recognised_file_that_cannot_be_used_says_why(tmp_path: Path) -> None:
    tensors = load_file(T2V / "high_noise_model" / EXPERT)
    path = tmp_path / "mixed.safetensors"
    save_file(tensors | {"blocks.0.self_attn.q.scale_weight": torch.ones(())}, path)
    found = described(path)
    assert found.kind == "expert" and "blocks.0.self_attn.q.scale_weight" in found.problem


def test_text_encoder_and_vae_are_told_apart_from_other_programs(tmp_path: Path) -> None:
    encoder = described(put(T2V / "models_t5_umt5-xxl-enc-bf16.pth", tmp_path / "encoder.pth"))
    assert (encoder.kind, encoder.text_width, encoder.quantisation) == ("text encoder", 64, "bf16")
    assert described(put(T2V / "Wan2.1_VAE.pth", tmp_path / "any.pth")).kind == "VAE"
    # T5 of other models has one position bias for all blocks.
    names = ["shared.weight", "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"]
    names += [f"encoder.block.{block}.layer.0.SelfAttention.q.weight" for block in range(2)]
    save_file({name: torch.zeros(4, 4) for name in names}, tmp_path / "t5xxl.safetensors")
    save_file({"unet.conv_in.weight": torch.zeros(4, 4)}, tmp_path / "sd.safetensors")
    for name in ("t5xxl", "sd"):
        path = tmp_path / f"{name}.safetensors"
        assert describe(path, path.stat().st_size) is None, name


@pytest.mark.parametrize("content", [b"", b"GGUF", b"\0" * 64, b"PK\x03\x04broken", b'\x08\0\0\0\0\0\0\0{"a": 1}'])
def test_a_broken_file_is_no_model_file(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "broken.safetensors"
    path.write_bytes(content)
    assert describe(path, len(content)) is None


def test_a_lora_tells_its_rank_words_base_and_picture(tmp_path: Path) -> None:
    (tmp_path / "loras").mkdir()
    path = style_lora(tmp_path)
    found = described(path)
    assert (found.kind, found.rank, found.width, found.expert) == ("LoRA", 16, 160, None)
    assert found.triggers == ("wtrclr style", "soft wash")
    assert (found.trained_for, found.task) == ("Wan Video 2.2 T2V-A14B", "t2v")
    assert found.thumbnail == path.with_suffix(".preview.png")


@pytest.mark.parametrize(
    ("metadata", "words"),
    [
        ({"ss_tag_frequency": json.dumps({"10_x": {"ohwx": 9, "man": 4, "tree": 2}})}, ("ohwx",)),
        ({"ss_tag_frequency": json.dumps({"10_x": {"man": 4, "tree": 4}})}, ()),
        ({"ss_tag_frequency": "{not json"}, ()),
        ({"trigger_words": "one, two\nthree"}, ("one", "two", "three")),
        ({"trigger_word": "a\x07b\tc"}, ("ab c",)),
        ({"trigger_word": "x" * 500}, ("x" * 120,)),
    ],
)
def test_trigger_words_come_from_the_header(tmp_path: Path, metadata: dict[str, str], words: tuple[str, ...]) -> None:
    (tmp_path / "loras").mkdir()
    path = style_lora(tmp_path, metadata=metadata)
    path.with_suffix(".civitai.info").unlink()
    assert described(path).triggers == words


@pytest.mark.parametrize(
    ("name", "prefixes", "metadata", "expert"),
    [
        ("plain", ("transformer_2.",), {}, "low"),
        ("low_noise", ("high_noise_model.",), {}, "high"),
        ("high_noise", ("transformer.", "transformer_2."), {}, None),
        ("low_noise", ("diffusion_model.",), {"ss_base_model": "wan2.2 high noise"}, "high"),
        ("plain", ("diffusion_model.",), {"ss_min_timestep": "875", "ss_max_timestep": "1000"}, "high"),
        ("plain", ("diffusion_model.",), {"ss_min_timestep": "0", "ss_max_timestep": "875"}, "low"),
        ("plain", ("diffusion_model.",), {"ss_caption": "a high noise level"}, None),
        ("style_HIGH", ("diffusion_model.",), {}, None),
    ],
)
def test_a_loras_expert_is_the_one_that_loading_takes(
    tmp_path: Path, name: str, prefixes: tuple[str, ...], metadata: dict[str, str], expert: str | None
) -> None:
    """As far as the file alone says it: `style_HIGH` is one half where its other half is found (test_catalog.py)."""
    tensors = {
        f"{prefix}blocks.{block}.self_attn.q.lora_{kind}.weight": torch.ones(shape)
        for prefix in prefixes
        for block in range(2)
        for kind, shape in (("A", (4, 160)), ("B", (160, 4)))
    }
    path = tmp_path / f"{name}.safetensors"
    save_file(tensors, path, metadata=metadata or None)
    assert described(path).expert == expert
    if name != "style_HIGH":
        assert _evidence(path, [path]).expert == expert


def test_kohyas_names_make_a_lora_too(tmp_path: Path) -> None:
    path = tmp_path / "musubi.safetensors"
    down, up = torch.zeros(8, 5120), torch.zeros(5120, 8)
    layer = "lora_unet_blocks_0_self_attn_q"
    save_file(
        {f"{layer}.lora_down.weight": down, f"{layer}.lora_up.weight": up, f"{layer}.alpha": torch.ones(())}, path
    )
    found = described(path)
    assert (found.kind, found.rank, found.width) == ("LoRA", 8, 5120)


def test_a_lora_of_another_model_is_none_of_ours(tmp_path: Path) -> None:
    layer = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
    path = tmp_path / "sdxl.safetensors"
    save_file({f"{layer}.lora_down.weight": torch.zeros(8, 640), f"{layer}.lora_up.weight": torch.zeros(640, 8)}, path)
    assert describe(path, path.stat().st_size) is None


def test_distilled_models_and_loras_say_so_in_their_names(tmp_path: Path) -> None:
    lora = DEMO / "loras" / LORA.format("t2v", "high")
    assert described(lora).distilled
    assert not described(put(lora, tmp_path / "style_high_noise.safetensors")).distilled
    expert = T2V / "high_noise_model" / EXPERT
    assert described(put(expert, tmp_path / "wan2.2_t2v_high_noise_lightx2v_4step.safetensors")).distilled


def test_diffusers_folders_are_the_two_experts(tmp_path: Path) -> None:
    for folder, expert in (("transformer", "high"), ("transformer_2", "low")):
        shutil.copytree(T2V / f"{expert}_noise_model", tmp_path / folder)
    assert [described(tmp_path / name).expert for name in ("transformer", "transformer_2")] == ["high", "low"]


def test_a_gguf_pair_makes_a_model_of_its_mix(tmp_path: Path) -> None:
    for half in ("high", "low"):
        tensors = load_file(T2V / f"{half}_noise_model" / EXPERT)
        blocks = {
            name: quantised(tensor, "Q8_0") if name.startswith("blocks.") and tensor.dim() == 2 else tensor.float()
            for name, tensor in tensors.items()
        }
        write_gguf(tmp_path / f"Wan2.2-T2V-{half.title()}Noise-Q8_0.gguf", blocks)
    found = Catalog(scan([tmp_path]))
    model = found.models["Wan2.2-T2V-Q8_0"]
    assert (model.high.quantisation, model.high.gguf, model.high.problem) == ("Q8_0", True, "")
    engine = model.resolved().engine
    assert (engine.dit_quantized, engine.dit_quant_scheme) == (True, "gguf-Q8_0")
    assert engine.high_noise_quantized_ckpt == str(tmp_path / "Wan2.2-T2V-HighNoise-Q8_0.gguf")


def raw(path: Path, header: str) -> FoundFile | None:
    content = header.encode()
    path.write_bytes(len(content).to_bytes(8, "little") + content)
    return describe(path, path.stat().st_size)


@pytest.mark.parametrize(
    "shape", ['["a", "b"]', "[{}, []]", "[1e999, 2]", "[-1, 4]", f"[{10**400}]", "7", "null", "[true, 1]"]
)
@pytest.mark.parametrize("whole", [True, False])
def test_hostile_shapes_stop_no_scan(tmp_path: Path, shape: str, whole: bool) -> None:
    layer = "diffusion_model.blocks.0.self_attn.q"
    entry = '"%s.lora_%s.weight": {"dtype": "F16", "shape": %s, "data_offsets": [0, 0]}'
    header = "{" + ", ".join(entry % (layer, part, shape) for part in ("down", "up")) + ("}" if whole else "")
    found = raw(tmp_path / "x.safetensors", header)
    assert found is None or (found.rank, found.width) == (0, 0)


def test_metadata_counts_wherever_it_stands(tmp_path: Path) -> None:
    entry = '"blocks.0.self_attn.q.lora_%s.weight" :\n{"dtype":"F16","shape":[4,8],"data_offsets":[0,64]}'
    tensors = ",".join(entry % part for part in ("down", "up"))
    metadata = '"__metadata__": {"trigger_word": "say \\"__metadata__\\": {", "note": "\\ud800"}'
    for number, header in enumerate((f" {{{metadata},{tensors}}}", f"{{{tensors} , {metadata}}}")):
        found = raw(tmp_path / f"{number}.safetensors", header)
        assert found is not None and (found.rank, found.width) == (4, 8)
        assert found.triggers == ('say "__metadata__": {',)


def test_of_a_lora_no_more_is_parsed_than_tells_what_it_is(tmp_path: Path) -> None:
    """Thousands of LoRAs are looked through in seconds: what follows the first layers is not even valid here."""
    entry = '"blocks.%d.ffn.0.lora_down.weight":{"dtype":"F16","shape":[4,8],"data_offsets":[0,64]},'
    found = raw(tmp_path / "x.safetensors", "{" + "".join(entry % block for block in range(12)) + "#" * 100)
    assert found is not None and (found.kind, found.rank) == ("LoRA", 4)
