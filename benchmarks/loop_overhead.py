"""The denoising loop's cost besides the model: solver, finite check, cancel check, callback.

    python -m benchmarks.loop_overhead [--forward-ms 20] [--repeats 5]

First it uses a forward of fixed duration, so that everything else is overhead; at 480p look at the milliseconds,
because a real forward takes seconds there. Then it measures how long the denoising stage of a whole demo run is
outside the forwards, including the text's keys, progress and memory readings. The claim: below 2 % of a 4-step run.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import torch

from lightx2v.config.presets import resolve
from lightx2v.config.request import Request
from lightx2v.config.schedule import shifted_schedule, step_list_schedule
from lightx2v.models.dit import WanDiT
from lightx2v.pipeline import LightX2VPipeline
from lightx2v.progress import CancelToken
from lightx2v.sampling import Euler, Solver, UniPC, denoise, initial_noise

SHAPES = {"demo 64x64x17": (16, 5, 8, 8), "480p 480x832x81": (16, 21, 60, 104)}


def four_steps() -> Solver:
    return Euler(step_list_schedule([1000, 750, 500, 250], 5.0, 2))


def forty_steps() -> Solver:
    return UniPC(shifted_schedule(40, 12.0, 0.875))


def overhead_of(solver: Solver, shape: tuple[int, ...], forward_seconds: float) -> tuple[float, float]:
    """Seconds of the whole loop, and of the part outside the forward."""
    answer = torch.randn(shape) * 0.01
    inside = 0.0

    def velocity(expert: str, latents: torch.Tensor, timestep: float, i: int) -> torch.Tensor:
        nonlocal inside
        start = time.perf_counter()
        while time.perf_counter() - start < forward_seconds:  # spin: sleeping wakes up late
            pass
        inside += time.perf_counter() - start
        return answer

    noise = initial_noise(shape, 0)
    start = time.perf_counter()
    denoise(solver, velocity, noise, on_step=lambda i, latents, x0: None, cancel=CancelToken())
    total = time.perf_counter() - start
    return total, total - inside


def demo_run(repeats: int) -> tuple[float, float]:
    """Medians over runs of the 4-step demo model: seconds of denoising, and of the part outside the forwards."""
    resolved = resolve("demo_t2v_merged", {"device": "cpu"})
    forward, inside, runs = WanDiT.forward, 0.0, []

    def timed(self: WanDiT, *args: Any, **options: Any) -> Any:
        nonlocal inside
        start = time.perf_counter()
        velocity = forward(self, *args, **options)
        inside += time.perf_counter() - start
        return velocity

    WanDiT.forward = timed
    with LightX2VPipeline.from_config(resolved.engine) as pipe:
        for seed in range(repeats + 1):  # the first one warms up
            inside = 0.0
            request = Request(prompt="a red ball rolls left", **(dict(resolved.request) | {"seed": seed}))
            seconds = pipe.run(request).timings.seconds["denoise"]
            runs.append((seconds, seconds - inside))
    total, extra = zip(*runs[1:], strict=True)
    return statistics.median(total), statistics.median(extra)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--forward-ms", type=float, default=20.0)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    print(
        f"{'latents':<18} {'solver':<14} {'loop ms':>9} {'overhead ms':>12} {'share':>7}   (median of {args.repeats})"
    )
    for shape_name, shape in SHAPES.items():
        for solver_name, make in (("Euler 4 steps", four_steps), ("UniPC 40 steps", forty_steps)):
            overhead_of(make(), shape, 0.0)  # warm up
            runs = [overhead_of(make(), shape, args.forward_ms / 1000) for _ in range(args.repeats)]
            total, extra = (statistics.median(values) * 1000 for values in zip(*runs, strict=True))
            print(f"{shape_name:<18} {solver_name:<14} {total:9.2f} {extra:12.3f} {extra / total:7.2%}")
    total, extra = demo_run(args.repeats)
    print(f"a run of the demo model, 4 steps: {1000 * total:9.2f} {1000 * extra:12.3f} {extra / total:7.2%}")


if __name__ == "__main__":
    main()
