"""The streamed VAE decoder against diffusers' AutoencoderKLWan: same weights, same latents, taking turns.

    python -m benchmarks.vae_decode                               # real width, 9 frames 128x128, float32, 2 threads
    python -m benchmarks.vae_decode --dim 16 --res-blocks 1 --frames 17  # the demo model's shape
    python -m benchmarks.vae_decode --device cuda --dtype bf16 --alone --frames 81 --size 720 1280

First it compares the outputs. Then the decoders run A B A B, so that a busy machine slows both. Each pair gives one
ratio of times; the result is the median of the ratios with their quartiles. On a machine with other work the ratio of
processor seconds is steadier (set OMP_WAIT_POLICY=PASSIVE). The last line is JSON. `--alone` leaves diffusers out; on
CUDA the peak memory is measured and set against `decode_bytes`, which counts for the released width.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from lightx2v.config.architecture import tile_side
from lightx2v.cost.memory_bytes import decode_bytes
from lightx2v.cost.memory_plan import ModelSize, Workload
from lightx2v.models.tiling import Tiling
from lightx2v.models.vae_config import VAEConfig

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "support"))
from vae_reference import random_vae, relative_error, same_in_diffusers
from vae_reference import statistics as latent_statistics

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def main() -> None:
    args = parse()
    torch.set_num_threads(args.threads)
    dtype = DTYPES[args.dtype]
    config = VAEConfig(dim=args.dim, res_blocks=args.res_blocks)
    vae = random_vae(config)
    height, width = (side // 8 for side in args.size)
    latents = torch.randn(16, (args.frames - 1) // 4 + 1, height, width, device=args.device)
    tiling = Tiling(size=args.tile, overlap=args.tile // 4) if args.tile else None
    other = None if args.alone else same_in_diffusers(vae).to(args.device, dtype)
    vae = vae.to(args.device, dtype)

    def ours() -> Tensor:
        return torch.cat([frames.cpu() for frames in vae.decode(latents, tiling=tiling)], dim=1)

    def theirs() -> Tensor:
        assert other is not None
        mean, std = (value.to(args.device) for value in latent_statistics(other))
        return other.decode((latents[None] * std + mean).to(dtype)).sample[0].cpu()

    settings = {key: value for key, value in vars(args).items() if key != "size"} | {"height": args.size[0]}
    result = {"benchmark": "vae_decode", **settings, "width": args.size[1], "torch": torch.__version__}
    print(f"{args.frames} frames of {args.size[0]}x{args.size[1]}, width {args.dim}, {args.dtype}, {args.device}")
    if other is not None:
        result["difference"] = relative_error(ours(), theirs().float())
        print(f"outputs differ by {result['difference']:.1e} of the largest value")
        assert result["difference"] <= (1e-4 if dtype == torch.float32 else 0.1)
    else:
        ours()
    runs = [ours] if other is None else [ours, theirs]
    seconds, processor = take_turns(runs, args.rounds)
    result["ours_s"] = seconds[0]
    print(f"ours {statistics.median(seconds[0]):.3f} s (median of {args.rounds})")
    if other is not None:
        ratios = [a / b for a, b in zip(*seconds, strict=True)]
        low, median, high = statistics.quantiles(ratios, n=4)
        result |= {"diffusers_s": seconds[1], "ratio": median, "ratio_quartiles": [low, high]}
        print(f"diffusers {statistics.median(seconds[1]):.3f} s")
        print(f"ratio {median:.3f} (quartiles {low:.3f} to {high:.3f})")
        result["processor_ratio"] = statistics.median(a / b for a, b in zip(*processor, strict=True))
        print(f"ratio of processor seconds {result['processor_ratio']:.3f}")
    if args.device == "cuda":
        sides = [tile_side(side, tiling.size, tiling.overlap) if tiling else side for side in (height, width)]
        video = Workload(tokens=0, height=sides[0], width=sides[1])
        result |= memory(ours, decode_bytes(ModelSize(vae_element=dtype.itemsize), video))
        result["device_name"] = torch.cuda.get_device_name()
    print(json.dumps(result | {"machine": platform.machine()}))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dim", type=int, default=96, help="base width; 96 is the released VAE")
    parser.add_argument("--res-blocks", type=int, default=2)
    parser.add_argument("--frames", type=int, default=9)
    parser.add_argument("--size", type=int, nargs=2, default=(128, 128), metavar=("H", "W"))
    parser.add_argument("--tile", type=int, default=0, help="ours in tiles of so many latents a side")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    parser.add_argument("--alone", action="store_true", help="without diffusers")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    return parser.parse_args()


def take_turns(runs: list[Callable[[], Tensor]], rounds: int) -> tuple[list[list[float]], list[list[float]]]:
    """Wall and processor seconds of each run in each round. A first run of each is not counted.

    Results end in host memory, so work on a GPU is done when the clock stops.
    """
    wall: list[list[float]] = [[] for _ in runs]
    processor: list[list[float]] = [[] for _ in runs]
    for _ in range(rounds):
        for index, run in enumerate(runs):
            start, start_processor = time.perf_counter(), time.process_time()
            run()
            wall[index].append(time.perf_counter() - start)
            processor[index].append(time.process_time() - start_processor)
    return wall, processor


def memory(decode: Callable[[], Tensor], estimate: int) -> dict[str, int]:
    """Peak bytes of one decode above the start, and the estimate."""
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    decode()
    allocated, reserved = (
        peak() - before for peak in (torch.cuda.max_memory_allocated, torch.cuda.max_memory_reserved)
    )
    print(
        f"peak {allocated / 2**30:.2f} GiB allocated, {reserved / 2**30:.2f} reserved; estimate {estimate / 2**30:.2f}"
    )
    return {"allocated": allocated, "reserved": reserved, "estimate": estimate}


if __name__ == "__main__":
    with torch.inference_mode():
        main()
