"""LoRAs: every dialect means the same weights, what does not fit is refused whole, going back gives the same bits."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import TinyModels
from safetensors.torch import save_file

from lightx2v.adapters import ExpertLoras, match_loras
from lightx2v.attention import resolve_attention
from lightx2v.components import Precision, expert_weights, load_expert
from lightx2v.config import resolve
from lightx2v.engine_config import EngineConfig
from lightx2v.errors import BadRequest, ConfigError, LoraError
from lightx2v.models.dit import WanDiT
from lightx2v.pipeline import LightX2VPipeline
from lightx2v.request import LoraSpec, Request
from lightx2v.weights.build import ModelWeights
from lightx2v.weights.checkpoint import open_checkpoint
from lightx2v.weights.locate import locate
from lightx2v.weights.lora import match_lora, noise_level, partner_of
from lightx2v.weights.naming import wan_names, wan_to_diffusers
from lightx2v.weights.quant import is_expert_matrix

RANK = 4
SMALL = {"height": 32, "width": 48, "frames": 5, "steps": 2, "text_len": 512}
Tensors = dict[str, torch.Tensor]


def base_weights(folder: Path) -> ModelWeights:
    checkpoint = open_checkpoint(folder / "high_noise_model")
    return ModelWeights(checkpoint, wan_names(checkpoint.shapes), matrix=is_expert_matrix)


@pytest.fixture(scope="module")
def weights(tiny: TinyModels) -> ModelWeights:
    return base_weights(tiny.t2v)


def linears(shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
    return [n.removesuffix(".weight") for n, s in shapes.items() if n.endswith(".weight") and len(s) == 2]


def random_pairs(shapes: Mapping[str, tuple[int, ...]], seed: int = 0, rank: int = RANK) -> dict[str, Tensors]:
    """{layer: {up, down}} for every matrix of the model."""
    g = torch.Generator().manual_seed(seed)
    return {
        stem: {
            "up": 0.2 * torch.randn(shapes[f"{stem}.weight"][0], rank, generator=g),
            "down": 0.2 * torch.randn(rank, shapes[f"{stem}.weight"][1], generator=g),
        }
        for stem in linears(shapes)
    }


def write(path: Path, pairs: dict[str, Tensors], dialect: str = "lightx2v", alpha: float | None = None) -> Path:
    tensors: Tensors = {}
    for stem, pair in pairs.items():
        name, (up, down) = DIALECTS[dialect](stem)
        tensors[name + up], tensors[name + down] = pair["up"], pair["down"]
        if alpha is not None:
            tensors[name + ".alpha"] = torch.tensor(alpha)
    save_file({k: v.clone() for k, v in tensors.items()}, path)
    return path


STANDARD = (".lora_up.weight", ".lora_down.weight")
PEFT = (".lora_B.weight", ".lora_A.weight")
DIALECTS = {
    "lightx2v": lambda s: (f"diffusion_model.{s}", STANDARD),
    "bare": lambda s: (s, STANDARD),
    "comfy": lambda s: (f"model.diffusion_model.{s}", STANDARD),
    "peft": lambda s: (f"base_model.model.{s}", PEFT),
    "peft-named": lambda s: (f"base_model.model.{s}", (".lora_B.default.weight", ".lora_A.default.weight")),
    "mochi": lambda s: (f"transformer.{s}", (".lora_B", ".lora_A")),
    "diffusers": lambda s: (f"transformer.{wan_to_diffusers(s)}", PEFT),
    "diffusers-v1": lambda s: (f"unet.{wan_to_diffusers(s)}", ("_lora.up.weight", "_lora.down.weight")),
    "diffusers-v3": lambda s: (f"unet.{wan_to_diffusers(s)}", (".lora.up.weight", ".lora.down.weight")),
    "transformers": lambda s: (s, (".lora_linear_layer.up.weight", ".lora_linear_layer.down.weight")),
    "kohya": lambda s: (f"lora_unet_{s.replace('.', '_')}", STANDARD),
    "kohya-double": lambda s: (f"lora_unet__{s.replace('.', '_')}", STANDARD),
    "kohya-diffusers": lambda s: (f"lora_transformer_{wan_to_diffusers(s).replace('.', '_')}", STANDARD),
}


def merged(weights: ModelWeights, *loras: object) -> Tensors:
    return dict(weights.with_loras(loras).tensors())  # type: ignore[arg-type]


def equal(a: Tensors, b: Tensors) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


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


def test_one_wrong_shape_refuses_the_whole_file(weights: ModelWeights, tmp_path: Path) -> None:
    pairs = random_pairs(weights.shapes)
    pairs["blocks.0.ffn.2"]["down"] = torch.zeros(RANK, 7)
    with pytest.raises(LoraError, match=r"blocks\.0\.ffn\.2\.weight has up \[24, 4\] and down \[4, 7\], the model"):
        match_lora(write(tmp_path / "x.safetensors", pairs), weights.shapes)


def test_a_partial_match_is_refused_unless_allowed(weights: ModelWeights, tmp_path: Path) -> None:
    pairs = random_pairs(weights.shapes)
    pairs["blocks.77.ffn.0"] = pairs["blocks.0.ffn.0"]
    path = write(tmp_path / "x.safetensors", pairs)
    with pytest.raises(LoraError, match=r"only in part.*blocks\.77"):
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


# ---- names ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "level"),
    [
        ("wan2.2_t2v_demo_high_noise_lora_rank16.safetensors", "high"),
        ("Wan2.2-Lightning_lora_LOW_fp16.safetensors", "low"),
        ("wan22-HighNoise-style.safetensors", "high"),
        ("highlights-follow-flow.safetensors", None),
        ("high_and_low.safetensors", None),
    ],
)
def test_the_name_tells_the_noise_level(name: str, level: str | None) -> None:
    assert noise_level(name) == level


@pytest.mark.parametrize(
    ("given", "partner"),
    [
        ("a_high_noise_lora.safetensors", "a_low_noise_lora.safetensors"),
        ("a_lora_LOW.safetensors", "a_lora_HIGH.safetensors"),
        ("LowNoise-b.safetensors", "HighNoise-b.safetensors"),
    ],
)
def test_one_file_of_a_pair_finds_the_other(tmp_path: Path, given: str, partner: str) -> None:
    (tmp_path / given).touch()
    assert partner_of(tmp_path / given) is None
    (tmp_path / partner).touch()
    assert partner_of(tmp_path / given) == tmp_path / partner
    assert partner_of(tmp_path / partner) == tmp_path / given


# ---- on an expert ---------------------------------------------------------------------------------------------------


def spec(path: Path, expert: str = "high", strength: float = 1.0) -> LoraSpec:
    return LoraSpec(expert=expert, path=str(path), strength=strength)  # type: ignore[arg-type]


def expert(folder: Path, *loras: LoraSpec, dynamic: bool = False) -> tuple[WanDiT, ExpertLoras]:
    config = EngineConfig(
        model_path=str(folder), device="cpu", dtype="fp32", lora_configs=loras, lora_dynamic_apply=dynamic
    )
    precision = Precision.of(config)
    choice = resolve_attention("torch_sdpa", precision.device, precision.compute)
    weights = expert_weights(locate(config), "high", config)
    found = match_loras(config.lora_configs, "high", weights, config)
    used = weights if ExpertLoras.dynamic(weights, config) else weights.with_loras(found)
    dit = load_expert(locate(config), used, precision, choice, choice)
    return dit, ExpertLoras(dit, "high", weights, found, config, precision.device)


def output(dit: WanDiT) -> torch.Tensor:
    g = torch.Generator().manual_seed(5)
    with torch.inference_mode():
        text = dit.encode_text(torch.randn(7, dit.config.text_dim, generator=g))
        (velocity,) = dit(torch.randn(dit.config.in_dim, 2, 4, 6, generator=g), 900.0, [text])
    return velocity


@pytest.fixture(scope="module")
def files(tiny: TinyModels, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two LoRAs over every matrix; the second changes small tensors too."""
    root, shapes = tmp_path_factory.mktemp("loras"), base_weights(tiny.t2v).shapes
    one = write(root / "one_high_noise.safetensors", random_pairs(shapes, 1), alpha=2.0)
    two = root / "two_high_noise.safetensors"
    tensors = {
        f"{n}{s}": p[k]
        for n, p in random_pairs(shapes, 2).items()
        for k, s in (("up", ".lora_up.weight"), ("down", ".lora_down.weight"))
    }
    tensors["blocks.0.diff_m"] = torch.full(shapes["blocks.0.modulation"], 0.1)
    tensors["blocks.1.ffn.0.diff_b"] = torch.full(shapes["blocks.1.ffn.0.bias"], 0.3)
    tensors["patch_embedding.diff"] = torch.full(shapes["patch_embedding.weight"], 0.02)
    tensors["blocks.1.ffn.2.diff"] = torch.full(shapes["blocks.1.ffn.2.weight"], 0.02)
    del tensors["blocks.1.ffn.2.lora_up.weight"], tensors["blocks.1.ffn.2.lora_down.weight"]
    save_file(tensors, two)
    return one, two


