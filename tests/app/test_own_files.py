"""Files of one's own on the page: found models are presets, single files replace parts, LoRAs stand on a shelf."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest
from model_tree import comfy_tree, style_lora
from page_engine import Painter

from app.backend.offer import FILE_FIELDS, Offer
from app.backend.studio import Studio
from app.exposure import PUBLIC_LIMITS, Exposure
from app.form.editor import Editor, form_of
from app.form.fields import LORA_ROWS, fields_of, setting_fields, submit_plan
from app.form.inputs import Inputs
from app.form.recorded_run import loras_on_offer, recorded_run
from app.strings import Words
from app.views import own_files
from app.web.api_routes import OfferedPresets
from lightx2v.catalog.catalog import Catalog, FoundLora
from lightx2v.catalog.found_file import FoundFile
from lightx2v.catalog.live_catalog import LiveCatalog
from lightx2v.catalog.used_files import content_hash
from lightx2v.config.presets import preset_content, resolve
from lightx2v.config.request import LoraSpec, Request
from lightx2v.errors import BadRequest, CheckpointError, ConfigError

HERE, OTHERS = Exposure(), Exposure(open_to_others=True, limits=PUBLIC_LIMITS)
T2V, FAST = "wan2.2_t2v_demo", "wan2.2_t2v_demo+wan2.2_t2v_demo_lightx2v_lora_4step"
WORDS = Words("en")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = comfy_tree(tmp_path_factory.mktemp("page"))
    style_lora(folder)
    return folder


@pytest.fixture(autouse=True)
def user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIGHTX2V_USER_DIR", str(tmp_path / "user"))


def offered(models: Path, *allowed: str, private: bool = True) -> Offer:
    offer = Offer(LiveCatalog([models], None if private else allowed), private=private)
    offer.catalog.wait()
    return offer


@pytest.fixture(scope="module")
def offer(models: Path) -> Offer:
    return offered(models)


def form(offer: Offer, preset: str, **changes: Any) -> Any:
    settings = offer.settings(preset)
    values = {**setting_fields(settings.request), "preset": preset, "task": settings.preset.task, "prompt": "a ball"}
    return form_of({**values, "seed": 3.0, "videos": 1.0, "shape": "1:1", **changes})


def test_a_found_model_is_a_preset_that_comes_back_from_its_run(offer: Offer, models: Path) -> None:
    assert (offer.tasks[FAST], offer.group(FAST), offer.group("demo_t2v_base")) == ("t2v", "found", "")
    rows = {"lora_0_high": "watercolour.safetensors", "lora_0_strength_high": 0.5, "lora_0_strength_low": 1.0}
    plan = submit_plan(form(offer, FAST, **rows), offer, HERE)
    assert plan.config.high_noise_original_ckpt == str(
        models / "diffusion_models/wan2.2_t2v_high_noise_demo.safetensors"
    )
    loras = plan.requests[0].loras
    assert loras is not None and len(loras) == 3
    assert (loras[2].path, loras[2].strength) == (str(models / "loras/watercolour.safetensors"), 0.5)
    back = fields_of(FAST, plan.config, plan.requests[0], offer)
    assert (back["lora_0_high"], back["lora_0_strength_high"], back["lora_0_low"]) == (
        "watercolour.safetensors",
        0.5,
        "",
    )
    assert {back[key] for key in ("file_high", "file_low", "file_t5", "file_vae")} == {""}


def test_single_files_replace_parts_and_come_back(offer: Offer, models: Path) -> None:
    files = {"file_vae": "wan_2.1_vae.pth", "file_low": "wan2.2_t2v_low_noise_demo.safetensors"}
    plan = submit_plan(form(offer, "demo_t2v_base", **files), offer, HERE)
    assert plan.config.vae_path == str(models / "vae/wan_2.1_vae.pth")
    assert plan.config.high_noise_original_ckpt == str(
        models / "diffusion_models/wan2.2_t2v_high_noise_demo.safetensors"
    )
    back = fields_of("demo_t2v_base", plan.config, plan.requests[0], offer)
    assert {key: back[key] for key in files} == files
    only_vae = submit_plan(form(offer, "demo_t2v_base", file_vae="wan_2.1_vae.pth"), offer, HERE)
    assert only_vae.config.high_noise_original_ckpt is None and only_vae.config.vae_path


@pytest.mark.parametrize(
    ("files", "why"),
    [
        ({"file_low": "wan2.2_i2v_low_noise_demo.safetensors"}, "Choose two experts for the same task"),
        ({"file_low": "wan2.2_t2v_high_noise_demo.safetensors"}, "is given for both experts"),
        ({"file_vae": "gone.pth"}, "no VAE called 'gone.pth'"),
    ],
)
def test_what_does_not_fit_says_why(offer: Offer, files: dict[str, str], why: str) -> None:
    with pytest.raises((CheckpointError, ConfigError), match=why):
        submit_plan(form(offer, T2V, **files), offer, HERE)


def test_exchanged_halves_run_with_a_remark(offer: Offer) -> None:
    files = {"file_high": "wan2.2_t2v_low_noise_demo.safetensors", "file_low": "wan2.2_t2v_high_noise_demo.safetensors"}
    submit_plan(form(offer, T2V, **files), offer, HERE)
    assert "is by its name the low-noise expert" in own_files.used_files(WORDS, offer.model(T2V, files))


def test_others_get_what_the_operator_allows_and_no_path(models: Path) -> None:
    closed = offered(models, private=False)
    assert not {T2V, FAST} & closed.tasks.keys() and not closed.lora_files
    some = offered(models, "wan2.2_t2v*", private=False)
    assert {T2V, FAST} <= some.tasks.keys() and "wan2.2_i2v_demo" not in some.tasks
    assert sorted(some.lora_files) == [
        f"wan2.2_t2v_demo_{half}_noise_lightx2v_lora_4step.safetensors" for half in ("high", "low")
    ]
    sent = form(some, T2V, file_vae="wan_2.1_vae.pth", lora_0_high="watercolour.safetensors", lora_1_high="/etc/shadow")
    made = submit_plan(sent, some, OTHERS)
    assert made.requests[0].loras is None and made.config == some.settings(T2V).engine
    with pytest.raises(Exception, match="There is no preset"):
        submit_plan(form(offered(models), "wan2.2_i2v_demo"), some, OTHERS)


def test_the_shelf_is_searched_and_fits_the_task(offer: Offer) -> None:
    loras = list(offer.catalog.loras.values())
    whole = own_files.shelf(WORDS, loras, "", "t2v", [])
    assert whole.count("<li") == 3 and whole.index("watercolour") < whole.index("wan2.2_i2v")
    assert 'src="studio/loras/watercolour.jpg"' in whole and "wtrclr style" in whole and "rank 16" in whole
    found = own_files.shelf(WORDS, loras, "WTRCLR wash", "t2v", ["watercolour.safetensors"])
    assert found.count("<li") == 1 and "Added" in found
    assert "No LoRA matches" in own_files.shelf(WORDS, loras, "nothing", "t2v", [])
    many = own_files.shelf(WORDS, loras * 20, "", "t2v", [])
    assert many.count("<li") == own_files.SHOWN and "36 more" in many


def test_a_saved_preset_makes_the_same_video_everywhere(models: Path) -> None:
    own = offered(models)
    rows = {"lora_0_high": "watercolour.safetensors", "lora_0_strength_high": 0.5, "lora_0_strength_low": 1.0}
    plan = submit_plan(form(own, FAST, frames=9.0, **rows), own, HERE)
    own.save("mine", preset_content("mine", plan.config, plan.requests[0]))
    assert own.group("mine") == "own" and own.tasks["mine"] == "t2v"
    resolved = resolve("mine")
    assert resolved.engine == plan.config
    assert {**resolved.request, "seed": 3} == {k: getattr(plan.requests[0], k) for k in resolved.request}
    with pytest.raises(ConfigError, match="already"):
        own.save("mine", preset_content("mine", plan.config, plan.requests[0]))
    with pytest.raises(ConfigError, match="already"):
        own.save(T2V, preset_content(T2V, plan.config, plan.requests[0]))


@pytest.fixture
def studio(tmp_path: Path, models: Path) -> Iterator[Studio]:
    opened = Studio(Painter(), tmp_path / "outputs", HERE, catalog=LiveCatalog([models]), default_preset=FAST)
    yield opened
    opened.close()


def test_the_api_lists_found_models_by_name(studio: Studio) -> None:
    presets = OfferedPresets(studio)
    assert next(iter(presets)) == FAST, "the default comes first"
    assert T2V in presets and presets[T2V].preset.title == T2V and len(presets) == len(list(presets))
    with pytest.raises(KeyError):
        presets["absent"]


def test_only_pictures_of_offered_loras_are_served(studio: Studio) -> None:
    picture = studio.thumbnail_of("watercolour")
    assert picture is not None and picture.startswith(b"\xff\xd8")
    for name in ("wan2.2_t2v_demo_lightx2v_lora_4step", "absent", "../../etc/passwd"):
        assert studio.thumbnail_of(name) is None


def test_what_files_say_of_themselves_is_text_on_the_shelf() -> None:
    """Names, trigger words and base models are strangers'."""
    evil = '"><script>alert(1)</script>'
    file = FoundFile(path=Path("/m/x.safetensors"), kind="LoRA", size=1, name=f"{evil}?#%20 é",
                     triggers=(evil,), trained_for=evil, thumbnail=Path("/m/x.png"))  # fmt: skip
    lora = FoundLora(name=file.name, high=file, low=file)
    html = own_files.shelf(WORDS, [lora], "", "t2v", [])
    assert "<script" not in html and "&lt;script&gt;" in html
    (source,) = re.findall(r'src="studio/loras/([^"]*)\.jpg"', html)
    assert unquote(source) == file.name and re.fullmatch(r"[\w.%/-]+", source, re.ASCII)


