"""The shipped presets and the tutorial's files, as they resolve.

`snapshots/presets.json` holds every value of a shipped preset that differs from the default of its field, and the files
that loading it needs. After an intended change, write it again and read the difference:
python -m tests.config.test_presets
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from lightx2v.config.engine_config import EngineConfig, hub_name
from lightx2v.config.presets import PRESETS, PresetInfo, list_presets, resolve
from lightx2v.config.request import Request
from lightx2v.errors import ConfigError
from lightx2v.hub import find_all

HERE = Path(__file__).parents[1]
SNAPSHOT = HERE / "snapshots" / "presets.json"
TUTORIAL = HERE / "data" / "tutorial"
NAMES = sorted(path.stem for path in PRESETS.glob("*.json"))


def resolved(name: str) -> dict[str, Any]:
    found = resolve(name)
    request = Request(prompt="a cat", image_path="a.png" if found.engine.task == "i2v" else None, **found.request)
    return {
        "preset": asdict(found.preset),
        "engine": found.engine.to_json(),
        "request": request.to_json() | {"image_path": None},
    }


def snapshot(name: str) -> dict[str, Any]:
    defaults = {
        "preset": asdict(PresetInfo(name="", title="")),
        "engine": EngineConfig().to_json(),
        "request": Request(prompt="a cat").to_json(),
    }
    parts = resolved(name)
    changed = {
        part: {key: value for key, value in parts[part].items() if value != defaults[part][key]} for part in defaults
    }
    return changed | {"files": list(find_all(resolve(name).engine))}


def test_every_preset_resolves_to_its_snapshot() -> None:
    stored = json.loads(SNAPSHOT.read_text("utf-8"))
    content = {f"{name}.{part}": values for name in NAMES for part, values in snapshot(name).items()}
    assert stored.keys() == content.keys()
    for name, values in content.items():
        assert values == stored[name], f"{name} changed; see the top of this file"


def test_the_list_has_every_preset_once_the_demo_first() -> None:
    listed = list_presets()
    assert sorted(info.name for info in listed) == NAMES
    assert listed[0].name == "demo_t2v_base"
    assert len({info.title for info in listed}) == len(listed)


@pytest.mark.parametrize("name", NAMES)
def test_a_preset_says_what_it_is_and_leaves_nothing_without_effect(name: str) -> None:
    found = resolve(name)
    assert found.warnings == ()
    assert found.preset.title and found.preset.summary.endswith(".")
    assert found.preset.demo == name.startswith("demo_")
    assert found.preset.offload == name.endswith("_offload")
    assert found.preset.gpus == (8 if name.endswith("_cfg_ulysses") else 1)
    assert found.preset.task == found.engine.task == name.removeprefix("demo_")[:3]


@pytest.mark.parametrize("name", [name for name in NAMES if name.endswith(("_offload", "_cfg_ulysses"))])
def test_offload_and_parallel_presets_differ_in_nothing_else(name: str) -> None:
    variant, plain = resolved(name), resolved(name.removesuffix("_offload").removesuffix("_cfg_ulysses"))
    assert variant["request"] == plain["request"]
    differing = {key for key in plain["engine"] if variant["engine"][key] != plain["engine"][key]}
    assert differing <= {"cpu_offload", "offload_granularity", "parallel"} and differing


@pytest.mark.parametrize("name", [name for name in NAMES if name.endswith("_cfg_ulysses")])
def test_no_parallel_preset_computes_the_same_twice(name: str) -> None:
    found = resolve(name)
    assert found.engine.parallel is not None
    assert found.engine.parallel.cfg_p_size == (2 if found.request["enable_cfg"] else 1)
    found.engine.check_heads(40)


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("configs/wan22/wan_moe_t2v.json", "t2v_base"),
        ("/home/user/LightX2V/configs/wan22/wan_moe_i2v.json", "i2v_base"),
        ("configs/dist_infer/wan22_moe_t2v_cfg_ulysses.json", "t2v_base_cfg_ulysses"),
        ("configs/dist_infer/wan22_moe_i2v_cfg_ulysses.json", "i2v_base_cfg_ulysses"),
        ("configs/distill/wan22/wan_moe_t2v_distill_lora.json", "t2v_distill_lora"),
        ("configs/distill/wan22/wan_moe_i2v_distill_with_lora.json", "i2v_distill_lora"),
        ("configs/distill/wan22/wan_moe_i2v_distill_model.json", "i2v_distill_merged"),
        ("configs/distill/wan22/wan_moe_i2v_distill_quant.json", "i2v_distill_fp8"),
        ("configs/distill/wan22/wan_moe_t2v_distill_lora_4step_cfg_ulysses.json", "t2v_distill_lora_cfg_ulysses"),
        ("configs/distill/wan22/wan_moe_i2v_distill_lora_4step_cfg_ulysses.json", "i2v_distill_lora_cfg_ulysses"),
        ("configs/distill/wan22/wan_moe_i2v_distill_model_4step_cfg_ulysses.json", "i2v_distill_merged_cfg_ulysses"),
        ("configs/distill/wan22/wan_moe_i2v_distill_fp8_4step_cfg_ulysses.json", "i2v_distill_fp8_cfg_ulysses"),
    ],
)
def test_the_tutorials_paths_mean_our_presets(path: str, name: str) -> None:
    found = resolve(path)
    assert found.preset.name == name
    assert name in found.warnings[0]


def test_a_file_that_is_there_wins_over_the_preset_of_its_name(tmp_path: Path) -> None:
    path = tmp_path / "configs" / "wan22" / "wan_moe_t2v.json"
    path.parent.mkdir(parents=True)
    path.write_text('{"infer_steps": 3}')
    assert resolve(path).request["steps"] == 3
    with pytest.raises(ConfigError, match="no preset and no file"):
        resolve(tmp_path / "wan22" / "wan_moe_t2v.json")


@pytest.mark.parametrize(
    ("file", "task", "variant", "preset"),
    [
        ("wan_moe_t2v", "t2v", "base", "t2v_base"),
        ("wan_moe_t2v_distill_lora", "t2v", "distill_lora", "t2v_distill_lora"),
        ("wan_moe_i2v_distill_model", "i2v", "distill_merged", "i2v_distill_merged"),
        ("wan_moe_i2v_distill_quant", "i2v", "distill_fp8", "i2v_distill_fp8"),
    ],
)
def test_the_tutorials_files_load_unchanged(file: str, task: str, variant: str, preset: str) -> None:
    found = resolve(TUTORIAL / f"{file}.json", {"task": task})
    ours = resolve(preset)
    assert found.warnings == ()
    assert found.preset.variant == variant
    assert found.request == ours.request
    assert found.engine.model_cls == ours.engine.model_cls
    assert found.engine.lora_configs == ours.engine.lora_configs
    needed = [hub_name(name) for name in list(find_all(found.engine))]
    assert needed == [hub_name(name) for name in list(find_all(ours.engine))]


def test_the_tutorials_file_keeps_its_attention_and_offload() -> None:
    engine = resolve(TUTORIAL / "wan_moe_i2v_distill_model.json", {"task": "i2v"}).engine
    assert (engine.self_attn_1_type, engine.cpu_offload, engine.offload_granularity) == ("flash_attn3", True, "block")
    assert (engine.t5_cpu_offload, engine.vae_cpu_offload) == (False, False)


if __name__ == "__main__":
    content = {f"{name}.{part}": values for name in NAMES for part, values in snapshot(name).items()}
    lines = [f" {json.dumps(key)}: {json.dumps(values, ensure_ascii=False)}" for key, values in content.items()]
    SNAPSHOT.write_text("{\n" + ",\n".join(lines) + "\n}\n", "utf-8")