def test_dynamic_equals_merged(tiny: TinyModels, files: tuple[Path, Path]) -> None:
    loras = [spec(files[0]), spec(files[1], strength=-0.7)]
    base, together = output(expert(tiny.t2v)[0]), output(expert(tiny.t2v, *loras)[0])
    beside = output(expert(tiny.t2v, *loras, dynamic=True)[0])
    assert torch.allclose(beside, together, rtol=1e-5, atol=1e-5 * together.abs().max().item())
    assert (together - base).abs().max() > 0.1 * base.abs().max()


@pytest.mark.parametrize("dynamic", [False, True])
def test_twenty_switches_return_to_the_same_bits(tiny: TinyModels, files: tuple[Path, Path], dynamic: bool) -> None:
    dit, loras = expert(tiny.t2v, dynamic=dynamic)
    state = {name: tensor.clone() for name, tensor in dit.state_dict().items()}
    base = output(dit)
    one, two = [spec(files[0])], [spec(files[1], strength=0.5), spec(files[0], strength=-1.0)]
    seen: dict[int, torch.Tensor] = {}
    for turn in range(20):
        loras.use((one, two)[turn % 2])
        assert torch.equal(seen.setdefault(turn % 2, output(dit)), output(dit))
    loras.use([])
    assert equal(dict(dit.state_dict()), state) and torch.equal(output(dit), base)
    fresh, _ = expert(tiny.t2v, *one, dynamic=dynamic)
    assert torch.equal(output(fresh), seen[0])


