"""LoRAs on a loaded model: merged equals dynamic, going back gives the same bits, mix-ups are errors, halves pair."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TinyModels
from lora_files import base_weights, equal, random_pairs, spec, write
from safetensors.torch import save_file
from tiny_runs import latents
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lightx2v.attention import resolve_attention
from lightx2v.config.engine_config import EngineConfig
from lightx2v.config.lora_spec import LoraSpec
from lightx2v.config.presets import resolve
from lightx2v.config.request import Request
from lightx2v.errors import ConfigError, LoraError
from lightx2v.loading.expert_loras import ExpertLoras, match_loras
from lightx2v.loading.lora_experts import partner_of
from lightx2v.loading.model_files import locate
from lightx2v.loading.networks import Precision, expert_weights, load_expert
from lightx2v.models.dit import WanDiT
from lightx2v.pipeline import LightX2VPipeline
from lightx2v.weights.lora_match import match_lora

SMALL = {"height": 32, "width": 48, "frames": 5, "steps": 2, "text_len": 512}


# ---- on an expert ---------------------------------------------------------------------------------------------------


def expert(folder: Path, *loras: LoraSpec, dynamic: bool = False) -> tuple[WanDiT, ExpertLoras]:
    config = EngineConfig(
        model_path=str(folder), device="cpu", dtype="fp32", lora_configs=loras, lora_dynamic_apply=dynamic
    )
    precision = Precision.of(config)
    choice = resolve_attention("torch_sdpa", precision.device, precision.compute)
    weights = expert_weights(locate(config), "high", config)
    found = match_loras(config.lora_configs, "high", weights, config)
    used = weights if ExpertLoras.dynamic(weights, config, found) else weights.with_loras(found)
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
    one = write(root / "one.safetensors", random_pairs(shapes, 1), alpha=2.0)
    two = root / "two.safetensors"
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


class InFloat64(TorchFunctionMode):
    """Wherever the model asks for float32 it gets float64."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        wide = lambda value: torch.float64 if value is torch.float32 else value  # noqa: E731
        func = Tensor.double if func is Tensor.float else func
        return func(*map(wide, args), **{key: wide(value) for key, value in (kwargs or {}).items()})


def error(got: Tensor, exact: Tensor) -> float:
    """The largest difference, as a share of the largest value."""
    return ((got.double() - exact).abs().max() / exact.abs().max()).item()


@pytest.mark.parametrize("dynamic", [False, True], ids=["merged", "dynamic"])
def test_merged_and_dynamic_loras_are_the_float64_model(
    tiny: TinyModels, files: tuple[Path, Path], dynamic: bool
) -> None:
    """Each linear layer, and a whole forward. Without any LoRA float32 is as far from float64: 3e-7."""
    base, _ = expert(tiny.t2v)
    plain = output(base)
    exact = base.double()
    for path, strength in ((files[0], 1.0), (files[1], -0.7)):
        lora = match_lora(path, base_weights(tiny.t2v).plain_shapes, strength=strength)
        for name in lora.patches:
            lora.delta(name, "cpu", torch.float64).add_to(exact.get_parameter(name).data)
    dit, _ = expert(tiny.t2v, spec(files[0]), spec(files[1], strength=-0.7), dynamic=dynamic)
    layers = [name for name, module in exact.named_modules() if isinstance(module, nn.Linear)]
    assert len(layers) == 26
    for name in layers:
        layer = exact.get_submodule(name)
        x = torch.randn(64, layer.in_features, generator=torch.Generator().manual_seed(1))
        with torch.inference_mode():
            assert error(dit.get_submodule(name)(x), layer(x.double())) <= 1e-6, name
    with InFloat64():
        wanted = output(exact)
    assert wanted.dtype == torch.float64 and error(output(dit), wanted) <= 1e-6
    assert error(plain, wanted) > 0.1


@pytest.mark.slow
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


@pytest.mark.parametrize("others", [(), ("two",)], ids=["alone", "beside a fixed one"])
def test_a_strength_for_each_phase_is_the_float64_model_in_each(
    tiny: TinyModels, files: tuple[Path, Path], others: tuple[str, ...]
) -> None:
    """Also of a LoRA with changes of biases, norms and modulation; nothing is read again."""
    strengths = (0.0, 1.0, -0.5)
    fixed = [spec(files[0], strength=0.3)] if others else []
    dit, loras = expert(tiny.t2v, replace(spec(files[1]), strength=strengths), *fixed)
    for phase in (0, 1, 2, 1, 0):
        loras.select(phase)
        exact = expert(tiny.t2v)[0].double()
        for path, strength in ((files[1], strengths[phase]), *[(files[0], 0.3) for _ in fixed]):
            lora = match_lora(path, base_weights(tiny.t2v).plain_shapes, strength=strength)
            for name in lora.patches:
                lora.delta(name, "cpu", torch.float64).add_to(exact.get_parameter(name).data)
        with InFloat64():
            wanted = output(exact)
        assert error(output(dit), wanted) <= 1e-6


