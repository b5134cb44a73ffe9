"""The time that image-to-video saves by encoding equal grey chunks once: `encode_condition` against `encode`.

    python -m benchmarks.vae_condition                  # width 16, 81 frames 64x64, 2 threads
    python -m benchmarks.vae_condition --dim 96 --size 128 128
    python -m benchmarks.vae_condition --last           # first and last frame

First it compares both results bit by bit. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

import torch
from torch import Tensor

from lightx2v.models.vae_config import VAEConfig

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "support"))
from vae_reference import random_vae


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dim", type=int, default=16, help="base width; 96 is the released VAE")
    parser.add_argument("--frames", type=int, default=81)
    parser.add_argument("--size", type=int, nargs=2, default=(64, 64), metavar=("H", "W"))
    parser.add_argument("--last", action="store_true", help="a last frame too")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    vae = random_vae(VAEConfig(dim=args.dim)).to(args.device, torch.bfloat16 if args.dtype == "bf16" else torch.float32)
    first, last = (torch.rand(3, *args.size, device=args.device) * 2 - 1 for _ in range(2))
    video = torch.zeros(3, args.frames, *args.size, device=args.device)
    video[:, 0] = first
    if args.last:
        video[:, -1] = last

    def short() -> Tensor:
        return vae.encode_condition(args.frames, first, last if args.last else None).cpu()

    def whole() -> Tensor:
        return vae.encode(video).cpu()

    assert torch.equal(short(), whole()), "the latents differ"
    seconds: dict[str, list[float]] = {"condition_s": [], "whole_s": []}
    for _ in range(args.rounds):
        for run, times in zip((short, whole), seconds.values(), strict=True):
            start = time.perf_counter()
            run()
            times.append(time.perf_counter() - start)
    ratios = [a / b for a, b in zip(*seconds.values(), strict=True)]
    low, median, high = statistics.quantiles(ratios, n=4)
    print(f"{args.frames} frames of {args.size[0]}x{args.size[1]}, width {args.dim}: equal bit by bit")
    for name, times in seconds.items():
        print(f"{name} {statistics.median(times):.3f} (median of {args.rounds})")
    print(f"saved {1 - median:.1%} (quartiles {1 - high:.1%} to {1 - low:.1%})")
    print(json.dumps({"benchmark": "vae_condition", "saved": 1 - median, **seconds, **vars(args)}))


if __name__ == "__main__":
    with torch.inference_mode():
        main()
