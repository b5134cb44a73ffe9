"""Loading can be cancelled and continues with less on the device when memory runs out; output paths are checked."""

from __future__ import annotations

import dataclasses
import gc
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TinyModels

import lightx2v.engine.engine
import lightx2v.offload.placement
from lightx2v.config.engine_config import EngineConfig
from lightx2v.config.presets import resolve
from lightx2v.config.request import Request
from lightx2v.cost.memory_ladder import MemoryLadder, MemoryPlanner
from lightx2v.cost.memory_plan import GIB, ModelSize, OffloadOptions
from lightx2v.engine.engine import load_engine
from lightx2v.errors import BadRequest, Cancelled, OutOfMemory, OutputError
from lightx2v.offload.offloaded import Offloaded
from lightx2v.offload.resident import LoadInputs, Resident
from lightx2v.pipeline import LightX2VPipeline
from lightx2v.progress import CancelToken

pytestmark = pytest.mark.slow


def config_of(folder: Path) -> EngineConfig:
    return resolve({"model_path": str(folder), "device": "cpu"}, {}).engine


@pytest.mark.parametrize("tensors", [0, 10, 100])
def test_loading_stops_where_it_is_cancelled(tiny: TinyModels, monkeypatch: pytest.MonkeyPatch, tensors: int) -> None:
    cancel = CancelToken()
    seen: list[weakref.ref[torch.Tensor]] = []
    place = lightx2v.weights.module_loader._place

    def placing(*args: Any) -> torch.Tensor:
        seen.append(weakref.ref(tensor := place(*args)))
        if len(seen) == tensors:
            cancel.cancel()
        return tensor

    monkeypatch.setattr(lightx2v.weights.module_loader, "_place", placing)
    if not tensors:
        cancel.cancel()
    with pytest.raises(Cancelled):
        load_engine(config_of(tiny.t2v), cancel=cancel)
    gc.collect()
    assert len(seen) == tensors and not any(ref() is not None for ref in seen)


def roomy(*_: object) -> MemoryPlanner:
    return MemoryPlanner(vram=200 * GIB, ram=200 * GIB, model=ModelSize(), options=OffloadOptions())


def test_loading_continues_after_out_of_memory_with_less_on_the_device_and_a_warning(
    tiny: TinyModels, monkeypatch: pytest.MonkeyPatch
) -> None:
    modes: list[str] = []
    placed: list[weakref.ref[torch.Tensor]] = []
    load, place = lightx2v.engine.engine.load_offloaded, lightx2v.weights.module_loader._place

    def noting(inputs: LoadInputs, ladder: MemoryLadder) -> Any:
        gc.collect()
        assert all(ref() is None for ref in placed), "what the failed load had placed is free again"
        modes.append(ladder.plan.mode)
        placed.clear()
        return load(inputs, ladder)

    def starved(*args: Any) -> torch.Tensor:
        if modes[-1] == "resident" and len(placed) == 50:  # in the middle of an expert
            raise torch.OutOfMemoryError("CUDA out of memory")
        placed.append(weakref.ref(tensor := place(*args)))
        return tensor

    monkeypatch.setattr(lightx2v.engine.engine, "planner_for", roomy)
    monkeypatch.setattr(lightx2v.engine.engine, "load_offloaded", noting)
    monkeypatch.setattr(lightx2v.weights.module_loader, "_place", starved)
    request = Request(prompt="a ball", height=32, width=48, frames=5, steps=2)
    with LightX2VPipeline.from_config(config_of(tiny.t2v)) as pipe:
        reports = [pipe.run(request).report() for _ in range(2)]
    assert modes == ["resident", "resident", "swap"]
    for report in reports:  # the machine is roomy enough for more, but that failed
        assert report["plan"]["mode"] == "swap" and report["plan"]["reason"].startswith("After an earlier run: one")
        assert any("while loading" in warning and "one expert" in warning for warning in report["warnings"])


def test_offload_without_effect_gives_a_warning(tiny: TinyModels, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    engine = load_engine(dataclasses.replace(config_of(tiny.t2v), device="auto", cpu_offload=True))
    assert engine.warnings == ("cpu_offload has no effect: CPU has no memory of its own to offload from.",)


@pytest.mark.parametrize("placement", [Resident, Offloaded])
def test_float32_convolutions_of_the_vae_are_not_rounded_to_tf32(
    tiny: TinyModels, monkeypatch: pytest.MonkeyPatch, placement: type
) -> None:
    """On CUDA torch rounds by default, so processes would differ by more than a level. The setting comes back."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    if placement is Offloaded:
        monkeypatch.setattr(lightx2v.engine.engine, "planner_for", roomy)
    engine = load_engine(config_of(tiny.t2v))
    assert type(engine.placement) is placement and torch.backends.cudnn.allow_tf32
    with engine.placement.vae():
        assert not torch.backends.cudnn.allow_tf32
    assert torch.backends.cudnn.allow_tf32


def test_loading_fails_at_the_end_of_the_ladder(tiny: TinyModels, monkeypatch: pytest.MonkeyPatch) -> None:
    def starved(*_: Any, **__: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(lightx2v.engine.engine, "planner_for", roomy)
    monkeypatch.setattr(lightx2v.engine.engine, "load_offloaded", starved)
    with pytest.raises(OutOfMemory, match="while loading the model"):
        load_engine(config_of(tiny.t2v))


def test_backends_are_tested_once_and_on_heads_of_the_models_size(
    tiny: TinyModels, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[str, int]] = []
    resolve_attention = lightx2v.engine.engine.resolve_attention

    def counted(name: str, *args: Any, **more: Any) -> Any:
        calls.append((name, more["head_dim"]))
        return resolve_attention(name, *args, **more)

    monkeypatch.setattr(lightx2v.engine.engine, "resolve_attention", counted)
    load_engine(config_of(tiny.t2v)).placement.close()
    assert calls == [("auto", 12)]


@pytest.mark.parametrize("path", ["taken.mp4", "/proc/video.mp4"])
def test_a_path_that_cannot_be_written_fails_before_the_first_stage(
    tiny: TinyModels, tmp_path: Path, path: str
) -> None:
    (tmp_path / "taken.mp4").write_bytes(b"mine")
    stages: list[str] = []
    with LightX2VPipeline.from_config(config_of(tiny.t2v)) as pipe:
        request = Request(prompt="a ball", height=32, width=48, frames=5, steps=1)
        with pytest.raises((BadRequest, OutputError), match="exists already|could not be written"):
            pipe.run(request, save_result_path=tmp_path / path, on_progress=lambda event: stages.append(event.stage))
    assert stages == []
    assert [(file.name, file.read_bytes()) for file in tmp_path.iterdir()] == [("taken.mp4", b"mine")]