def test_at_strength_zero_and_one_of_a_phase_the_bits_are_those_without_and_with_the_lora(
    tiny: TinyModels, files: tuple[Path, Path]
) -> None:
    dit, loras = expert(tiny.t2v, replace(spec(files[1]), strength=(0.0, 1.0)))
    assert torch.equal(output(dit), output(expert(tiny.t2v)[0]))
    loras.select(1)
    assert torch.equal(output(dit), output(expert(tiny.t2v, spec(files[1]), dynamic=True)[0]))


@pytest.mark.parametrize("dynamic", [False, True])
def test_changing_strengths_come_and_go_like_other_loras(
    tiny: TinyModels, files: tuple[Path, Path], tmp_path: Path, dynamic: bool
) -> None:
    dit, loras = expert(tiny.t2v, spec(files[0]), dynamic=dynamic)
    before, changing = output(dit), replace(spec(files[1]), strength=(1.0, 0.0))
    for _ in range(2):
        loras.use([changing])
        loras.select(1)
        with pytest.raises(LoraError):
            loras.use([unusable(tiny, tmp_path)])
        loras.select(1)
        assert torch.equal(output(dit), output(expert(tiny.t2v)[0])), "the old one is still on, at strength 0"
        loras.select(0)
        assert torch.equal(output(dit), output(expert(tiny.t2v, spec(files[1]), dynamic=True)[0]))
        loras.use([spec(files[0])])
        loras.select(1)
        assert torch.equal(output(dit), before)


def test_a_lora_that_is_merged_keeps_one_strength(tiny: TinyModels, tmp_path: Path) -> None:
    shape = base_weights(tiny.t2v).shapes["blocks.0.ffn.0.weight"]
    sides = {f"hada_w{i}_{side}": torch.ones(shape[0], 2) if side == "a" else torch.ones(2, shape[1])
             for i in (1, 2) for side in "ab"}  # fmt: skip
    save_file({f"blocks.0.ffn.0.{name}": part for name, part in sides.items()}, tmp_path / "loha.safetensors")
    with pytest.raises(LoraError, match=r"is merged and so has one strength; got 0, 1 for the phases"):
        expert(tiny.t2v, replace(spec(tmp_path / "loha.safetensors"), strength=(0.0, 1.0)))
    expert(tiny.t2v, replace(spec(tmp_path / "loha.safetensors"), strength=(0.5, 0.5)))


def unusable(tiny: TinyModels, folder: Path) -> LoraSpec:
    """A LoRA that fits, with an infinite number in its last layer."""
    pairs = random_pairs(base_weights(tiny.t2v).shapes, 3)
    pairs["head.head"]["up"][0, 0] = float("inf")
    return spec(write(folder / "bad.safetensors", pairs))


@pytest.mark.parametrize("dynamic", [False, True])
def test_a_lora_that_does_not_fit_leaves_the_old_one_on(
    tiny: TinyModels, files: tuple[Path, Path], tmp_path: Path, dynamic: bool
) -> None:
    dit, loras = expert(tiny.t2v, spec(files[0]), dynamic=dynamic)
    before = output(dit)
    with pytest.raises(LoraError, match="infinity"):
        loras.use([unusable(tiny, tmp_path)])
    assert torch.equal(output(dit), before)
    assert [a.report.path for a in loras.applied] == [f"…/{files[0].parent.name}/{files[0].name}"]


def test_a_missing_file_says_where_it_was_looked_for(tiny: TinyModels) -> None:
    with pytest.raises(LoraError, match="There is no LoRA none.safetensors"):
        expert(tiny.t2v, LoraSpec(expert="high", path="none.safetensors"))


