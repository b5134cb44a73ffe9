"""`vram_gb`, "use at most N GB": every plan, forecast and allocation keeps to a card of that size."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from lightx2v.attention import resolve_attention
from lightx2v.config.engine_config import EngineConfig
from lightx2v.config.presets import resolve
from lightx2v.config.request import Request
from lightx2v.cost.machine import Machine
from lightx2v.cost.memory_forecast import forecast_for_gpu, forecast_for_machine
from lightx2v.cost.memory_ladder import DRIVER_BYTES, RESERVE
from lightx2v.cost.memory_plan import GIB
from lightx2v.engine.saved_step import settings
from lightx2v.errors import ConfigError
from lightx2v.loading.model_files import locate
from lightx2v.loading.networks import Precision
from lightx2v.offload.placement import limit_memory, planner_for
from lightx2v.offload.resident import LoadInputs

H200 = Machine(
    name="H200", cores=16, ram_free=500 * GIB, ram_total=512 * GIB, vram_free=139 * GIB, vram_total=140 * GIB
)


@pytest.mark.parametrize("limit", [8, 12, 16, 24])
@pytest.mark.parametrize(
    "preset",
    ["t2v_base", "t2v_distill_fp8", "t2v_distill_gguf_q4", "i2v_base", "i2v_distill_fp8", "i2v_distill_gguf_q4"],
)
def test_a_limited_large_card_gets_the_plan_of_a_small_one(preset: str, limit: int) -> None:
    resolved = resolve(preset)
    image = {} if preset.startswith("t2v") else {"image_path": "x.png"}
    request = Request(prompt="x", **resolved.request | image)
    limited = forecast_for_machine(replace(resolved.engine, vram_gb=limit), request, H200)
    small = forecast_for_gpu(resolved.engine, request, limit)
    assert (limited.plan, limited.fits, limited.free) == (small.plan, small.fits, small.free)
    if limited.fits:
        assert max(limited.plan.bytes.values()) <= limit * GIB - DRIVER_BYTES - RESERVE
    roomy = forecast_for_machine(replace(resolved.engine, vram_gb=1000), request, H200)
    assert roomy.plan == forecast_for_machine(resolved.engine, request, H200).plan, "a limit above all changes nothing"
    assert forecast_for_gpu(replace(resolved.engine, vram_gb=limit), request, 80).plan == small.plan


def test_the_engine_plans_for_the_limit_and_allocates_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """A device of 140 GB, of which 100 are free."""
    fractions: list[float] = []
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (100 * GIB, 140 * GIB))
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", lambda share, device: fractions.append(share))
    config = resolve("demo_t2v_base").engine
    device = torch.device("cuda")
    precision = Precision(device=device, compute=torch.bfloat16, vae=torch.bfloat16)
    choice = resolve_attention("torch_sdpa", torch.device("cpu"), torch.bfloat16)
    for limit, expected in ((None, 100 * GIB), (8, 7 * GIB), (200, 100 * GIB)):
        inputs = LoadInputs(locate(config), replace(config, vram_gb=limit), precision, choice, choice)
        planner = planner_for(inputs)
        assert planner is not None and planner.vram == expected
        limit_memory(device, limit)
    assert fractions == [1.0, 7 / 140, 1.0], "without a limit an earlier one is taken away"
    limit_memory(torch.device("cpu"), 8)
    assert len(fractions) == 3


@pytest.mark.parametrize("wrong", [0, 1.5, -8, 2000, "8", True, float("nan")])
def test_a_senseless_limit_is_refused(wrong: Any) -> None:
    with pytest.raises(ConfigError, match="vram_gb is .*expected a number from 2 to 1024"):
        EngineConfig(vram_gb=wrong)


def test_a_limit_is_no_part_of_what_a_run_is() -> None:
    """A saved step continues under another limit, and a request over HTTP or in Python has no such field."""
    resolved = resolve("demo_t2v_base", {"vram_gb": 8})
    assert resolved.engine.vram_gb == 8.0 and "vram_gb" not in resolved.request
    request = Request(prompt="x", **resolved.request)
    assert settings(resolved.engine, request) == settings(replace(resolved.engine, vram_gb=None), request)
    with pytest.raises(TypeError):
        Request(prompt="x", vram_gb=8)  # type: ignore[call-arg]
