"""Pairs find each other, names tell no folders, and what does not fit together says why."""

from __future__ import annotations

import json
import os
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from model_tree import T2V, comfy_tree, put, style_lora
from safetensors.torch import save_file

from lightx2v.catalog.catalog import Catalog, summary
from lightx2v.catalog.found_file import FoundFile
from lightx2v.catalog.found_model import FoundModel
from lightx2v.catalog.scan import scan
from lightx2v.config.lora_spec import LoraSpec
from lightx2v.config.presets import resolve
from lightx2v.errors import CheckpointError, ConfigError
from lightx2v.loading.lora_experts import lora_files


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = comfy_tree(tmp_path_factory.mktemp("tree"))
    style_lora(folder)
    return folder


@pytest.fixture(scope="module")
def catalog(models: Path) -> Catalog:
    return Catalog(scan([models]))


def expert(name: str, half: str | None = None, **more: object) -> FoundFile:
    values = {"task": "t2v", "width": 5120, "text_width": 4096, "quantisation": "fp8", "size": 1, "expert": half}
    return FoundFile(path=Path("/m") / name, kind="expert", **{**values, **more})  # type: ignore[arg-type]


def test_a_pair_with_everything_beside_it_is_a_model(catalog: Catalog, models: Path) -> None:
    assert sorted(catalog.models) == [
        "wan2.2_i2v_demo", "wan2.2_i2v_demo+wan2.2_i2v_demo_lightx2v_lora_4step",
        "wan2.2_t2v_demo", "wan2.2_t2v_demo+wan2.2_t2v_demo_lightx2v_lora_4step",
    ]  # fmt: skip
    settings = catalog.models["wan2.2_t2v_demo"].settings()
    files = {key: value for key, value in settings.items() if isinstance(value, str) and value.startswith("/")}
    assert files == {
        "high_noise_original_ckpt": str(models / "diffusion_models/wan2.2_t2v_high_noise_demo.safetensors"),
        "low_noise_original_ckpt": str(models / "diffusion_models/wan2.2_t2v_low_noise_demo.safetensors"),
        "t5_original_ckpt": str(models / "text_encoders/umt5_demo_bf16.pth"),
        "vae_path": str(models / "vae/wan_2.1_vae.pth"),
        "t5_tokenizer_path": str(models / "configs/t2v/google/umt5-xxl"),
        "model_path": str(models / "configs/t2v"),
    }
    assert resolve(settings).request == resolve("demo_t2v_base").request
    fast = catalog.models["wan2.2_t2v_demo+wan2.2_t2v_demo_lightx2v_lora_4step"].resolved()
    assert fast.request == resolve("demo_t2v_distill_lora").request
    assert [lora.expert for lora in fast.engine.lora_configs] == ["high", "low"]
    assert fast.preset.name == fast.preset.title


@pytest.mark.parametrize(
    ("high", "low"),
    [
        ("wan2.2_t2v_high_noise_14B_fp8_scaled.safetensors", "wan2.2_t2v_low_noise_14B_fp8_scaled.safetensors"),
        ("HighNoise/Wan2.2-T2V-A14B-HighNoise-Q4_K_M.gguf", "LowNoise/Wan2.2-T2V-A14B-LowNoise-Q4_K_M.gguf"),
        ("Wan2_2-T2V-A14B_HIGH_fp8_KJ.safetensors", "Wan2_2-T2V-A14B-LOW_fp8_KJ.safetensors"),
        ("repo/high_noise_model", "repo/low_noise_model"),
    ],
)
def test_names_in_the_wild_make_pairs(high: str, low: str) -> None:
    others = [
        expert("wan2.2_t2v_low_noise_14B_bf16.safetensors", "low"),
        expert("zz_low_noise_other.safetensors", "low"),
    ]
    found = Catalog([expert(high, "high"), expert(low, "low"), *others])
    models = [(model.high.path, model.low.path) for model in found.models.values()]
    assert models == [(Path("/m") / high, Path("/m") / low)]
    assert "high" not in next(iter(found.models)).lower()


