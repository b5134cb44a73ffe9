"""Exchanged experts are found by what they do with pure noise; experts in their places never get the warning."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TinyModels
from tiny_runs import latents

from lightx2v.config.lora_spec import LoraSpec
from lightx2v.config.presets import resolve
from lightx2v.config.request import Request
from lightx2v.engine.expert_order import _judged
from lightx2v.pipeline import LightX2VPipeline

ASSETS = Path(__file__).parents[2] / "assets" / "demo"
PICTURES = ("blue_ball_beach.png", "yellow_star_night.png")
PROMPTS = ("a red ball rolls left over green grass", "a dog")


def exchanged(model: Path, folder: Path) -> Path:
    """A copy of the model in which each expert lies in the other's folder."""
    shutil.copytree(model, folder)
    for here, there in (("high", "low"), ("low", "high")):
        shutil.rmtree(folder / f"{here}_noise_model")
        shutil.copytree(model / f"{there}_noise_model", folder / f"{here}_noise_model")
    return folder


def warnings(preset: str, settings: Mapping[str, Any], **more: Any) -> list[str]:
    """The warnings about the experts of two runs on one engine."""
    resolved = resolve(preset, {"device": "cpu", "frames": 5, **settings})
    found = []
    with LightX2VPipeline.from_config(resolved.engine) as pipe:
        for seed, (prompt, picture) in enumerate(zip(PROMPTS, PICTURES, strict=True)):
            task = {"image_path": str(ASSETS / "examples" / picture)} if resolved.engine.task == "i2v" else {}
            fields = {**resolved.request, "prompt": prompt, "seed": seed, "steps": 1, **task, **more}
            result = pipe.run(Request(**fields))
            found += [text for text in result.report()["warnings"] if "seem to be exchanged" in text]
    return found


@pytest.mark.slow
@pytest.mark.parametrize("task", ["t2v", "i2v"])
def test_exchanged_experts_cause_a_warning_in_every_report_and_others_do_not(task: str, tmp_path: Path) -> None:
    model = exchanged(ASSETS / f"Wan2.2-{task.upper()}-Demo", tmp_path / "model")
    preset = f"demo_{task}_base"
    found = warnings(preset, {"model_path": str(model), "frames": 17})
    assert len(found) == 2 and all(text.endswith("exchange the two files.") for text in found)
    assert warnings(preset, {"frames": 17}) == []


@pytest.mark.slow
@pytest.mark.parametrize("frames", [1, 17, 81])
@pytest.mark.parametrize("size", [64, 96, 160])
def test_experts_in_their_places_get_no_warning_at_any_size(frames: int, size: int) -> None:
    for task in ("t2v", "i2v"):
        assert warnings(f"demo_{task}_base", {"frames": frames, "height": size, "width": size}) == []


@pytest.mark.slow
@pytest.mark.parametrize("task", ["t2v", "i2v"])
def test_distilled_experts_are_told_apart_too(task: str, tmp_path: Path) -> None:
    preset = f"demo_{task}_distill_lora"
    resolved = resolve(preset)
    other = {"high": "low", "low": "high"}
    loras = tuple(LoraSpec(expert=other[lora.expert], path=lora.path) for lora in resolved.engine.lora_configs)  # type: ignore[arg-type]
    model = exchanged(ASSETS / f"Wan2.2-{task.upper()}-Demo", tmp_path / "model")
    steps = {"steps": 4}
    assert len(warnings(preset, {"model_path": str(model), "lora_configs": loras, "frames": 17}, **steps)) == 2
    assert warnings(preset, {"frames": 17}, **steps) == []


@pytest.mark.parametrize(
    ("high", "low", "warned"),
    [
        (-0.14, 0.0, True),
        (-0.03, 0.01, True),
        (0.0, -0.14, False),
        (-0.085, -0.08, False),  # a model that leaves the range of its training
        (-0.01, 0.0, False),
        (0.9, 0.95, False),  # weights that nobody has trained
        (-0.5, 0.9, False),
        (float("nan"), 0.0, False),
    ],
)
def test_only_a_clear_difference_is_a_reason_for_the_warning(high: float, low: float, warned: bool) -> None:
    assert bool(_judged({"high": high, "low": low})) is warned


@pytest.mark.slow
def test_the_look_changes_no_latents_and_is_taken_once(tiny: TinyModels, monkeypatch: pytest.MonkeyPatch) -> None:
    resolved = resolve({"model_path": str(tiny.t2v), "device": "cpu"}, {"height": 32, "width": 48, "frames": 5})
    request = Request(prompt="a red ball", **{**resolved.request, "steps": 2, "seed": 3})
    looks: list[object] = []
    with LightX2VPipeline.from_config(resolved.engine) as pipe:
        judged = "lightx2v.engine.expert_order._judged"
        monkeypatch.setattr(judged, lambda left: looks.append(left) or "x")
        looked = [latents(pipe, request), latents(pipe, replace(request, seed=4))]
        assert len(looks) == 1
        monkeypatch.setattr("lightx2v.engine.expert_order.PURE_NOISE", 2.0)
        assert all(
            torch.equal(latents(pipe, replace(request, seed=seed)), before)
            for seed, before in zip((3, 4), looked, strict=True)
        )
