"""One forward of the DiT against diffusers' WanTransformer3DModel: the same weights, the same inputs, taking turns.

    python -m benchmarks.dit_forward                 # 512 wide, 8 blocks, 2016 tokens, float32, 2 threads
    python -m benchmarks.dit_forward --rows 512      # a prompt that fills all text rows
    python -m benchmarks.dit_forward --guided        # two prompts, as with classifier-free guidance

First it compares the outputs. Then the models run A B A B, so that a busy machine slows both. Each pair gives one ratio
of times; the result is the median of the ratios with their quartiles. Processor time is printed, too: other programs
disturb it least. The last line is JSON.

A pipeline encodes a prompt once and runs every step with it, so our time excludes encoding; diffusers encodes it in
each forward. `--encode` includes it in our time, together with the keys and values made from it.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import diffusers
import torch
from torch import Tensor

from lightx2v.models.dit import DiTConfig, WanDiT

from .diffusers_twin import diffusers_twin


class Times(NamedTuple):
    wall: float
    cpu: float


def main() -> None:
    args = parse()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    config = DiTConfig(
        dim=args.dim, ffn_dim=args.ffn_dim, num_heads=args.heads, num_layers=args.layers, text_dim=args.text_dim
    )
    ours = build(config)
    theirs = diffusers_twin(ours)
    frames, height, width = args.grid
    latents = torch.randn(config.in_dim, frames, 2 * height, 2 * width)
    prompts = [torch.randn(rows, config.text_dim) for rows in ((args.rows, args.rows) if args.guided else (args.rows,))]
    padded = torch.stack([torch.nn.functional.pad(p, (0, 0, 0, config.text_len - len(p))) for p in prompts])
    timestep = torch.tensor([937.5])
    texts = [ours.encode_text(prompt) for prompt in prompts]

    def run_ours() -> list[Tensor]:
        states = [ours.encode_text(prompt) for prompt in prompts] if args.encode else texts
        return ours(latents, 937.5, states)

    def run_theirs() -> list[Tensor]:
        # diffusers' pipeline runs the prompts one after the other
        return [theirs(latents[None], timestep, text[None], return_dict=False)[0][0] for text in padded]

    difference = max(((a - b).norm() / b.norm()).item() for a, b in zip(run_ours(), run_theirs(), strict=True))
    assert difference <= 1e-5, f"the outputs differ by {difference:.1e}"
    report(args, difference, *take_turns(run_ours, run_theirs, args.rounds))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--ffn-dim", type=int, default=2048)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--text-dim", type=int, default=512)
    parser.add_argument("--grid", type=int, nargs=3, default=(7, 16, 18), metavar=("T", "H", "W"), help="in patches")
    parser.add_argument("--rows", type=int, default=60, help="rows of the prompt; the other of the 512 are padding")
    parser.add_argument("--guided", action="store_true", help="two prompts in each forward")
    parser.add_argument("--encode", action="store_true", help="encode the prompt inside the clock")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=9)
    return parser.parse_args()


def build(config: DiTConfig) -> WanDiT:
    ours = WanDiT(config).eval().requires_grad_(False)
    for parameter in ours.parameters():
        if parameter.ndim == 1:
            torch.nn.init.normal_(parameter, std=0.3)
    return ours


def take_turns(first: Callable[[], object], second: Callable[[], object], rounds: int) -> list[list[Times]]:
    """The times of both models in each round."""
    times: list[list[Times]] = [[], []]
    first(), second()
    for _ in range(rounds):
        for run, taken in zip((first, second), times, strict=True):
            wall, cpu = time.perf_counter(), time.process_time()
            run()
            taken.append(Times(time.perf_counter() - wall, time.process_time() - cpu))
    return times


def report(args: argparse.Namespace, difference: float, ours: list[Times], theirs: list[Times]) -> None:
    ratios = [a.wall / b.wall for a, b in zip(ours, theirs, strict=True)]
    cpu_ratio = statistics.median(a.cpu / b.cpu for a, b in zip(ours, theirs, strict=True))
    low, median, high = statistics.quantiles(ratios, n=4)
    ours_s, theirs_s = (statistics.median(each.wall for each in times) for times in (ours, theirs))
    tokens = args.grid[0] * args.grid[1] * args.grid[2]
    print(f"{tokens} tokens, {args.layers} blocks of {args.dim}, {args.rows} text rows, {args.threads} threads")
    print(f"outputs differ by {difference:.1e} (relative)")
    print(f"ours {ours_s:.3f} s, diffusers {theirs_s:.3f} s (medians of {args.rounds})")
    print(f"ratio {median:.3f} (quartiles {low:.3f} to {high:.3f}); of processor time {cpu_ratio:.3f}")
    settings = {key: value for key, value in vars(args).items() if key != "grid"} | {"tokens": tokens}
    versions = {"torch": torch.__version__, "diffusers": diffusers.__version__, "machine": platform.machine()}
    numbers = {"ratio": median, "ratio_quartiles": [low, high], "cpu_ratio": cpu_ratio, "ours_s": ours_s}
    numbers |= {"diffusers_s": theirs_s, "difference": difference}
    print(json.dumps({"benchmark": "dit_forward", **numbers, **settings, **versions}))


if __name__ == "__main__":
    with torch.inference_mode():
        main()
