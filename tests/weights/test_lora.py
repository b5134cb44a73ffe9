"""LoRAs: every dialect means the same weights, what does not fit is refused whole, going back gives the same bits."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import TinyModels
from lora_files import DIALECTS, RANK, Tensors, base_weights, equal, random_pairs, write
from safetensors.torch import save_file

from lightx2v.config.request import LoraSpec
from lightx2v.errors import BadRequest, LoraError
from lightx2v.weights.checkpoint import open_checkpoint
from lightx2v.weights.lora import match_lora
from lightx2v.weights.model_weights import ModelWeights


@pytest.fixture(scope="module")
def weights(tiny: TinyModels) -> ModelWeights:
    return base_weights(tiny.t2v)


def merged(weights: ModelWeights, *loras: object) -> Tensors:
    return dict(weights.with_loras(loras).tensors())  # type: ignore[arg-type]


@pytest.mark.parametrize("dialect", DIALECTS)
def test_every_dialect_means_the_same(weights: ModelWeights, tmp_path: Path, dialect: str) -> None:
    pairs = random_pairs(weights.shapes)
    lora = match_lora(write(tmp_path / "a.safetensors", pairs, dialect, alpha=2.0), weights.plain_shapes, strength=0.5)
    assert lora.report.applied == lora.report.total == len(pairs) > 20
    base, got = merged(weights), merged(weights, lora)
    for stem, pair in pairs.items():
        name = f"{stem}.weight"
        want = base[name].double() + 0.5 * (2.0 / RANK) * pair["up"].double() @ pair["down"].double()
        assert torch.allclose(got[name].double(), want, rtol=0, atol=1e-6), name
    untouched = base.keys() - {f"{stem}.weight" for stem in pairs}
    assert untouched and all(torch.equal(got[name], base[name]) for name in untouched)


def test_differences_reach_weights_biases_norms_and_modulation(weights: ModelWeights, tmp_path: Path) -> None:
    shapes = weights.shapes
    tensors = {
        "diffusion_model.blocks.0.ffn.0.diff": torch.randn(shapes["blocks.0.ffn.0.weight"]),
        "diffusion_model.blocks.0.ffn.0.diff_b": torch.randn(shapes["blocks.0.ffn.0.bias"]),
        "diffusion_model.blocks.1.self_attn.norm_q.diff": torch.randn(shapes["blocks.1.self_attn.norm_q.weight"]),
        "diffusion_model.blocks.1.norm3.diff_b": torch.randn(shapes["blocks.1.norm3.bias"]),
        "diffusion_model.blocks.1.diff_m": torch.randn(shapes["blocks.1.modulation"]),
        "diffusion_model.head.diff_m": torch.randn(shapes["head.modulation"]),
        "diffusion_model.patch_embedding.lora_up.weight": torch.randn(shapes["patch_embedding.weight"][0], 2, 1, 1, 1),
        "diffusion_model.patch_embedding.lora_down.weight": torch.randn(2, *shapes["patch_embedding.weight"][1:]),
    }
    save_file(tensors, tmp_path / "d.safetensors")
    lora = match_lora(tmp_path / "d.safetensors", shapes, strength=2.0)
    base, got = merged(weights), merged(weights, lora)
    changed = {name for name in base if not torch.equal(base[name], got[name])}
    assert changed == {
        *("blocks.0.ffn.0.weight", "blocks.0.ffn.0.bias", "blocks.1.self_attn.norm_q.weight", "blocks.1.norm3.bias"),
        *("blocks.1.modulation", "head.modulation", "patch_embedding.weight"),
    }
    want = base["blocks.1.modulation"] + 2 * tensors["diffusion_model.blocks.1.diff_m"]
    assert torch.allclose(got["blocks.1.modulation"], want)
    up, down = (tensors[f"diffusion_model.patch_embedding.lora_{half}.weight"] for half in ("up", "down"))
    delta = torch.einsum("or,r...->o...", up.flatten(1), down)
    assert torch.allclose(got["patch_embedding.weight"], base["patch_embedding.weight"] + 2 * delta, atol=1e-5)


@pytest.mark.parametrize(("alpha", "factor"), [(None, 1.0), (0.0, 1.0), (RANK * 3.0, 3.0)])
def test_alpha_is_divided_by_the_rank_and_no_alpha_means_one(
    weights: ModelWeights, tmp_path: Path, alpha: float | None, factor: float
) -> None:
    path = write(tmp_path / "a.safetensors", random_pairs(weights.shapes), alpha=alpha)
    lora = match_lora(path, weights.plain_shapes)
    assert {patch.scale for patch in lora.patches.values()} == {factor}


def test_strength_zero_is_no_lora_to_the_bit(weights: ModelWeights, tmp_path: Path) -> None:
    lora = match_lora(write(tmp_path / "a.safetensors", random_pairs(weights.shapes)), weights.shapes, strength=0.0)
    assert equal(merged(weights, lora), merged(weights))


@pytest.mark.parametrize("strength", [float("nan"), float("inf"), 1e6])
def test_a_strength_that_is_no_sane_number_is_refused(strength: float) -> None:
    with pytest.raises(BadRequest, match="strength"):
        LoraSpec(expert="high", path="a.safetensors", strength=strength)


def test_two_loras_add_up(weights: ModelWeights, tmp_path: Path) -> None:
    one, two = (random_pairs(weights.shapes, seed) for seed in (1, 2))
    loras = [
        match_lora(write(tmp_path / f"{i}.safetensors", pairs), weights.shapes) for i, pairs in enumerate((one, two))
    ]
    name = "blocks.1.cross_attn.v"
    want = sum((p[name]["up"].double() @ p[name]["down"].double() for p in (one, two)), start=torch.zeros(()))
    got = merged(weights, *loras)[f"{name}.weight"] - merged(weights)[f"{name}.weight"]
    assert torch.allclose(got.double(), want, atol=1e-6)


# ---- what does not fit ----------------------------------------------------------------------------------------------


def test_a_lora_of_another_model_is_refused_with_names_of_both(weights: ModelWeights, tmp_path: Path) -> None:
    save_file(
        {"lora_te_text_3.lora_up.weight": torch.ones(2, 2), "lora_te_text_3.lora_down.weight": torch.ones(2, 2)},
        tmp_path / "x.safetensors",
    )
    with pytest.raises(LoraError, match=r"changes nothing.*lora_te_text_3.*the model has \S+weight"):
        match_lora(tmp_path / "x.safetensors", weights.shapes)


def test_a_model_in_place_of_a_lora_is_called_that(weights: ModelWeights, tiny: TinyModels) -> None:
    with pytest.raises(LoraError, match="holds a whole model, not a LoRA"):
        match_lora(tiny.t2v / "high_noise_model", weights.shapes)


def test_one_wrong_shape_refuses_the_whole_file(weights: ModelWeights, tmp_path: Path) -> None:
    pairs = random_pairs(weights.shapes)
    pairs["blocks.0.ffn.2"]["down"] = torch.zeros(RANK, 7)
    with pytest.raises(LoraError, match=r"blocks\.0\.ffn\.2\.weight has up \[24, 4\] and down \[4, 7\], the model"):
        match_lora(write(tmp_path / "x.safetensors", pairs), weights.shapes)


def test_halves_of_different_rank_are_refused(weights: ModelWeights, tmp_path: Path) -> None:
    pairs = random_pairs(weights.shapes)
    pairs["blocks.1.cross_attn.k"]["up"] = torch.zeros(24, RANK + 2)
    with pytest.raises(LoraError, match=r"1 of its layers.*cross_attn\.k\.weight has up \[24, 6\] and down \[4, 24\]"):
        match_lora(write(tmp_path / "x.safetensors", pairs), weights.shapes)


def test_a_lora_of_a_model_of_another_width_is_refused_with_the_count(weights: ModelWeights, tmp_path: Path) -> None:
    wider = {name: tuple(2 * side for side in shape) for name, shape in weights.shapes.items()}
    pairs = {stem: pair for stem, pair in random_pairs(wider).items() if stem.startswith("blocks.0")}
    for allow_partial in (False, True):
        with pytest.raises(LoraError, match=r"does not fit this model: 10 of its layers have other sizes.*Nothing"):
            match_lora(write(tmp_path / "x.safetensors", pairs), weights.shapes, allow_partial=allow_partial)


def test_a_lora_that_changes_the_images_channels_is_not_for_text_to_video(tiny: TinyModels, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(tiny.i2v / "high_noise_model")
    name = "patch_embedding.weight"
    tensors = {"diffusion_model.patch_embedding.diff": torch.zeros(checkpoint.shapes[name])}
    save_file(tensors, tmp_path / "i2v.safetensors")
    assert match_lora(tmp_path / "i2v.safetensors", checkpoint.shapes).report.applied == 1
    with pytest.raises(LoraError, match=r"patch_embedding.*another model or task"):
        match_lora(tmp_path / "i2v.safetensors", base_weights(tiny.t2v).shapes)


@pytest.mark.parametrize("alpha", [float("nan"), float("inf")])
def test_an_alpha_that_is_no_number_is_refused(weights: ModelWeights, tmp_path: Path, alpha: float) -> None:
    path = write(tmp_path / "x.safetensors", random_pairs(weights.shapes), alpha=alpha)
    with pytest.raises(LoraError, match=r"alpha must be one finite number"):
        match_lora(path, weights.shapes)


def test_a_partial_match_is_refused_unless_allowed(weights: ModelWeights, tmp_path: Path) -> None:
    pairs = random_pairs(weights.shapes)
    pairs["blocks.77.ffn.0"] = pairs["blocks.0.ffn.0"]
    path = write(tmp_path / "x.safetensors", pairs)
    with pytest.raises(
        LoraError, match=rf"only in part: {len(pairs) - 1} layers have a place, 1 have none.*blocks\.77"
    ):
        match_lora(path, weights.shapes)
    report = match_lora(path, weights.shapes, allow_partial=True).report
    assert (report.applied, report.total) == (len(pairs) - 1, len(pairs))
    assert "blocks.77" in report.unmatched[0]


def test_layers_for_a_clip_image_are_harmless(weights: ModelWeights, tmp_path: Path) -> None:
    pairs = random_pairs(weights.shapes)
    count = len(pairs)
    for name in ("blocks.0.cross_attn.k_img", "blocks.1.cross_attn.v_img", "img_emb.proj.1"):
        pairs[name] = {"up": torch.zeros(2, 1), "down": torch.zeros(1, 2)}
    report = match_lora(write(tmp_path / "x.safetensors", pairs), weights.shapes).report
    assert (report.applied, report.total, report.harmless, report.unmatched) == (count, count, 3, ())


@pytest.mark.parametrize(
    ("extra", "says"),
    [
        ({"blocks.0.ffn.0.lora_up.weight": torch.ones(48, 2)}, "only its up half"),
        ({"blocks.0.ffn.0.dora_scale": torch.ones(48)}, "DoRA"),
        ({"blocks.0.ffn.0.lokr_w1": torch.ones(4, 4)}, "LoKr"),
        ({"blocks.0.ffn.0.diff_b": torch.ones(48), "model.blocks.0.ffn.0.diff_b": torch.ones(48)}, "twice"),
    ],
)
def test_broken_and_foreign_files_are_refused(weights: ModelWeights, tmp_path: Path, extra: Tensors, says: str) -> None:
    save_file({**extra, "blocks.1.ffn.0.diff_b": torch.ones(48)}, tmp_path / "x.safetensors")
    with pytest.raises(LoraError, match=says):
        match_lora(tmp_path / "x.safetensors", weights.shapes)


def test_nan_in_a_lora_is_refused(weights: ModelWeights, tmp_path: Path) -> None:
    pairs = random_pairs(weights.shapes)
    pairs["blocks.0.ffn.2"]["up"][0, 0] = float("nan")
    lora = match_lora(write(tmp_path / "x.safetensors", pairs), weights.shapes)
    with pytest.raises(LoraError, match="NaN"):
        merged(weights, lora)