def test_halves_of_two_models_make_no_pair() -> None:
    high = expert("wan2.2_t2v_high_noise.safetensors", "high")
    for other in (
        expert("wan2.2_i2v_low_noise.safetensors", "low", task="i2v"),
        expert("wan2.2_t2v_low_noise.safetensors", "low", width=1536),
        expert("wan2.2_t2v_low_noise.safetensors", "low", distilled=True),
        expert("something_quite_different_low_noise.safetensors", "low"),
        expert("wan2.2_t2v_high_noise_b.safetensors", "high"),
    ):
        assert Catalog([high, other]).models == {}, other.name


def test_files_of_one_name_get_their_folders_and_never_whole_paths() -> None:
    paths = ["a/model.safetensors", "b/model.safetensors", "b/x/model.safetensors", "b/other.safetensors"]
    hub = "hub/models--Wan-AI--Wan2.2-T2V-A14B/snapshots/" + "1" * 40 + "/high_noise_model"
    found = Catalog([expert(name) for name in [*paths, hub]])
    assert [file.name for file in found.files] == [
        "a/model.safetensors", "b/model.safetensors", "x/model.safetensors", "other.safetensors",
        "Wan2.2-T2V-A14B/high_noise_model",
    ]  # fmt: skip


def test_the_public_summary_has_names_and_no_path(catalog: Catalog, models: Path) -> None:
    told = str(summary(catalog))
    assert "watercolour.safetensors" in told and "wtrclr style" in told
    assert str(models) not in told and "/tmp" not in told


def test_loras_are_one_entry_for_a_pair(catalog: Catalog) -> None:
    assert sorted(catalog.loras) == [
        "wan2.2_i2v_demo_lightx2v_lora_4step", "wan2.2_t2v_demo_lightx2v_lora_4step", "watercolour",
    ]  # fmt: skip
    pair, single = catalog.loras["wan2.2_t2v_demo_lightx2v_lora_4step"], catalog.loras["watercolour"]
    assert [(p.expert, p.file.expert, p.strength) for p in pair.placed(3.0, 1.5)] == [
        ("high", "high", 3.0), ("low", "low", 1.5),
    ]  # fmt: skip
    assert [(p.expert, p.file.path.name) for p in single.placed()] == [
        ("high", "watercolour.safetensors"), ("low", "watercolour.safetensors"),
    ]  # fmt: skip
    assert single.triggers == ("wtrclr style", "soft wash")


def model(**parts: FoundFile | None) -> FoundModel:
    whole = {"high": expert("t_high_noise.safetensors", "high"), "low": expert("t_low_noise.safetensors", "low")}
    return FoundModel(name="t", **{**whole, **parts})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("parts", "reason"),
    [
        ({"low": expert("i_low_noise.safetensors", "low", task="i2v")}, "is for text-to-video (16 input channels), i_"),
        ({"low": expert("t_high_noise.safetensors", "high")}, "is given for both experts"),
        ({"low": expert("small_low_noise.safetensors", "low", width=160)}, "5120 channels, .* has 160"),
        ({"high": FoundFile(path=Path("/m/vae.pth"), kind="VAE", size=1)}, "is of the kind VAE, not expert"),
        ({"vae": expert("x.safetensors")}, "is of the kind expert, not VAE"),
        (
            {"text_encoder": FoundFile(path=Path("/m/t5"), kind="text encoder", size=1, text_width=64)},
            "gives 64 channels",
        ),
        ({"high": expert("nv_high_noise.safetensors", "high", problem="This is NVFP4.")}, "This is NVFP4."),
    ],
)
def test_what_does_not_fit_together_says_why(parts: dict[str, FoundFile], reason: str) -> None:
    named = {key: replace(file, name=file.path.name) for key, file in parts.items()}
    with pytest.raises(CheckpointError, match=reason.replace("(16", r"\(16").replace("channels)", r"channels\)")):
        model(**named).settings()


