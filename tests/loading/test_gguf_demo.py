"""The demo model as GGUF Q8_0, written by the `gguf` package, next to itself in bf16."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from gguf_files import EXPERTS, expert, quantised, write_gguf

from lightx2v.config.presets import resolve
from lightx2v.config.request import Request
from lightx2v.pipeline import LightX2VPipeline

DEMO = Path(__file__).parents[2] / "assets" / "demo" / "Wan2.2-T2V-Demo"


def frames(preset: str, **settings: object) -> np.ndarray:
    resolved = resolve(preset, {"dtype": "bf16", "seed": 5, "device": "cpu"} | settings)
    with LightX2VPipeline.from_config(resolved.engine) as pipe:
        request = Request(prompt="a red ball rolls left over green grass", **resolved.request)
        made = pipe.run(request, return_frames=True).frames
    assert made is not None
    return np.asarray(made, dtype=np.float64)


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    assert a.shape == b.shape
    return float(10 * np.log10(255**2 / ((a - b) ** 2).mean()))


@pytest.fixture(scope="module")
def q8_0(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("demo")
    named = {}
    for which in EXPERTS:
        tensors = {
            name: quantised(tensor, "Q8_0") if tensor.dim() == 2 and tensor.shape[1] % 32 == 0 else tensor.float()
            for name, tensor in expert(DEMO, which).items()
        }
        path = write_gguf(folder / f"wan2.2_t2v_{which}_noise_demo_Q8_0.gguf", tensors)
        named[f"{which}_noise_original_ckpt"] = str(path)
    return named


@pytest.mark.slow
@pytest.mark.parametrize(("preset", "least"), [("demo_t2v_base", 99.0), ("demo_t2v_distill_lora", 99.0)])
def test_the_video_is_close_to_that_of_bf16(q8_0: dict[str, str], preset: str, least: float) -> None:
    """With the distilled LoRAs added to the dequantised weights, too. Measured: X and Y dB."""
    found = psnr(frames(preset, **q8_0), frames(preset))
    assert least < found < 90, found