@pytest.mark.parametrize("dynamic", [False, True])
def test_a_lora_that_does_not_fit_leaves_the_old_one_on(
    tiny: TinyModels, files: tuple[Path, Path], tmp_path: Path, dynamic: bool
) -> None:
    dit, loras = expert(tiny.t2v, spec(files[0]), dynamic=dynamic)
    before = output(dit)
    pairs = random_pairs(base_weights(tiny.t2v).shapes, 3)
    pairs["head.head"]["up"][0, 0] = float("inf")
    bad = write(tmp_path / "bad.safetensors", pairs)
    with pytest.raises(LoraError, match="infinity"):
        loras.use([spec(bad)])
    assert torch.equal(output(dit), before)
    assert [a.report.path for a in loras.applied] == [f"…/{files[0].parent.name}/{files[0].name}"]


def test_a_missing_file_says_where_it_was_looked_for(tiny: TinyModels) -> None:
    with pytest.raises(LoraError, match="There is no LoRA none.safetensors"):
        expert(tiny.t2v, LoraSpec(expert="high", path="none.safetensors"))


# ---- in the pipeline ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def loaded(tiny: TinyModels) -> Iterator[tuple[LightX2VPipeline, Request]]:
    resolved = resolve({"model_path": str(tiny.t2v), "device": "cpu"}, SMALL)
    with LightX2VPipeline.from_config(resolved.engine) as pipe:
        yield pipe, Request(prompt="a red ball", **(dict(resolved.request) | {"seed": 3}))


def latents(pipe: LightX2VPipeline, request: Request) -> torch.Tensor:
    result = pipe.run(request, return_latents=True)
    assert result.latents is not None
    return result.latents


def test_each_request_brings_its_loras(
    loaded: tuple[LightX2VPipeline, Request], tiny: TinyModels, files: tuple[Path, Path]
) -> None:
    pipe, request = loaded
    plain = latents(pipe, request)
    with_one = replace(request, loras=(spec(files[0]),))
    result = pipe.run(with_one, return_latents=True)
    assert result.latents is not None and not torch.equal(result.latents, plain)
    assert [(r["expert"], r["applied"], r["total"]) for r in result.report()["loras"]] == [("high", 26, 26)]
    low = latents(pipe, replace(request, loras=(spec(files[0], "low"),)))
    assert not torch.equal(low, result.latents) and not torch.equal(low, plain)
    assert torch.equal(latents(pipe, request), plain)
    config = resolve({"model_path": str(tiny.t2v), "device": "cpu"}, SMALL | {"lora_configs": [spec(files[0])]})
    with LightX2VPipeline.from_config(config.engine) as fresh:
        assert torch.equal(latents(fresh, request), result.latents)


def test_a_file_of_the_other_expert_is_used_with_a_warning(
    loaded: tuple[LightX2VPipeline, Request], files: tuple[Path, Path]
) -> None:
    pipe, request = loaded
    report = pipe.run(replace(request, loras=(spec(files[0], "low"),))).report()
    assert any("low-noise expert; by its name it is for the high-noise one" in text for text in report["warnings"])


def test_a_request_with_a_bad_lora_changes_neither_expert(
    loaded: tuple[LightX2VPipeline, Request], files: tuple[Path, Path], tmp_path: Path
) -> None:
    pipe, request = loaded
    plain = latents(pipe, request)
    with pytest.raises(LoraError):
        pipe.run(replace(request, loras=(spec(files[0]), spec(tmp_path / "missing.safetensors", "low"))))
    assert pipe._engine is not None and not pipe._engine.placement.loras
    assert torch.equal(latents(pipe, request), plain)


def test_switch_lora_is_for_the_requests_that_follow(
    loaded: tuple[LightX2VPipeline, Request], files: tuple[Path, Path]
) -> None:
    pipe, request = loaded
    plain = latents(pipe, request)
    pipe.switch_lora([{"name": "high_noise_model", "path": str(files[0]), "strength": 1.0}])
    assert not torch.equal(latents(pipe, request), plain)
    assert torch.equal(latents(pipe, replace(request, loras=())), plain)
    pipe.switch_lora([])
    assert torch.equal(latents(pipe, request), plain)


def test_merging_into_quantised_weights_needs_the_dynamic_way(files: tuple[Path, Path]) -> None:
    with pytest.raises(ConfigError, match="lora_dynamic_apply"):
        EngineConfig(dit_quantized=True, dit_quant_scheme="fp8-sgl", lora_configs=(spec(files[0]),))
