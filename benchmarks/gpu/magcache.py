"""Whole runs of 40 steps at 480p with and without MagCache, taking turns; and a forward with and without NAG.

The experts have LAYERS of their 40 blocks. A skipped forward still embeds and runs the head, which weighs more beside
fewer blocks: with all blocks the ratio is larger.
"""

from __future__ import annotations

import statistics
import tempfile
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from PIL import Image

from lightx2v.config.magcache import forwards_of
from lightx2v.config.presets import resolve
from lightx2v.config.request import Request
from lightx2v.engine.run import Run
from lightx2v.models.block import Nag

from .bench import Bench
from .model import Model, engine, expert

LAYERS = 10
ROUNDS = 1
CLIP = "480p"


@torch.inference_mode()
def run(bench: Bench) -> None:
    layers = min(LAYERS, bench.sizes.dit.num_layers)
    small = replace(bench.sizes, dit=replace(bench.sizes.dit, num_layers=layers))
    nag(bench)
    bench.clear()
    bench.sizes = small
    with tempfile.TemporaryDirectory() as folder:
        for task in ("t2v", "i2v"):
            whole(bench, task, Path(folder))
            bench.clear()


def whole(bench: Bench, task: str, folder: Path) -> None:
    """Denoising is compared, and the whole run with text, image and decoding."""
    height, width, frames = bench.sizes.clips[CLIP]
    picture = folder / "first.png"
    Image.effect_noise((width, height), 60).convert("RGB").save(picture)
    shown = {} if task == "t2v" else {"image_path": str(picture)}
    size = {"height": height, "width": width, "frames": frames}
    exact = Request(**resolve(f"{task}_base").request | {"prompt": "a red ball", "seed": 1, **shown, **size})
    requests = {"exact": exact, "Mag": replace(exact, feature_caching="Mag")}
    loaded = engine(bench, Model(bench, task), task)
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in requests}
    peaks: dict[str, int] = {}
    counts: dict[str, dict[str, int]] = {}
    if task == "t2v":
        Run(loaded, replace(exact, steps=2)).video(None, False, False, False, False)  # warms up
    for _ in range(ROUNDS):
        for name, request in requests.items():
            result = Run(loaded, request).video(None, False, False, False, False)
            timings = result.timings
            peaks[name] = timings.peak_vram["denoise"].allocated if timings.peak_vram else 0
            taken[name].append((timings.seconds["denoise"], timings.total))
            counts[name] = result.forwards
    for name, times in taken.items():
        denoise, total = (statistics.median(column) for column in zip(*times, strict=True))
        bench.write(
            f"{task} at {CLIP}, {name}", task=task, way=name, layers=bench.sizes.dit.num_layers, denoise=denoise,
            total=total, **counts[name], peak=peaks[name],
        )  # fmt: skip
    for number, what in enumerate(("denoise", "total")):
        ratios = [before[number] / after[number] for before, after in zip(*taken.values(), strict=True)]
        forwards = forwards_of(requests["Mag"])
        bench.write(
            f"{task} at {CLIP}, times faster, {what}", task=task, what=what, ratio=statistics.median(ratios),
            least=min(ratios), most=max(ratios), forwards=forwards.total / forwards.computed,
        )  # fmt: skip


def nag(bench: Bench) -> None:
    """A forward of few blocks without guidance, as a distilled model makes it."""
    config, device = replace(bench.sizes.dit, num_layers=bench.sizes.few_layers), bench.device
    dit = expert(bench, config)
    prompt, negative = (torch.randn(rows, config.text_dim, device=device) for rows in (bench.sizes.prompt, 9))
    ways = {
        "without": dit.encode_text(prompt),
        "with": dit.encode_text(prompt, negative_LD=negative, nag=Nag(11.0, 2.5, 0.25)),
    }
    for clip in bench.sizes.clips:
        latents = torch.randn(bench.sizes.latent(clip), device=device)
        taken: dict[str, list[float]] = {name: [] for name in ways}
        for number in range(4):
            for name, text in ways.items():
                once = bench.timed(partial(dit, latents, 900.0, [text]), 1, warm_up=0)
                if number:
                    taken[name].append(once["seconds"])
        ratios = [more / less for less, more in zip(*taken.values(), strict=True)]
        seconds = {name: statistics.median(times) for name, times in taken.items()}
        bench.write(
            f"{clip}, cost of NAG", clip=clip, layers=config.num_layers, ratio=statistics.median(ratios),
            least=min(ratios), most=max(ratios), **seconds,
        )  # fmt: skip