def test_a_missing_half_is_named_and_missing_parts_come_from_the_hub(tmp_path: Path) -> None:
    high = expert("wan2.2_t2v_high_noise.safetensors", "high")
    with pytest.raises(ConfigError, match="No low-noise expert that belongs to .*high_noise.* was found"):
        Catalog([high]).complete(high)
    settings = model().settings()
    assert resolve(settings).engine.model_path == "Wan-AI/Wan2.2-T2V-A14B"
    assert not {"t5_original_ckpt", "t5_quantized_ckpt", "vae_path", "t5_tokenizer_path"} & settings.keys()


def test_eight_bit_experts_take_loras_beside_their_weights(catalog: Catalog) -> None:
    lora = catalog.loras["watercolour"].placed()
    settings = replace(model(), loras=tuple(replace(p, file=replace(p.file, width=5120)) for p in lora)).settings()
    engine = resolve(settings).engine
    assert (engine.dit_quantized, engine.dit_quant_scheme, engine.lora_dynamic_apply) == (True, "fp8-sgl", True)
    assert engine.high_noise_quantized_ckpt == "/m/t_high_noise.safetensors"


def test_small_parts_are_not_taken_for_a_full_size_model(tmp_path: Path, models: Path) -> None:
    big = [expert("wan_t2v_high_noise.safetensors", "high"), expert("wan_t2v_low_noise.safetensors", "low")]
    found = Catalog([*scan([models]), *big])
    whole = found.models["wan_t2v"]
    assert (whole.text_encoder, whole.vae, whole.tokenizer) == (None, None, None)


def test_an_unknown_name_gets_the_nearest_one(catalog: Catalog) -> None:
    with pytest.raises(ConfigError, match="wan2.2_t2v_high_noise_demo.safetensors"):
        catalog.find("wan2.2_t2v_high_noise_dem", "expert")
    with pytest.raises(ConfigError, match="No VAE was found"):
        Catalog().find("x", "VAE")
    assert catalog.find("wan_2.1_vae", "VAE").path.name == "wan_2.1_vae.pth"


def test_the_parts_nearest_to_the_expert_are_taken(tmp_path: Path, models: Path) -> None:
    put(T2V / "Wan2.1_VAE.pth", tmp_path / "elsewhere" / "vae.pth")
    found = Catalog([*scan([tmp_path / "elsewhere"]), *scan([models])])
    vae = found.models["wan2.2_t2v_demo"].vae
    assert vae is not None and vae.path == models / "vae/wan_2.1_vae.pth"


def lora(name: str, half: str | None = None, **more: object) -> FoundFile:
    values = {"width": 5120, "rank": 16, "size": 1, "expert": half}
    return FoundFile(path=Path("/m") / name, kind="LoRA", **{**values, **more})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("high", "low", "paired"),
    [
        ("style_high_noise.safetensors", "style_low_noise.safetensors", True),
        ("H/style-H.safetensors", "L/style-L.safetensors", True),
        ("style_high-e8.safetensors", "style_low-e10.safetensors", True),
        ("a/style_HIGH.safetensors", "b/style_low.safetensors", True),
        ("dancing_girl_high.safetensors", "dancing_girls_low.safetensors", False),
        ("style_a_high.safetensors", "style_b_low.safetensors", False),
        ("watercolour_style_high.safetensors", "watercolour_styles_low.safetensors", False),
    ],
)
def test_two_styles_with_names_alike_are_no_pair(high: str, low: str, paired: bool) -> None:
    found = Catalog([lora(high, "high"), lora(low, "low")]).loras
    assert [(each.high is not None, each.low is not None) for each in found.values()] == (
        [(True, True)] if paired else [(True, False), (False, True)]
    )