# ---- LoKr, LoHa and DoRA beside the weights ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def mixed(tiny: TinyModels, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoKr, a LoHa and two DoRAs, on one layer each, and a plain pair on a layer with one of the DoRAs in `files`."""
    g = torch.Generator().manual_seed(9)
    rnd = lambda *shape: 0.3 * torch.randn(*shape, generator=g)  # noqa: E731
    one = {"lokr_w1": rnd(4, 4), "lokr_w2_a": rnd(12, 2), "lokr_w2_b": rnd(2, 6), "alpha": torch.tensor(3.0)}
    two = {f"hada_w{i}_{s}": rnd(*shape) for i in (1, 2) for s, shape in (("a", (48, 3)), ("b", (3, 24)))}
    pair = {"lora_up.weight": rnd(24, 4), "lora_down.weight": rnd(4, 24)}
    layers = {
        "blocks.0.ffn.0": one,
        "blocks.1.ffn.0": two,
        "blocks.0.self_attn.q": pair | {"dora_scale": rnd(1, 24).abs() + 1},
        "blocks.1.cross_attn.o": pair | {"magnitude": rnd(24).abs() + 1},
    }
    path = tmp_path_factory.mktemp("mixed") / "mixed.safetensors"
    save_file({f"{stem}.{key}": part.clone() for stem, parts in layers.items() for key, part in parts.items()}, path)
    return path


def test_lokr_runs_beside_the_weights_and_the_rest_is_merged(
    tiny: TinyModels, files: tuple[Path, Path], mixed: Path
) -> None:
    loras = (spec(mixed, strength=0.7), spec(files[0], strength=0.5))
    beside, state = expert(tiny.t2v, *loras, dynamic=True)
    merged, _ = expert(tiny.t2v, *loras)
    plain, _ = expert(tiny.t2v)
    assert (
        0 < error(output(beside), output(merged).double()) <= 1e-6 < 0.1 < error(output(plain), output(merged).double())
    )
    changed = {
        name for name, tensor in beside.state_dict().items() if not torch.equal(tensor, plain.get_parameter(name))
    }
    assert changed == {f"blocks.{name}.weight" for name in ("1.ffn.0", "0.self_attn.q", "1.cross_attn.o")}
    for turn in (loras[1:], loras, ()):
        state.use(turn)
        fresh, _ = expert(tiny.t2v, *turn, dynamic=True)
        assert torch.equal(output(beside), output(fresh)) and equal(dict(beside.state_dict()), dict(fresh.state_dict()))


def test_a_lora_that_fails_beside_merged_ones_leaves_all_as_it_was(
    tiny: TinyModels, mixed: Path, files: tuple[Path, Path], tmp_path: Path
) -> None:
    dit, loras = expert(tiny.t2v, spec(mixed), dynamic=True)
    before = output(dit)
    with pytest.raises(LoraError, match="infinity"):
        loras.use([unusable(tiny, tmp_path)])
    assert torch.equal(output(dit), before)
    loras.use([])
    assert torch.equal(output(dit), output(expert(tiny.t2v)[0]))


def test_a_change_that_overflows_beside_the_weights_is_an_error(tiny: TinyModels, tmp_path: Path) -> None:
    pairs = {"blocks.0.ffn.0": {"up": torch.full((48, 4), 1e38), "down": torch.full((4, 24), 1.0)}}
    with pytest.raises(LoraError, match=r"the change of blocks\.0\.ffn\.0\.weight, in float32, holds NaN or infinity"):
        expert(tiny.t2v, spec(write(tmp_path / "x.safetensors", pairs), strength=90.0), dynamic=True)


@pytest.mark.parametrize("huge", [1e30, 1e10])
def test_a_change_beyond_all_weights_beside_them_is_refused_by_the_loras_name(
    tiny: TinyModels, tmp_path: Path, huge: float
) -> None:
    pairs = {"blocks.0.ffn.0": {"up": torch.full((48, 4), huge), "down": torch.full((4, 24), huge)}}
    with pytest.raises(
        LoraError, match=r"x\.safetensors changes blocks\.0\.ffn\.0\.weight by about .*Lower the strength"
    ):
        expert(tiny.t2v, spec(write(tmp_path / "x.safetensors", pairs)), dynamic=True)


@pytest.mark.parametrize("dynamic", [False, True])
def test_what_changes_nothing_is_said(tiny: TinyModels, tmp_path: Path, dynamic: bool) -> None:
    pairs = random_pairs(base_weights(tiny.t2v).shapes)
    for pair in list(pairs.values())[:-1]:
        pair["up"].zero_()
    _, loras = expert(tiny.t2v, spec(write(tmp_path / "x.safetensors", pairs)), dynamic=dynamic)
    assert "25 of its 26 changes are zero" in loras.applied[0].report.warnings[-1]
    for pair in pairs.values():
        pair["up"].zero_()
    _, loras = expert(tiny.t2v, spec(write(tmp_path / "x.safetensors", pairs)), dynamic=dynamic)
    assert "changes nothing: all of its 26 changes are zero" in loras.applied[0].report.warnings[-1]
    _, loras = expert(tiny.t2v, spec(tmp_path / "x.safetensors", strength=0.0), dynamic=dynamic)
    assert "has strength 0 and changes nothing" in loras.applied[0].report.warnings[-1]


