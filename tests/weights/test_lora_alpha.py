"""Alpha is found wherever a trainer wrote it; PEFT and diffusers, which wrote these files, give the right weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from lightx2v.errors import LoraError
from lightx2v.weights.checkpoint import open_checkpoint
from lightx2v.weights.lora import MatchedLora, add_loras
from lightx2v.weights.lora_match import match_lora

WIDTH, INNER = 24, 48
Tensors = dict[str, torch.Tensor]


class Net(nn.Module):
    """Two blocks with the names of Wan's matrices."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.ModuleDict(
                {
                    "self_attn": nn.ModuleDict({name: nn.Linear(WIDTH, WIDTH) for name in "qkvo"}),
                    "ffn": nn.ModuleList([nn.Linear(WIDTH, INNER), nn.GELU(), nn.Linear(INNER, WIDTH)]),
                }
            )
            for _ in range(2)
        )


TARGETS = r"blocks\.\d+\.(self_attn\.[qkvo]|ffn\.[02])"
LAYERS = 2 * 6


def trained(config: peft.PeftConfig, folder: Path) -> tuple[Tensors, Tensors]:
    """Weights before and after, by PEFT; its files are in `folder`."""
    torch.manual_seed(1)
    net = Net()
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    model = peft.get_peft_model(net, config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if any(part in name for part in ("lora_", "lokr_", "hada_")) and "magnitude" not in name:
                parameter.copy_(0.2 * torch.randn_like(parameter))
            elif "magnitude" in name:
                parameter.mul_(1 + 0.2 * torch.rand_like(parameter))
    model.save_pretrained(folder)
    return before, model.merge_and_unload().state_dict()


def merged(before: Tensors, lora: MatchedLora) -> Tensors:
    return {
        name: add_loras(tensor.clone(), name, [lora] if name in lora.patches else [], torch.float32)
        for name, tensor in before.items()
    }


def shapes_of(tensors: Tensors) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


CONFIGS: dict[str, peft.PeftConfig] = {
    "alpha 16 of rank 4": peft.LoraConfig(r=4, lora_alpha=16, target_modules=TARGETS),
    "rsLoRA": peft.LoraConfig(r=4, lora_alpha=6, use_rslora=True, target_modules=TARGETS),
    "DoRA": peft.LoraConfig(r=4, lora_alpha=6, use_dora=True, target_modules=TARGETS),
    "a bias in lora_B": peft.LoraConfig(r=4, lora_alpha=6, lora_bias=True, target_modules=TARGETS),
    "patterns": peft.LoraConfig(
        r=4,
        lora_alpha=8,
        rank_pattern={"blocks.0.self_attn.q": 2, "ffn.2": 3},
        alpha_pattern={"blocks.1.self_attn.q": 1, r".*\.ffn\.2": 5},
        target_modules=TARGETS,
    ),
    "LoHa": peft.LoHaConfig(r=3, alpha=5, target_modules=TARGETS),
    "LoKr": peft.LoKrConfig(r=2, alpha=3, decompose_factor=4, target_modules=TARGETS),
    "LoKr, both low-rank": peft.LoKrConfig(
        r=1, alpha=3, decompose_both=True, decompose_factor=4, target_modules=TARGETS
    ),
    "LoKr without low-rank factors": peft.LoKrConfig(r=20, alpha=30, decompose_factor=4, target_modules=TARGETS),
}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Adapter 'default'")  # PEFT takes its own biases for shards
@pytest.mark.parametrize("kind", CONFIGS)
def test_pefts_settings_beside_the_file_give_pefts_weights(tmp_path: Path, kind: str) -> None:
    before, after = trained(CONFIGS[kind], tmp_path)
    lora = match_lora(tmp_path / "adapter_model.safetensors", shapes_of(before))
    assert lora.report.applied == LAYERS * (2 if kind == "a bias in lora_B" else 1)
    got = merged(before, lora)
    assert all(torch.allclose(got[name], after[name], rtol=0, atol=1e-6) for name in before)
    assert any(not torch.allclose(before[name], after[name], atol=1e-2) for name in before)
    assert any("adapter_config.json" in note for note in lora.report.notes)


def test_settings_beside_belong_to_adapter_model_where_there_is_one(tmp_path: Path) -> None:
    before, _ = trained(CONFIGS["alpha 16 of rank 4"], tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    (tmp_path / "other.safetensors").write_bytes(file.read_bytes())
    scales = {name: scale_of(tmp_path / name, before) for name in ("adapter_model.safetensors", "other.safetensors")}
    assert scales == {"adapter_model.safetensors": {4.0}, "other.safetensors": {1.0}}
    file.rename(tmp_path / "renamed.safetensors")
    assert scale_of(tmp_path / "renamed.safetensors", before) == {4.0}


def scale_of(path: Path, before: Tensors) -> set[float]:
    return {patch.scale for patch in match_lora(path, shapes_of(before)).patches.values()}


def written(path: Path, metadata: dict[str, str], tensors: Tensors | None = None) -> tuple[Path, Tensors]:
    """A pair of rank 4 with this header, and the model's weights."""
    model = Net().state_dict()
    stem = "blocks.0.self_attn.q"
    pair = {
        f"transformer.{stem}.lora_A.weight": torch.ones(4, WIDTH),
        f"transformer.{stem}.lora_B.weight": torch.ones(WIDTH, 4),
    }
    save_file(pair | (tensors or {}), path, metadata=metadata)
    return path, model


def adapter_metadata(**words: Any) -> dict[str, str]:
    return {"lora_adapter_metadata": json.dumps({f"transformer.{word}": value for word, value in words.items()})}


@pytest.mark.parametrize(
    ("metadata", "scale"),
    [
        ({}, 1.0),
        ({"format": "pt", "title": "a style"}, 1.0),
        ({"lora_alpha": "16"}, 4.0),
        ({"lora_alpha": "16", "rank": "4"}, 4.0),
        ({"alpha": "16", "rank": "4"}, 4.0),
        ({"ss_network_alpha": "2.0", "ss_network_dim": "4"}, 0.5),
        ({"ss_network_alpha": "None", "ss_network_dim": "4"}, 1.0),
        ({"transformer.lora_alpha": "16", "transformer.r": "4"}, 4.0),
        ({"lora_alpha": "16", "transformer.lora_alpha": "16"}, 4.0),
        ({"lora_config": '{"r": 4, "lora_alpha": 16}'}, 4.0),
        ({"lora_alpha": "0"}, 1.0),
        ({"ss_network_alpha": "16", "ss_network_dim": "Dynamic"}, 4.0),
        ({"networkAlpha": "16", "networkDim": "4"}, 4.0),
        ({"LoRA_Alpha": "16"}, 4.0),
        (adapter_metadata(r=4, lora_alpha=16, init_lora_weights="gaussian", use_newer=False), 4.0),
        (adapter_metadata(r=4, lora_alpha=16, rank_pattern={}, alpha_pattern={}, use_dora=False), 4.0),
        (adapter_metadata(r=4, lora_alpha=16, use_rslora=True), 8.0),
        (adapter_metadata(r=8, lora_alpha=16, rank_pattern={"blocks.0.self_attn.q": 4}), 4.0),
        (adapter_metadata(r=4, lora_alpha=16, alpha_pattern={"self_attn.q": 2}), 0.5),
        (adapter_metadata(r=4, lora_alpha=16, alpha_pattern={"^blocks.1": 2}), 4.0),
    ],
)
def test_headers_give_the_scale(tmp_path: Path, metadata: dict[str, str], scale: float) -> None:
    path, model = written(tmp_path / "a.safetensors", metadata)
    assert scale_of(path, model) == {scale}


def test_an_alpha_tensor_counts_more_than_any_header(tmp_path: Path) -> None:
    alpha = {"transformer.blocks.0.self_attn.q.alpha": torch.tensor(2.0)}
    for header in ({"lora_alpha": "16"}, {"rank": "Dynamic"}, {"lora_alpha": "1", "alpha": "2", "r": "99"}):
        path, model = written(tmp_path / "a.safetensors", header, alpha)
        assert scale_of(path, model) == {0.5}


@pytest.mark.parametrize(
    ("metadata", "says"),
    [
        ({"lora_alpha": "16", "ss_network_alpha": "8"}, "contradict each other: lora_alpha 16, ss_network_alpha 8"),
        ({"lora_alpha": "16", "r": "4", "rank": "8"}, "ranks contradict each other"),
        ({"lora_alpha": "16", "transformer.lora_alpha": "8"}, "contradict"),
        ({"lora_alpha": "16", "rank": "8"}, "the rank of blocks.0.self_attn.q is 8, its tensors have 4"),
        ({"lora_alpha": "dynamic"}, "lora_alpha 'dynamic', expected a number"),
        ({"lora_alpha": "nan"}, "expected a number"),
        ({"lora_alpha": "-4"}, "expected a number"),
        ({"lora_adapter_metadata": "{"}, "lora_adapter_metadata in its header is no JSON object"),
        ({"lora_adapter_metadata": "[1]"}, "is no JSON object"),
        (adapter_metadata(r=4, lora_alpha=16, peft_type="OFT"), "peft_type 'OFT'"),
        (adapter_metadata(r=4, lora_alpha=16, use_dora=True), "says that it is a DoRA, but holds no magnitudes"),
        (adapter_metadata(r=4, lora_alpha=16, init_lora_weights="pissa_niter_4"), "the base model was changed"),
        (adapter_metadata(r=4, lora_alpha=16, init_lora_weights="LoRA-GA"), "the base model was changed"),
        (adapter_metadata(r=4, lora_alpha=16, init_lora_weights="newer"), "'newer', which is not known here"),
        (adapter_metadata(r=4, lora_alpha=16, use_newer=True), "use_newer True, which is not supported"),
        (adapter_metadata(r=4, lora_alpha=16, alora_invocation_tokens=[1]), "alora_invocation_tokens"),
        (adapter_metadata(r=4, lora_alpha=16, alpha_pattern={"(a+)+$": 2}), "pattern '(a+)+$', which is not supported"),
    ],
)  # fmt: skip
def test_what_leaves_the_scale_unclear_is_refused(tmp_path: Path, metadata: dict[str, str], says: str) -> None:
    path, model = written(tmp_path / "a.safetensors", metadata)
    with pytest.raises(LoraError) as refused:
        match_lora(path, shapes_of(model))
    assert says in str(refused.value)


def test_settings_beside_the_file_may_begin_with_a_byte_order_mark(tmp_path: Path) -> None:
    path, model = written(tmp_path / "a.safetensors", {})
    (tmp_path / "adapter_config.json").write_text('{"r": 4, "lora_alpha": 16}', "utf-8-sig")
    assert scale_of(path, model) == {4.0}


@pytest.mark.parametrize("name", ["lora.alpha", "lora_A.alpha", "lora_down.alpha", "lora_linear_layer.alpha"])
def test_an_alpha_beside_either_half_is_the_layers(tmp_path: Path, name: str) -> None:
    path, model = written(
        tmp_path / "a.safetensors", {}, {f"transformer.blocks.0.self_attn.q.{name}": torch.tensor(2.0)}
    )
    assert scale_of(path, model) == {0.5}


@pytest.mark.parametrize("content", ["{", "[]", '{"r": "x", "lora_alpha": 4}', "\xff" * 10])
def test_damaged_settings_beside_the_file_are_an_error(tmp_path: Path, content: str) -> None:
    path, model = written(tmp_path / "a.safetensors", {})
    (tmp_path / "adapter_config.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(LoraError, match="adapter_config"):
        match_lora(path, shapes_of(model))


def test_a_header_for_both_experts_is_read_for_the_one_that_is_meant(tmp_path: Path) -> None:
    words = {"transformer.r": 4, "transformer.lora_alpha": 16, "transformer_2.r": 4, "transformer_2.lora_alpha": 2}
    path, model = written(tmp_path / "a.safetensors", {"lora_adapter_metadata": json.dumps(words)})
    for expert, scale in (("high", 4.0), ("low", 0.5)):
        lora = match_lora(path, shapes_of(model), expert=expert)  # type: ignore[arg-type]
        assert {patch.scale for patch in lora.patches.values()} == {scale}
    with pytest.raises(LoraError, match=r"has values for transformer, transformer_2"):
        match_lora(path, shapes_of(model))


def test_diffusers_saves_its_alpha_where_it_is_found(tmp_path: Path) -> None:
    from diffusers import WanPipeline
    from diffusers.training_utils import _collate_lora_metadata

    class Denoiser(Net):
        peft_config = {"default": peft.LoraConfig(r=4, lora_alpha=16, target_modules=["q"])}

    stem = "blocks.0.self_attn.q"
    state = {f"{stem}.lora_A.weight": torch.ones(4, WIDTH), f"{stem}.lora_B.weight": torch.ones(WIDTH, 4)}
    WanPipeline.save_lora_weights(
        tmp_path, transformer_lora_layers=state, **_collate_lora_metadata({"transformer": Denoiser()})
    )
    (file,) = tmp_path.iterdir()
    assert "lora_alpha" in open_checkpoint(file).metadata["lora_adapter_metadata"] and load_file(file)
    assert scale_of(file, Net().state_dict()) == {4.0}
