"""A preset that differs in its LoRAs only is exchanged on the loaded model, and gives what a fresh load gives."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TinyModels
from lora_files import random_pairs, spec, write

from lightx2v.config.engine_config import EngineConfig
from lightx2v.config.lora_spec import LoraSpec
from lightx2v.config.presets import resolve
from lightx2v.config.request import Request
from lightx2v.engine import engine as engine_module
from lightx2v.errors import LoraError, OutOfMemory
from lightx2v.jobs.engine_slot import EngineSlot
from lightx2v.loading.model_files import locate
from lightx2v.loading.networks import expert_weights
from lightx2v.pipeline import LightX2VPipeline
from lightx2v.progress import CancelToken

SMALL = {"height": 32, "width": 48, "frames": 5, "steps": 2, "boundary": 0.95, "shift": 5.0}


@pytest.fixture
def base(tiny: TinyModels) -> tuple[EngineConfig, Request]:
    resolved = resolve({"model_path": str(tiny.t2v), "device": "cpu"}, SMALL)
    return resolved.engine, Request(**{**resolved.request, "prompt": "a red ball", "seed": 3})


@pytest.fixture
def loras(base: tuple[EngineConfig, Request], tmp_path: Path) -> tuple[LoraSpec, ...]:
    shapes = expert_weights(locate(base[0]), "high", base[0]).shapes
    files = [write(tmp_path / f"{seed}.safetensors", random_pairs(shapes, seed)) for seed in (1, 2)]
    return spec(files[0], "high"), spec(files[1], "low")


def made(pipe: LightX2VPipeline, request: Request) -> torch.Tensor:
    result = pipe.run(request, return_latents=True)
    assert result.latents is not None
    return result.latents


@pytest.mark.slow
@pytest.mark.parametrize("dynamic", [False, True])
def test_base_and_distilled_in_turns_give_the_bits_of_fresh_loads(
    base: tuple[EngineConfig, Request], loras: tuple[LoraSpec, ...], dynamic: bool
) -> None:
    plain = replace(base[0], lora_dynamic_apply=dynamic)
    distilled = replace(plain, lora_configs=loras, model_cls="wan2.2_moe_distill")
    expected = {}
    for config in (plain, distilled):
        with LightX2VPipeline.from_config(config) as pipe:
            expected[config.model_cls] = made(pipe, base[1])
    assert not torch.equal(*expected.values())
    with LightX2VPipeline.from_config(plain) as pipe:
        for config in (distilled, plain, distilled, plain):
            assert pipe.exchange(config, preset=config.model_cls)
            assert torch.equal(made(pipe, base[1]), expected[config.model_cls])
            report = pipe.run(base[1]).report()
            assert (report["preset"], bool(report["loras"])) == (config.model_cls, config is distilled)


@pytest.mark.slow
@pytest.mark.parametrize("change", [{"text_len": 256}, {"use_tiling_vae": True}, {"lora_dynamic_apply": True}])
def test_any_other_difference_means_loading(base: tuple[EngineConfig, Request], change: dict[str, Any]) -> None:
    with LightX2VPipeline.from_config(base[0]) as pipe:
        before = pipe._engine
        assert not pipe.exchange(replace(base[0], **change))
        assert pipe._engine is before


@pytest.mark.slow
def test_after_a_lora_that_does_not_fit_the_engine_is_what_it_was(
    base: tuple[EngineConfig, Request], tmp_path: Path
) -> None:
    wrong = write(tmp_path / "wrong.safetensors", random_pairs({"blocks.0.ffn.0.weight": (7, 5)}, 1))
    with LightX2VPipeline.from_config(base[0]) as pipe:
        expected = made(pipe, base[1])
        with pytest.raises(LoraError):
            pipe.exchange(replace(base[0], lora_configs=(spec(wrong, "high"),)))
        assert pipe._engine is not None and pipe._engine.config == base[0]
        assert torch.equal(made(pipe, base[1]), expected)


@pytest.mark.slow
def test_where_the_loras_need_more_memory_the_model_is_loaded_anew(
    base: tuple[EngineConfig, Request], loras: tuple[LoraSpec, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    def exhausted(*_: object) -> None:
        raise OutOfMemory("no room")

    with LightX2VPipeline.from_config(base[0]) as pipe:
        monkeypatch.setattr(engine_module, "within_memory", exhausted)
        assert not pipe.exchange(replace(base[0], lora_configs=loras))


class Counting:
    """An engine that counts, and can exchange its LoRAs."""

    def __init__(self, seen: Counter[str], config: EngineConfig) -> None:
        self.seen, self.config = seen, config
        seen["open"] += 1

    def run(self, request: Request, *, save_result_path: Path, **_: Any) -> Any:
        self.seen["run"] += 1
        raise LoraError("stop here")

    def exchange(self, config: EngineConfig, **_: Any) -> bool:
        same = replace(config, lora_configs=()) == replace(self.config, lora_configs=())
        self.seen["exchange"] += same
        return same

    def release(self) -> str:
        self.seen["release"] += 1
        return "parts"

    def close(self) -> None:
        self.seen["close"] += 1


def test_the_slot_exchanges_before_it_loads(base: tuple[EngineConfig, Request], loras: tuple[LoraSpec, ...]) -> None:
    seen: Counter[str] = Counter()
    given: list[object] = []

    def open_engine(config: EngineConfig, *, kept: object, **_: object) -> Counting:
        given.append(kept)
        return Counting(seen, config)

    slot = EngineSlot(open_engine)
    quiet: dict[str, Any] = {"on_progress": lambda _: None, "cancel": CancelToken()}
    distilled = replace(base[0], lora_configs=loras)
    for config in (base[0], base[0], distilled, base[0]):
        slot.load(config, preset="p", **quiet)
        assert slot.loaded is not None and slot.loaded.config == config
    assert seen == Counter(open=1, exchange=2)
    slot.load(replace(base[0], text_len=256), preset="q", **quiet)
    assert seen == Counter(open=2, exchange=2, release=1)
    assert given == [None, "parts"]
