"""The demo model's video on this device against the CPU's in float32: relative errors of the latents."""

from __future__ import annotations

from torch import Tensor

from lightx2v.config.presets import resolve
from lightx2v.config.request import Request
from lightx2v.pipeline import LightX2VPipeline

from .bench import Bench


def run(bench: Bench) -> None:
    for preset in ("demo_t2v_base", "demo_t2v_distill_lora"):
        exact = latents(preset, "cpu", "fp32")
        for dtype in ("fp32", "bf16"):
            got = latents(preset, bench.device.type, dtype)
            error = float((got - exact).norm() / exact.norm())
            bench.write(f"{preset}, {dtype}", preset=preset, dtype=dtype, error=error)


def latents(preset: str, device: str, dtype: str) -> Tensor:
    settings = resolve(preset, {"device": device, "dtype": dtype, "vae_dtype": "fp32"})
    with LightX2VPipeline.from_config(settings.engine) as pipe:
        request = Request(**settings.request | {"prompt": "a red ball rolls left over green grass", "seed": 3})
        result = pipe.run(request, return_latents=True)
    assert result.latents is not None
    return result.latents