def test_a_video_from_outside_brings_back_its_loras_by_name(offer: Offer, models: Path) -> None:
    """Neither the preset's own ones a second time, nor what only a path in the video names."""
    rows = {"lora_0_high": "watercolour.safetensors", "lora_0_strength_high": 0.5, "lora_0_strength_low": 1.0}
    request = submit_plan(form(offer, FAST, **rows), offer, HERE).requests[0]
    assert request.loras is not None
    for folder in (str(models / "loras") + "/", "/another/disk/", "C:\\loras\\"):
        recorded = [replace(lora, path=folder + Path(lora.path).name) for lora in request.loras]
        evil = replace(recorded[0], path="/etc/shadow")
        loras = tuple(loras_on_offer([*recorded, evil], offer))
        assert loras == request.loras
        back = fields_of(FAST, offer.settings(FAST).engine, replace(request, loras=loras), offer)
        filled = {
            key: value for key, value in back.items() if key.startswith("lora_") and "strength" not in key and value
        }
        assert (filled, back["lora_0_strength_high"]) == ({"lora_0_high": "watercolour.safetensors"}, 0.5)
    assert not [*loras_on_offer(request.loras, offered(models, private=False))], "others get none that is not offered"


def many_models(count: int) -> LiveCatalog:
    halves = [
        FoundFile(path=Path(f"/m/style{n:04}_{half}_noise.safetensors"), kind="expert", size=1, task="t2v",
                  width=5120, text_width=4096, quantisation="fp8", expert=half)
        for n in range(count) for half in ("high", "low")
    ]  # fmt: skip
    five = FoundFile(path=Path("/m/ti2v.safetensors"), kind="expert", size=1, problem="This is <b>TI2V-5B</b>.")
    catalog = LiveCatalog()
    catalog.catalog, catalog.version = Catalog([*halves, five]), 1
    catalog.refresh = lambda: None  # type: ignore[method-assign]
    return catalog