# ---- pairs ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "partner"),
    [
        ("a_high_noise_lora.safetensors", "a_low_noise_lora.safetensors"),
        ("a_lora_LOW.safetensors", "a_lora_HIGH.safetensors"),
        ("LowNoise-b.safetensors", "HighNoise-b.safetensors"),
        ("HighNoise/c-HighNoise.safetensors", "LowNoise/c-LowNoise.safetensors"),
        ("high_noise/d_high_noise.safetensors", "high_noise/d_low_noise.safetensors"),
    ],
)
def test_one_file_of_a_pair_finds_the_other(tmp_path: Path, given: str, partner: str) -> None:
    for name in (given, partner):
        (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / given).touch()
    assert partner_of(tmp_path / given) is None
    (tmp_path / partner).touch()
    assert partner_of(tmp_path / given) == tmp_path / partner
    assert partner_of(tmp_path / partner) == tmp_path / given


# ---- in the pipeline ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def loaded(tiny: TinyModels) -> Iterator[tuple[LightX2VPipeline, Request]]:
    resolved = resolve({"model_path": str(tiny.t2v), "device": "cpu"}, SMALL)
    with LightX2VPipeline.from_config(resolved.engine) as pipe:
        yield pipe, Request(prompt="a red ball", **(dict(resolved.request) | {"seed": 3}))


@pytest.mark.slow
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


@pytest.mark.slow
def test_a_whole_run_with_loras_is_the_same_either_way(tiny: TinyModels, files: tuple[Path, Path]) -> None:
    loras = (spec(files[0]), spec(files[1], "low", -0.7))
    made = []
    for dynamic in (False, True):
        settings = SMALL | {"steps": 4, "boundary": 0.9, "lora_configs": loras, "lora_dynamic_apply": dynamic}
        resolved = resolve({"model_path": str(tiny.t2v), "device": "cpu"}, settings)
        with LightX2VPipeline.from_config(resolved.engine) as pipe:
            made.append(latents(pipe, Request(prompt="a red ball", **(dict(resolved.request) | {"seed": 3}))))
    assert 0 < error(made[1], made[0].double()) <= 1e-6


