"""What 8 bits cost on the demo model: each layer's cosine to its original, and the latents against the merged model's.

    python -m benchmarks.fp8_quality [--seeds 4] [--json benchmarks/fp8_quality.json]

Layers: the experts with merged LoRAs, and the text encoder. Latents: before the VAE, from the same prompts and seeds
with the presets demo_*_merged and demo_*_fp8. PSNR is in decibels over the merged latents' range.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from lightx2v.config.model_paths import PROJECT
from lightx2v.config.presets import resolve
from lightx2v.config.request import Request
from lightx2v.loading.conversion import fidelity, prebuilt_conversions
from lightx2v.loading.model_files import locate
from lightx2v.pipeline import LightX2VPipeline
from lightx2v.weights.quantization import FORMATS, MIN_COSINE

PROMPTS = (
    "a yellow star bounces on the beach at sunset",
    "a red ball moves right over green grass",
    "a blue square in the snow at night",
    "a green triangle spins on sand",
)


def of_layers(task: str) -> dict[str, dict[str, Any]]:
    """For each format and part: the lowest cosine, its layer, and the number of layers."""
    config = resolve(f"demo_{task}_fp8").engine
    rows = {}
    for form in FORMATS:
        for part, job in prebuilt_conversions(locate(config), config, Path(), "fp32").items():
            found = fidelity(replace(job, format=form))
            worst = min(found, key=lambda name: found[name])
            rows[f"{task} {part} {form}"] = {"layers": len(found), "lowest": round(found[worst], 6), "layer": worst}
    return rows


def psnr(got: Tensor, exact: Tensor) -> float:
    error = (got.double() - exact.double()).square().mean().item()
    return 10 * math.log10((exact.max() - exact.min()).item() ** 2 / error)


def of_latents(task: str, seeds: int) -> dict[str, Any]:
    pictures = sorted((PROJECT / "assets/demo/examples").glob("*.png"))
    made: dict[str, list[Tensor]] = {}
    for variant in ("merged", "fp8"):
        resolved = resolve(f"demo_{task}_{variant}")
        with LightX2VPipeline.from_config(resolved.engine) as pipe:
            for seed in range(seeds):
                for n, prompt in enumerate(PROMPTS):
                    fields = resolved.request | {"prompt": prompt, "seed": seed}
                    if task == "i2v":
                        fields["image_path"] = str(pictures[n % len(pictures)])
                    latents = pipe.run(Request(**fields), return_latents=True).latents
                    assert latents is not None
                    made.setdefault(variant, []).append(latents)
    decibels = [psnr(got, exact) for got, exact in zip(made["fp8"], made["merged"], strict=True)]
    return {
        "videos": len(decibels),
        "median_dB": round(statistics.median(decibels), 1),
        "lowest_dB": round(min(decibels), 1),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    layers: dict[str, Any] = {}
    latents: dict[str, Any] = {}
    for task in ("t2v", "i2v"):
        layers |= of_layers(task)
        latents[task] = of_latents(task, args.seeds)
    for name, row in layers.items():
        print(f"{name:16} {row['layers']:4} layers, lowest cosine {row['lowest']:.5f}  {row['layer']}")
    for task, row in latents.items():
        decibels = f"{row['median_dB']} dB, lowest {row['lowest_dB']}"
        print(f"{task} latents, FP8 against merged: PSNR {decibels}, of {row['videos']} videos")
    if args.json:
        args.json.write_text(json.dumps({"layers": layers, "latents": latents}, indent=1) + "\n")
    return 0 if all(row["lowest"] >= MIN_COSINE for name, row in layers.items() if name.endswith("fp8")) else 1


if __name__ == "__main__":
    raise SystemExit(main())