@pytest.mark.parametrize(
    ("names", "prefixes"),
    [
        (["style_HIGH"], [""]),
        (["style-H"], [""]),
        (["HIGH_detail"], [""]),
        (["low_light"], [""]),
        (["style_high_noise"], [""]),
        (["style_高噪"], [""]),
        (["style_HIGH", "style_LOW"], ["", ""]),
        (["style-H-e8", "style-L-e8"], ["", ""]),
        (["SwayHighWan2_2", "SwayLowWan2_2"], ["", ""]),
        (["high/style", "low/style"], ["", ""]),
        (["low_light_high", "low_light_low"], ["", ""]),
        (["style_HIGH", "other_LOW"], ["", ""]),
        (["style_HIGH"], ["transformer_2."]),
        (["style_HIGH"], ["transformer. transformer_2."]),
    ],
)
def test_a_lora_is_for_the_experts_that_loading_puts_it_on(
    names: list[str], prefixes: list[str], tmp_path: Path
) -> None:
    """The shelf and the command line say of a file what loading does with its path alone."""
    for name, prefix in zip(names, prefixes, strict=True):
        layers = [f"{part}blocks.0.self_attn.q" for part in prefix.split() or [""]]
        path = tmp_path / f"{name}.safetensors"
        path.parent.mkdir(exist_ok=True)
        ends = {"lora_down": (4, 64), "lora_up": (64, 4)}
        tensors = {f"{layer}.{end}.weight": torch.ones(shape) for layer in layers for end, shape in ends.items()}
        save_file(tensors, path)
    found = Catalog(scan([tmp_path]))
    config = resolve("demo_t2v_base").engine
    for half in ("high", "low"):
        shown = {
            file.path
            for lora in found.loras.values()
            if (file := lora.high if half == "high" else lora.low) is not None
        }
        specs = [LoraSpec(path=str(lora.first.path)) for lora in found.loras.values()]
        assert {file.path for file in lora_files(specs, half, config)} == shown


def test_a_lora_is_half_of_one_pair_at_most(tmp_path: Path) -> None:
    names = ["s1_low", "s1_high", "s2_low", "s3_high", "s4_high"]
    found = Catalog([lora(f"{name}.safetensors", name[3:]) for name in names]).loras
    assert {name: [file.path.stem for file in each.files] for name, each in found.items()} == {
        "s1": ["s1_high", "s1_low"], "s2_low": ["s2_low"], "s3_high": ["s3_high"], "s4_high": ["s4_high"],
    }  # fmt: skip


def test_no_lora_and_no_model_hides_another_of_its_name() -> None:
    files = [lora("style_high.safetensors", "high"), lora("style_low.safetensors", "low"), lora("style.safetensors")]
    found = Catalog(files).loras
    assert sorted(file.path.name for each in found.values() for file in each.files) == sorted(
        file.path.name for file in files
    )
    names = [f"{'x' * 130}{end} {half}_noise.safetensors" for end in "ab" for half in ("high", "low")]
    experts = [expert(name, "high" if "high" in name else "low") for name in names]
    distils = [lora(f"fast{n}_{half}.safetensors", half, distilled=True, task="t2v")
               for n in range(2) for half in ("high", "low")]  # fmt: skip
    models = Catalog([*experts, *distils]).models
    assert len(models) == 6 and all(name == model.name and len(name) <= 120 for name, model in models.items())


def test_thousands_of_loras_with_names_alike_are_paired_at_once() -> None:
    files = [lora(f"style_{n:05}_{half}.safetensors", half) for n in range(2000) for half in ("high", "low")]
    start = time.process_time()
    assert len(Catalog(files).loras) == 2000
    assert time.process_time() - start < 5


def test_names_can_be_sent_to_a_page_whatever_bytes_they_have() -> None:
    strange = os.fsdecode(b"caf\xe9.safetensors")
    found = Catalog([lora(strange), lora("a\nb.safetensors")])
    json.dumps(summary(found), ensure_ascii=False).encode()
    assert [file.name for file in found.files] == ["caf\ufffd.safetensors", "a\nb.safetensors"]
    assert found.find("caf\ufffd").path == Path("/m") / strange