@pytest.fixture(scope="module")
def halves(tiny: TinyModels, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A pair whose names say which expert each is for."""
    root, shapes = tmp_path_factory.mktemp("halves"), base_weights(tiny.t2v).shapes
    high, low = (root / f"style_{which}_noise_rank4.safetensors" for which in ("high", "low"))
    return write(high, random_pairs(shapes, 5)), write(low, random_pairs(shapes, 6))


@pytest.mark.slow
def test_a_choice_is_never_overruled_and_a_doubt_is_said(
    loaded: tuple[LightX2VPipeline, Request], halves: tuple[Path, Path], tmp_path: Path
) -> None:
    pipe, request = loaded
    exchanged = (spec(halves[1], "high"), spec(halves[0], "low"))
    result = pipe.run(replace(request, loras=exchanged), return_latents=True)
    assert [(entry["expert"], entry["path"].rpartition("/")[2]) for entry in result.report()["loras"]] == [
        ("high", halves[1].name),
        ("low", halves[0].name),
    ]
    assert [text.partition(" ")[2] for text in result.warnings] == [
        f"is used for the {one}-noise expert, as you chose; its name says {other} noise. "
        "If that is a mistake, exchange the two files."
        for one, other in (("high", "low"), ("low", "high"))
    ]
    plain = [tmp_path / name for name in ("a.safetensors", "b.safetensors")]
    for path, half in zip(plain, halves[::-1], strict=True):
        path.write_bytes(half.read_bytes())
    wanted = pipe.run(replace(request, loras=(spec(plain[0], "high"), spec(plain[1], "low"))), return_latents=True)
    assert result.latents is not None and wanted.latents is not None and wanted.warnings == ()
    assert torch.equal(result.latents, wanted.latents)


def test_one_half_brings_the_other(loaded: tuple[LightX2VPipeline, Request], halves: tuple[Path, Path]) -> None:
    pipe, request = loaded
    both = latents(pipe, replace(request, loras=(spec(halves[0], "high"), spec(halves[1], "low"))))
    for given in halves:
        lora = LoraSpec.from_json({"path": str(given)})
        result = pipe.run(replace(request, loras=(lora,)), return_latents=True)
        assert result.latents is not None and torch.equal(result.latents, both)
        found = [(entry["expert"], entry["path"].rpartition("/")[2]) for entry in result.report()["loras"]]
        assert found == [("high", halves[0].name), ("low", halves[1].name)] and result.warnings == ()


@pytest.mark.slow
@pytest.mark.parametrize("experts", [("auto", "auto"), ("auto", "low"), ("high", "auto")])
def test_both_halves_of_a_pair_go_on_once(
    loaded: tuple[LightX2VPipeline, Request], halves: tuple[Path, Path], experts: tuple[str, str]
) -> None:
    pipe, request = loaded
    both = (spec(halves[0], "high", 0.5), spec(halves[1], "low", -0.5))
    expected = latents(pipe, replace(request, loras=both))
    given = tuple(replace(lora, expert=expert) for lora, expert in zip(both, experts, strict=True))
    result = pipe.run(replace(request, loras=given[::-1]), return_latents=True)
    assert result.latents is not None and torch.equal(result.latents, expected) and len(result.loras) == 2


def test_a_half_alone_causes_a_warning_and_a_file_for_both_is_used_for_both(
    loaded: tuple[LightX2VPipeline, Request], files: tuple[Path, Path], halves: tuple[Path, Path], tmp_path: Path
) -> None:
    pipe, request = loaded
    alone = tmp_path / halves[0].name
    alone.write_bytes(halves[0].read_bytes())
    report = pipe.run(replace(request, loras=(spec(alone, "auto"),))).report()
    assert [entry["expert"] for entry in report["loras"]] == ["high"] and "not beside it" in report["warnings"][0]
    for_both = latents(pipe, replace(request, loras=(spec(files[0], "auto"),)))
    assert torch.equal(for_both, latents(pipe, replace(request, loras=(spec(files[0]), spec(files[0], "low")))))


def test_a_lora_for_the_other_task_causes_a_warning(
    loaded: tuple[LightX2VPipeline, Request], files: tuple[Path, Path], tmp_path: Path
) -> None:
    pipe, request = loaded
    for task, warned in (("i2v", True), ("t2v", False)):
        named = tmp_path / f"style_{task}.safetensors"
        named.write_bytes(files[0].read_bytes())
        warnings = pipe.run(replace(request, loras=(spec(named),))).warnings
        assert [f"is used for t2v, its name says {task}" in text for text in warnings] == [True] * warned


@pytest.mark.slow
def test_lora_allow_partial_lets_through_what_looks_wrong(
    tiny: TinyModels, halves: tuple[Path, Path], tmp_path: Path
) -> None:
    pairs = random_pairs(base_weights(tiny.t2v).shapes, 7)
    pairs["blocks.77.ffn.0"] = pairs["blocks.0.ffn.0"]
    part = write(tmp_path / "part.safetensors", pairs)
    loras = (spec(part), spec(halves[0], "low"))
    settings = {"model_path": str(tiny.t2v), "device": "cpu"}
    resolved = resolve(settings, SMALL | {"lora_configs": loras, "lora_allow_partial": True})
    with LightX2VPipeline.from_config(resolved.engine) as pipe:
        report = pipe.run(Request(prompt="a red ball", **resolved.request)).report()
    high, low = report["loras"]
    assert (high["applied"], high["total"], low["applied"]) == (26, 27, 26) and "blocks.77" in high["unmatched"][0]
    assert "26 of 27 layers" in report["warnings"][0] and "its name says high noise" in report["warnings"][1]
    with pytest.raises(LoraError, match="only in part"):
        LightX2VPipeline.from_config(resolve(settings, SMALL | {"lora_configs": loras}).engine)


@pytest.mark.slow
def test_a_request_with_a_bad_lora_changes_neither_expert(
    loaded: tuple[LightX2VPipeline, Request], files: tuple[Path, Path], tmp_path: Path
) -> None:
    pipe, request = loaded
    plain = latents(pipe, request)
    with pytest.raises(LoraError):
        pipe.run(replace(request, loras=(spec(files[0]), spec(tmp_path / "missing.safetensors", "low"))))
    assert pipe._engine is not None and not pipe._engine.placement.loras
    assert torch.equal(latents(pipe, request), plain)


@pytest.mark.slow
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


@pytest.mark.slow
def test_merging_into_quantised_weights_needs_the_dynamic_way(files: tuple[Path, Path]) -> None:
    with pytest.raises(ConfigError, match="lora_dynamic_apply"):
        EngineConfig(dit_quantized=True, dit_quant_scheme="fp8-sgl", lora_configs=(spec(files[0]),))