def test_a_thousand_models_are_reached_by_searching(tmp_path: Path) -> None:
    """Two thousand experts: the list of presets shows some and says so, the search finds each, and nothing waits."""
    opened = Studio(Painter(), tmp_path / "outputs", HERE, catalog=many_models(1000))
    try:
        editor = Editor(opened, Inputs(WORDS, mine=True))
        values = editor.whole(editor.preset_values("style0001"), task="t2v")
        editor.parts(WORDS, values, "", "")  # the first time makes what is kept
        start = time.process_time()
        parts = editor.parts(WORDS, values, "", "")
        assert time.process_time() - start < 1
        assert parts["preset"].count('role="option"') < 80 and "970 more" in parts["preset"]
        found = editor.parts(WORDS, {**values, "model_search": "STYLE0777 fp8"}, "", "")["mine"]
        assert found.count('data-act="use_model"') == 1 and 'data-model="style0777"' in found
        assert "No model matches" in editor.parts(WORDS, {**values, "model_search": "absent"}, "", "")["mine"]
        assert "Files that cannot be used (1)" in found and "This is &lt;b&gt;TI2V-5B&lt;/b&gt;." in found
        names = [name for name, _ in editor.file_choices(WORDS, "t2v")["file_high"]]
        assert names[-1] == "ti2v.safetensors (cannot be used)" and len(names) == 2002
    finally:
        opened.close()


def video_of(preset: str, engine: dict[str, Any], request: dict[str, Any], files: list[Any] = []) -> dict[str, Any]:  # noqa: B006
    return {"preset": preset, "engine": engine, "request": request, "files": files}


def restored_values(settings: dict[str, Any], offer: Offer) -> tuple[dict[str, Any], tuple[str, ...]]:
    run = recorded_run(settings, offer, {"t2v": FAST, "i2v": "wan2.2_i2v_demo"})
    return fields_of(run.preset, run.config, run.request, offer) | run.files, run.missing


