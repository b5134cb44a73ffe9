"""The quality gate on trained weights: every 8-bit layer of the demo model, and the latents that come of them."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lightx2v.config.presets import resolve
from lightx2v.config.request import Request
from lightx2v.loading import conversion
from lightx2v.loading.conversion import Conversion, convert, fidelity, prebuilt_conversions
from lightx2v.loading.model_files import locate
from lightx2v.pipeline import LightX2VPipeline
from lightx2v.weights.quantization import FORMATS, MIN_COSINE

LAYERS = {"high": 50, "low": 50, "t5": 14}


def jobs(task: str) -> dict[str, Conversion]:
    config = resolve(f"demo_{task}_fp8").engine
    return prebuilt_conversions(locate(config), config, Path(), "fp32")


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("task", ["t2v", "i2v"])
def test_every_layer_keeps_its_direction(task: str, form: str) -> None:
    for part, job in jobs(task).items():
        found = fidelity(replace(job, format=form))
        assert len(found) == LAYERS[part]
        assert {name: value for name, value in found.items() if not value >= MIN_COSINE} == {}


def test_layers_below_the_gate_are_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = replace(jobs("t2v")["high"], output=tmp_path / "out.safetensors")
    found = fidelity(job)
    ranked = sorted(found, key=lambda name: found[name])
    with caplog.at_level("INFO", "lightx2v.convert"):
        convert(job)
        assert f"{found[ranked[0]]:.5f} ({ranked[0]})" in caplog.text and "WARNING" not in caplog.text
        monkeypatch.setattr(conversion, "MIN_COSINE", (found[ranked[0]] + found[ranked[1]]) / 2)
        convert(job, force=True)
    assert "1 layers lose more than usual in 8 bits" in caplog.text and f": {ranked[0]}" in caplog.text


@pytest.mark.slow
def test_the_latents_are_close_to_the_merged_ones() -> None:
    latents: list[torch.Tensor] = []
    for variant in ("merged", "fp8"):
        resolved = resolve(f"demo_t2v_{variant}")
        with LightX2VPipeline.from_config(resolved.engine) as pipe:
            request = Request(prompt="a red ball moves right over grass", **resolved.request)
            result = pipe.run(request, return_latents=True)
            assert result.latents is not None and result.report()["warnings"] == []
            latents.append(result.latents)
    exact, got = latents
    error = (got - exact).square().mean().item()
    assert 0 < error and 10 * math.log10((exact.max() - exact.min()).item() ** 2 / error) > 30
