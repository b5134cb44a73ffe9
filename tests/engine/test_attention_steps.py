"""A run gives each step the attention that is due, and the report says which."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import TinyModels
from torch import Tensor

from lightx2v.attention import Choice, sol
from lightx2v.attention.sdpa import sdpa
from lightx2v.attention.sol import SolAttention
from lightx2v.config.presets import resolve
from lightx2v.config.request import Request
from lightx2v.config.sol_attn_setting import SolAttnSetting
from lightx2v.engine import engine as module
from lightx2v.loading.model_files import locate
from lightx2v.loading.networks import Precision
from lightx2v.pipeline import LightX2VPipeline

SIZE = {"height": 32, "width": 48, "frames": 5, "steps": 5}


@pytest.fixture(scope="module")
def pipe(tiny: TinyModels) -> Iterator[LightX2VPipeline]:
    with LightX2VPipeline.from_config(resolve({"model_path": str(tiny.t2v)}, SIZE).engine) as pipe:
        yield pipe


def test_sparse_attention_waits_for_the_exact_steps_and_blocks(
    pipe: LightX2VPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sol, "LEAST_TOKENS", 1)
    calls: list[str] = []

    def sparse(q: Tensor, k: Tensor, v: Tensor, tau: float) -> Tensor:
        calls.append("sparse")
        return sdpa(q, k, v)

    def dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        calls.append("dense")
        return sdpa(q, k, v)

    request = Request(prompt="a red ball", seed=3, guidance=(1.0, 1.0), **SIZE)
    exact = pipe.run(request, return_latents=True).latents
    engine = pipe._loaded()
    chosen = Choice("sol_attn", SolAttention(sparse, dense, "dense", SolAttnSetting()), "asked for; a fake")
    monkeypatch.setattr(pipe, "_engine", replace(engine, self_attention=chosen))
    result = pipe.run(request, return_latents=True)
    with engine.placement.expert("high") as dit:
        blocks = len(dit.blocks)
    assert calls == ["dense"] * blocks + (["dense"] + ["sparse"] * (blocks - 1)) * 4
    assert exact is not None and result.latents is not None
    torch.testing.assert_close(result.latents, exact, rtol=0, atol=1e-4)
    assert result.attention["self"] == "sol_attn" and result.attention["reason"] == "asked for; a fake"


@pytest.mark.parametrize("name", ["sol_attn", "flash_attn3_fp8", "int8_kitchen", "auto_fast"])
def test_the_texts_attention_stays_exact(tiny: TinyModels, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, bool, object]] = []

    def resolve_attention(name: str, *_: object, strict: bool, sol_setting: object, **more: object) -> Choice:
        asked.append((name, strict, sol_setting))
        return Choice(name, sdpa, "a fake")

    monkeypatch.setattr(module, "resolve_attention", resolve_attention)
    settings = {"self_attn_1_type": name, "cross_attn_1_type": name, "sol_attn_setting": {"tau": 0.5, "strict": True}}
    engine = resolve({"model_path": str(tiny.t2v), **settings}, SIZE).engine
    with LightX2VPipeline.from_config(engine) as pipe:
        loaded = pipe._loaded()
    assert (loaded.self_attention.name, loaded.cross_attention.name) == (name, "auto")
    assert asked == [(each, each == "sol_attn", engine.sol_attn_setting) for each in (name, "auto")]


@pytest.mark.parametrize("first", [True, False])
def test_of_several_processes_the_first_takes_the_times_for_all(
    tiny: TinyModels, first: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Near the threshold another process might measure otherwise, and compute with another kernel."""
    asked: list[str] = []

    def resolve_attention(name: str, *_: object, **more: object) -> Choice:
        asked.append(name)
        return Choice("int8_kitchen" if name == "auto_fast" else name, sdpa, "a fake")

    monkeypatch.setattr(module, "resolve_attention", resolve_attention)
    told: list[str | None] = []

    def broadcast_json(message: str | None) -> str:
        told.append(message)
        return "int8_kitchen"

    group: Any = SimpleNamespace(is_rank0=first, broadcast_json=broadcast_json)
    engine = resolve({"model_path": str(tiny.t2v), "self_attn_1_type": "auto_fast"}, SIZE).engine
    chosen, cross = module.choose_attention(engine, locate(engine), Precision.of(engine), group)
    assert (chosen.name, cross.name) == ("int8_kitchen", "auto")
    assert told == ["int8_kitchen" if first else None]
    assert asked == (["auto_fast", "auto"] if first else ["int8_kitchen", "auto"])