def test_a_video_whose_files_are_here_is_filled_in_whole(offer: Offer, models: Path) -> None:
    """The preset's own files and LoRAs, wherever they lay then; another VAE by its record; a LoRA for both experts."""
    resolved = offer.settings(FAST)
    engine = json.loads(json.dumps(resolved.engine.to_json()).replace(str(models), "/another/disk"))
    request = Request(prompt="a ball", **resolved.request).to_json()
    for lora in (
        {"path": "/x/watercolour.safetensors", "strength": 0.5},
        {"name": "low_noise_model", "path": "C:\\watercolour.safetensors"},
    ):
        values, missing = restored_values(video_of(FAST, engine, {**request, "loras": [lora]}), offer)
        assert not missing and values["missing"] == "" and not any(values[field] for field in FILE_FIELDS)
        assert values["lora_0_low"] == "watercolour.safetensors"
        assert values["lora_0_high"] == ("" if "name" in lora else "watercolour.safetensors")
    slow = Request(prompt="a ball", **offer.settings(T2V).request).to_json()
    values, missing = restored_values(video_of(T2V, engine, slow), offer)
    assert not missing, "the LoRAs of the engine are those of a found one"
    assert [values["lora_0_high"], values["lora_0_low"]] == [
        f"wan2.2_t2v_demo_{half}_noise_lightx2v_lora_4step.safetensors" for half in ("high", "low")
    ]
    other = {**offer.settings(T2V).engine.to_json(), "vae_path": "/old/name.pth"}
    file = offer.catalog.catalog.find("wan_2.1_vae", "VAE")
    record = {"role": "VAE", "name": "name.pth", "size": file.size, "sha256": content_hash(file.path)}
    values, missing = restored_values(video_of(FAST, {**engine, **other}, request, [record]), offer)
    assert not missing, "the same content under another name"


@pytest.mark.parametrize("private", [True, False])
def test_what_a_video_used_and_is_not_here_blocks_generate_by_name(models: Path, private: bool) -> None:
    offer = offered(models, "*", private=private)
    resolved = offer.settings(FAST)
    engine, request = resolved.engine.to_json(), Request(prompt="a ball", **resolved.request).to_json()
    lost = {
        "gone.safetensors": video_of(FAST, engine, {**request, "loras": [{"path": "/x/gone.safetensors"}]}),
        "half.safetensors": video_of(FAST, {**engine, "low_noise_original_ckpt": "/x/half.safetensors"}, request),
        "t5.pth": video_of(FAST, {**engine, "t5_original_ckpt": "D:\\t5.pth"}, request),
        "wan_2.1_vae.pth": video_of(
            FAST, {**engine, "vae_path": "/x/wan_2.1_vae.pth"}, request, [{"name": "wan_2.1_vae.pth", "size": 7}]
        ),
        "t2v_distill_fp8_8gpu": video_of("t2v_distill_fp8_8gpu", engine, request),
        "my preset": video_of("my preset", {}, request),
    }
    for name, settings in lost.items():
        values, missing = restored_values(settings, offer)
        assert name in missing, (name, missing)
        chosen = form_of({**values, "missing": ", ".join(missing)})
        with pytest.raises(BadRequest, match=f"not here.*{name}.*go on without"):
            submit_plan(chosen, offer, HERE if private else OTHERS)
        assert submit_plan(replace(chosen, missing=""), offer, HERE if private else OTHERS).requests


def test_what_the_rows_of_a_run_cannot_hold_is_named(offer: Offer) -> None:
    resolved = offer.settings(T2V)
    several = [LoraSpec(expert="high", path=f"/x/{n}.safetensors") for n in range(LORA_ROWS + 2)]
    request = Request(prompt="a ball", **{**resolved.request, "loras": several})
    values = fields_of(T2V, resolved.engine, request, offer)
    assert values["missing"] == "4.safetensors, 5.safetensors"
    gone = replace(resolved.engine, vae_path="/x/gone_vae.pth")
    assert fields_of(T2V, gone, Request(prompt="a ball", **resolved.request), offer)["missing"] == "gone_vae.pth"


def test_the_limit_of_memory_goes_from_the_slider_to_the_engine_and_back(offer: Offer) -> None:
    plan = submit_plan(form(offer, FAST, vram_gb=8), offer, HERE)
    assert plan.config.vram_gb == 8 and submit_plan(form(offer, FAST, vram_gb=0), offer, HERE).config.vram_gb is None
    assert fields_of(FAST, plan.config, plan.requests[0], offer)["vram_gb"] == 8
    shared = offered(offer.catalog.folders[0], "*", private=False)
    assert submit_plan(form(shared, FAST, vram_gb=8), shared, OTHERS).config.vram_gb is None, "visitors decide nothing"
    with pytest.raises(ConfigError, match="vram_gb is 1"):
        submit_plan(form(offer, FAST, vram_gb=1), offer, HERE)
