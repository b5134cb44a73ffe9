"""LoRAs: every dialect means the same weights, what does not fit is refused whole, going back gives the same bits."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TinyModels
from lora_files import DIALECTS, RANK, Tensors, base_weights, equal, random_pairs, write
from safetensors.torch import load_file, save_file

from lightx2v.config.lora_spec import LoraSpec
from lightx2v.errors import BadRequest, LoraError
from lightx2v.weights.checkpoint import open_checkpoint
from lightx2v.weights.dit_names import wan_to_diffusers
from lightx2v.weights.lora import add_loras
from lightx2v.weights.lora_match import match_lora
from lightx2v.weights.model_weights import ModelWeights


@pytest.fixture(scope="module")
def weights(tiny: TinyModels) -> ModelWeights:
    return base_weights(tiny.t2v)


def merged(weights: ModelWeights, *loras: object) -> Tensors:
    return dict(weights.with_loras(loras).tensors())  # type: ignore[arg-type]


@pytest.mark.slow
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


def test_an_alpha_without_a_change_is_said_or_refused(weights: ModelWeights, tmp_path: Path) -> None:
    path, change = tmp_path / "x.safetensors", {"blocks.1.ffn.0.diff_b": torch.ones(48)}
    save_file({**change, "blocks.0.ffn.0.alpha": torch.tensor(8.0)}, path)
    assert match_lora(path, weights.shapes).report.notes == (
        "1 alphas are of layers that do not change, and are left out.",
    )
    save_file({**change, "blocks.0.ffn.0.other.alpha": torch.tensor(8.0)}, path)
    with pytest.raises(LoraError, match=r"1 have none \(blocks\.0\.ffn\.0\.other\.alpha\)"):
        match_lora(path, weights.shapes)


@pytest.mark.parametrize(
    ("extra", "says"),
    [
        ({"blocks.0.ffn.0.lora_up.weight": torch.ones(48, 2)}, "only its up half"),
        ({"blocks.0.ffn.0.dora_scale": torch.ones(48)}, "DoRA"),
        ({"blocks.0.ffn.0.lokr_w1": torch.ones(4, 4)}, "LoKr with lokr_w1 only"),
        ({"blocks.0.ffn.0.oft_blocks": torch.ones(4, 4)}, "belongs to OFT"),
        ({"blocks.0.ffn.0.a1.weight": torch.ones(4, 4)}, "belongs to GLoRA"),
        ({"blocks.0.ffn.0.reshape_weight": torch.ones(2)}, "reshape_weight, whose meaning is not known"),
        ({"blocks.0.ffn.0.lora_A.weight_scale": torch.ones(1)}, "weight_scale, whose meaning is not known"),
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


# ---- LoKr, LoHa, DoRA and the other forms --------------------------------------------------------------------------

NAME = "blocks.1.ffn.0.weight"  # [48, 24]
STEM = NAME.removesuffix(".weight")


def values(*shape: int, seed: int = 0) -> torch.Tensor:
    return 0.3 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def float64(tensor: torch.Tensor) -> np.ndarray:
    return tensor.numpy().astype(np.float64)


def lokr(w: np.ndarray) -> tuple[Tensors, np.ndarray]:
    parts = {"lokr_w1": values(4, 4), "lokr_w2": values(12, 6)}
    return parts | {"alpha": torch.tensor(9.0)}, np.kron(float64(parts["lokr_w1"]), float64(parts["lokr_w2"]))


def lokr_low_rank(w: np.ndarray) -> tuple[Tensors, np.ndarray]:
    parts = {
        "lokr_w1_a": values(4, 2),
        "lokr_w1_b": values(2, 4),
        "lokr_w2_a": values(12, 2),
        "lokr_w2_b": values(2, 6),
    }
    a, b, c, d = map(float64, parts.values())
    return parts | {"alpha": torch.tensor(3.0)}, 3 / 2 * np.kron(a @ b, c @ d)


def loha(w: np.ndarray) -> tuple[Tensors, np.ndarray]:
    parts = {f"hada_w{i}_{s}": values(*shape, seed=i) for i in (1, 2) for s, shape in (("a", (48, 3)), ("b", (3, 24)))}
    a, b, c, d = map(float64, parts.values())
    return parts | {"alpha": torch.tensor(6.0)}, 6 / 3 * (a @ b) * (c @ d)


def pair(alpha: float = 8.0) -> tuple[Tensors, np.ndarray]:
    parts = {"lora_up.weight": values(48, 4), "lora_down.weight": values(4, 24)}
    return parts | {"alpha": torch.tensor(alpha)}, alpha / 4 * float64(parts["lora_up.weight"]) @ float64(
        parts["lora_down.weight"]
    )


def dora(key: str, shape: tuple[int, ...], axis: int) -> Callable[[np.ndarray], tuple[Tensors, np.ndarray]]:
    def make(w: np.ndarray) -> tuple[Tensors, np.ndarray]:
        parts, delta = pair()
        magnitude = values(*shape).abs() + 0.5
        total = w + delta
        size = np.linalg.norm(total, axis=axis, keepdims=True)
        wanted = float64(magnitude).reshape(size.shape) * total / size
        return parts | {key: magnitude}, wanted - w

    return make


def dora_on_lokr(w: np.ndarray) -> tuple[Tensors, np.ndarray]:
    parts, delta = lokr(w)
    magnitude = values(48, 1).abs() + 0.5
    total = w + delta
    return parts | {"dora_scale": magnitude}, float64(magnitude) * total / np.linalg.norm(
        total, axis=1, keepdims=True
    ) - w


FORMS = {
    "LoKr": lokr,
    "LoKr of low rank": lokr_low_rank,
    "LoHa": loha,
    "DoRA of LyCORIS, per input": dora("dora_scale", (1, 24), 0),
    "DoRA of LyCORIS, per output": dora("dora_scale", (48, 1), 1),
    "DoRA of PEFT": dora("lora_magnitude_vector", (48,), 1),
    "DoRA of PEFT, an older key": dora("lora_magnitude_vector.weight", (48,), 1),
    "DoRA of a named adapter": dora("lora_magnitude_vector.default.weight", (48,), 1),
    "DoRA of ai-toolkit": dora("magnitude", (48,), 1),
    "DoRA on LoKr": dora_on_lokr,
}


@pytest.mark.slow
@pytest.mark.parametrize("strength", [1.0, -0.6])
@pytest.mark.parametrize("prefix", [f"diffusion_model.{STEM}", f"lycoris_{wan_to_diffusers(STEM).replace('.', '_')}"])
@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_its_formula_in_float64(
    weights: ModelWeights, tmp_path: Path, form: str, prefix: str, strength: float
) -> None:
    base = merged(weights)[NAME]
    parts, delta = FORMS[form](float64(base))
    save_file({f"{prefix}.{key}": part for key, part in parts.items()}, tmp_path / "x.safetensors")
    lora = match_lora(tmp_path / "x.safetensors", weights.plain_shapes, strength=strength)
    got = float64(merged(weights, lora)[NAME])
    assert np.abs(got - (float64(base) + strength * delta)).max() < 2e-6 < 0.1 < np.abs(delta).max()


def test_rows_of_every_form_may_be_added_in_parts(weights: ModelWeights, tmp_path: Path) -> None:
    """A CPU adds 256 rows at a time."""
    wide = values(600, 24)
    for form in (lokr_low_rank, loha, dora("dora_scale", (1, 24), 0), dora("magnitude", (48,), 1)):
        parts, _ = form(float64(wide[:48]))
        rows = {48: 600, 12: 150}
        parts = {
            k: values(rows.get(len(p), len(p)), *p.shape[1:]) if p.dim() and "scale" not in k else p
            for k, p in parts.items()
        }
        save_file({f"{STEM}.{key}": part for key, part in parts.items()}, tmp_path / "x.safetensors")
        lora = match_lora(tmp_path / "x.safetensors", {NAME: (600, 24)})
        whole = add_loras(wide.double(), NAME, [lora], torch.float64)
        delta = lora.delta(NAME, "cpu", torch.float64)
        delta.measure(lambda start: wide.double(), (600, 24), 600)
        at_once = wide.double().clone()
        delta.add_to(at_once, 0, wide.double())
        assert torch.allclose(whole, at_once, atol=1e-12)


def test_the_weights_of_a_convolution_take_every_form(weights: ModelWeights, tmp_path: Path) -> None:
    name, base = "patch_embedding.weight", merged(weights)["patch_embedding.weight"]
    assert base.shape == (24, 16, 1, 2, 2)
    parts = {
        "lokr_w1": values(4, 4),
        "lokr_w2_a": values(2, 6),
        "lokr_w2_b": values(2, 4),
        "lokr_t2": values(2, 2, 1, 2, 2),
    }
    core = np.einsum("ijxyz,jr,ip->prxyz", *(float64(parts[key]) for key in ("lokr_t2", "lokr_w2_b", "lokr_w2_a")))
    want = 0.5 * np.kron(float64(parts["lokr_w1"])[:, :, None, None, None], core)
    save_file(
        {f"patch_embedding.{k}": p for k, p in parts.items()} | {"patch_embedding.alpha": torch.tensor(1.0)},
        tmp_path / "k.safetensors",
    )
    got = merged(weights, match_lora(tmp_path / "k.safetensors", weights.plain_shapes))[name]
    assert np.abs(float64(got) - float64(base) - want).max() < 1e-6
    sides = {f"hada_w{i}_{s}": values(2, n, seed=i) for i in (1, 2) for s, n in (("a", 24), ("b", 16))}
    sides |= {f"hada_t{i}": values(2, 2, 1, 2, 2, seed=i) for i in (1, 2)}
    one, two = (
        np.einsum("ijxyz,jr,ip->prxyz", *(float64(sides[f"hada_{key}"]) for key in (f"t{i}", f"w{i}_b", f"w{i}_a")))
        for i in (1, 2)
    )
    save_file({f"patch_embedding.{key}": part for key, part in sides.items()}, tmp_path / "h.safetensors")
    got = merged(weights, match_lora(tmp_path / "h.safetensors", weights.plain_shapes))[name]
    assert np.abs(float64(got) - float64(base) - one * two).max() < 1e-6


def test_a_bias_of_lora_b_has_the_pairs_scale_and_norms_are_differences(weights: ModelWeights, tmp_path: Path) -> None:
    tensors = {
        f"{STEM}.lora_A.weight": values(4, 24),
        f"{STEM}.lora_B.weight": values(48, 4),
        f"{STEM}.lora_B.bias": values(48),
        f"{STEM}.alpha": torch.tensor(8.0),
        "lycoris_blocks_1_norm2.w_norm": values(24),
        "lycoris_blocks_1_norm2.b_norm": values(24, seed=1),
    }
    save_file(tensors, tmp_path / "x.safetensors")
    base = merged(weights)
    got = merged(weights, match_lora(tmp_path / "x.safetensors", weights.plain_shapes, strength=0.5))
    for name, delta in (
        (f"{STEM}.bias", 0.5 * 2 * values(48)),
        ("blocks.1.norm3.weight", 0.5 * values(24)),
        ("blocks.1.norm3.bias", 0.5 * values(24, seed=1)),
    ):
        assert torch.allclose(got[name], base[name] + delta, atol=1e-6), name


@pytest.mark.parametrize("form", ["pair", "flat pair", "difference"])
def test_a_patch_embedding_for_text_to_video_leaves_the_images_channels(
    tiny: TinyModels, tmp_path: Path, form: str
) -> None:
    weights = base_weights(tiny.i2v)
    up, down = values(24, 2, 1, 1, 1), values(2, 16, 1, 2, 2)
    delta = torch.einsum("or,r...->o...", up.flatten(1), down)
    keys = {"lora_up.weight": up, "lora_down.weight": down if form == "pair" else down.flatten(1)}
    keys = {"diff": delta} if form == "difference" else keys
    save_file({f"patch_embedding.{key}": part for key, part in keys.items()}, tmp_path / "x.safetensors")
    lora = match_lora(tmp_path / "x.safetensors", weights.plain_shapes)
    assert any("is for 16 input channels" in note for note in lora.report.notes)
    base, got = merged(weights)["patch_embedding.weight"], merged(weights, lora)["patch_embedding.weight"]
    assert got.shape == (24, 36, 1, 2, 2) and torch.equal(got[:, 16:], base[:, 16:])
    assert torch.allclose(got[:, :16], base[:, :16] + delta, atol=1e-6)


def test_a_patch_embedding_that_does_not_fit_may_be_left_out(tiny: TinyModels, tmp_path: Path) -> None:
    weights = base_weights(tiny.t2v)
    tensors = {"patch_embedding.diff": values(24, 36, 1, 2, 2), "blocks.0.ffn.0.diff_b": values(48)}
    save_file(tensors, tmp_path / "x.safetensors")
    with pytest.raises(LoraError, match="other sizes"):
        match_lora(tmp_path / "x.safetensors", weights.plain_shapes)
    report = match_lora(tmp_path / "x.safetensors", weights.plain_shapes, allow_partial=True).report
    assert (report.applied, report.unmatched) == (1, ("patch_embedding.diff",))


@pytest.mark.parametrize("alpha", [None, 8.0])
def test_a_rank_of_zero_is_refused(weights: ModelWeights, tmp_path: Path, alpha: float | None) -> None:
    pairs = {STEM: {"up": torch.ones(48, 0), "down": torch.ones(0, 24)}}
    with pytest.raises(LoraError, match=r"has rank 0"):
        match_lora(write(tmp_path / "x.safetensors", pairs, alpha=alpha), weights.plain_shapes)


@pytest.mark.parametrize(
    "parts",
    [
        {"lokr_w1": values(5, 4), "lokr_w2": values(12, 6)},
        {"lokr_w1": values(4, 4), "lokr_w2_a": values(12, 2), "lokr_w2_b": values(3, 6)},
        {
            "hada_w1_a": values(48, 3),
            "hada_w1_b": values(3, 24),
            "hada_w2_a": values(48, 3),
            "hada_w2_b": values(3, 23),
        },
        {"lora_up.weight": values(48, 4), "lora_down.weight": values(4, 24), "dora_scale": values(23)},
        {"lora_up.weight": values(48, 4), "lora_down.weight": values(4, 24), "magnitude": values(1, 24)},
    ],
)
def test_factors_that_do_not_fit_are_refused_with_their_shapes(
    weights: ModelWeights, tmp_path: Path, parts: Tensors
) -> None:
    save_file({f"{STEM}.{key}": part for key, part in parts.items()}, tmp_path / "x.safetensors")
    with pytest.raises(LoraError, match=r"1 of its layers have other sizes.*blocks\.1\.ffn\.0\.weight has .*the model"):
        match_lora(tmp_path / "x.safetensors", weights.plain_shapes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_sum_that_overflows_is_an_error(weights: ModelWeights, tmp_path: Path, dtype: torch.dtype) -> None:
    huge = 1e30 if dtype is torch.float32 else 1e3
    pairs = {STEM: {"up": torch.full((48, 4), huge), "down": torch.full((4, 24), huge)}}
    lora = match_lora(write(tmp_path / "x.safetensors", pairs), weights.plain_shapes)
    with pytest.raises(LoraError, match=r"blocks\.1\.ffn\.0\.weight becomes NaN or infinite with .*Lower the strength"):
        dict(weights.with_loras([lora]).tensors(dtype_of=lambda _: dtype))


HALVES = [("transformer", "transformer_2"), ("pipe.dit", "pipe.dit2"), ("high_noise_model", "low_noise_model")]


@pytest.mark.parametrize("prefixes", HALVES)
def test_a_file_with_both_halves_gives_each_expert_its_own(
    weights: ModelWeights, tmp_path: Path, prefixes: tuple[str, str]
) -> None:
    halves = [random_pairs(weights.shapes, seed) for seed in (1, 2)]
    tensors = {
        f"{prefix}.{stem}.lora_{key}.weight": half[stem][part]
        for prefix, half in zip(prefixes, halves, strict=True)
        for stem in half
        for key, part in (("A", "down"), ("B", "up"))
    }
    save_file(tensors, tmp_path / "x.safetensors")
    for expert, half in (("high", halves[0]), ("low", halves[1])):
        lora = match_lora(tmp_path / "x.safetensors", weights.plain_shapes, expert=expert)  # type: ignore[arg-type]
        alone = match_lora(write(tmp_path / f"{expert}.safetensors", half), weights.plain_shapes)
        assert equal(merged(weights, lora), merged(weights, alone))
    with pytest.raises(LoraError, match="a half for each expert"):
        match_lora(tmp_path / "x.safetensors", weights.plain_shapes)


def test_a_file_without_tensors_says_so(weights: ModelWeights, tmp_path: Path) -> None:
    save_file({}, tmp_path / "empty.safetensors")
    with pytest.raises(LoraError, match=r"empty\.safetensors holds no tensors.*get it again"):
        match_lora(tmp_path / "empty.safetensors", weights.plain_shapes)


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int32])
def test_whole_numbers_are_no_weights(weights: ModelWeights, tmp_path: Path, dtype: torch.dtype) -> None:
    path = write(tmp_path / "a.safetensors", random_pairs(weights.shapes))
    tensors = {name: (tensor * 100).to(dtype) for name, tensor in load_file(path).items()}
    save_file(tensors, path)
    name = str(dtype).removeprefix("torch.")
    with pytest.raises(LoraError, match=rf"a\.safetensors: \S+ is stored in {name}.*expected floats"):
        match_lora(path, weights.plain_shapes)


@pytest.mark.parametrize("how", ["alpha", "values", "difference"])
def test_a_change_beyond_all_weights_is_refused_by_the_loras_name(
    weights: ModelWeights, tmp_path: Path, how: str
) -> None:
    pairs = random_pairs(weights.shapes)
    path = tmp_path / "a.safetensors"
    if how == "difference":
        save_file(
            {"diffusion_model.blocks.0.ffn.0.diff": torch.full(weights.shapes["blocks.0.ffn.0.weight"], 1e30)}, path
        )
    else:
        write(path, pairs, alpha=3e38 if how == "alpha" else None)
    if how == "values":
        save_file({name: tensor * 1e30 for name, tensor in load_file(path).items()}, path)
    lora = match_lora(path, weights.plain_shapes)
    with pytest.raises(
        LoraError, match=r"(a\.safetensors changes \S+ by about|becomes NaN or infinite with \S+/a\.safetensors)"
    ):
        merged(weights, lora)
