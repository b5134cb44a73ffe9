"""What the denoising loop costs besides the model: solver, finite check, cancel check, callback.

    python -m benchmarks.loop_overhead [--forward-ms 20] [--repeats 5]

The model is replaced by a forward that takes a fixed time, so that everything else is overhead. The claim: below 2 % of
a 4-step run of the demo model (20 ms a forward). At 480p read the milliseconds: there, a real forward takes seconds.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch

from lightx2v.progress import CancelToken
from lightx2v.sampling import Euler, Solver, UniPC, denoise, distill_schedule, initial_noise, unipc_schedule

SHAPES = {"demo 64x64x17": (16, 5, 8, 8), "480p 480x832x81": (16, 21, 60, 104)}


def four_steps() -> Solver:
    return Euler(distill_schedule([1000, 750, 500, 250], 5.0, 2))


def forty_steps() -> Solver:
    return UniPC(unipc_schedule(40, 12.0, 0.875))


def overhead_of(solver: Solver, shape: tuple[int, ...], forward_seconds: float) -> tuple[float, float]:
    """Seconds of the whole loop, and of it what was not spent in the forward."""
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


if __name__ == "__main__":
    main()
