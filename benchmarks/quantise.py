"""The speed of quantizing weights to 8 bits and back, against the same formula written in one line.

    OMP_NUM_THREADS=2 python -m benchmarks.quantise [--rows 13824] [--columns 5120] [--threads 2]

GB/s counts the bytes of the bf16 weights; one expert has 28.6 GB.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
from torch import Tensor

from lightx2v.weights.quantization import FORMATS, LARGEST, dequantise, quantise


def one_line(weight: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    values = weight.float()
    scale = values.abs().amax(1, keepdim=True).clamp(min=1e-5) / LARGEST[dtype]
    scaled = (values / scale).clamp(-LARGEST[dtype], LARGEST[dtype])
    return (scaled.round() if dtype == torch.int8 else scaled).to(dtype), scale


def best(call: Callable[[], object], runs: int) -> float:
    """Seconds of the fastest run without the first one, which allocates memory."""
    call()
    times = []
    for _ in range(runs):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return min(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=13824)
    parser.add_argument("--columns", type=int, default=5120)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--runs", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    weight = (torch.randn(options.rows, options.columns, generator=torch.Generator().manual_seed(0)) * 0.02).bfloat16()
    gigabytes = weight.numel() * 2 / 1e9
    print(f"{options.rows} x {options.columns} bf16, {options.threads} threads, torch {torch.__version__}; GB/s")
    print(f"{'':8}{'one line':>10}{'ours':>8}{'back to bf16, one line':>26}{'ours':>8}")
    for name, dtype in FORMATS.items():
        q, scale = quantise(weight, dtype)
        plain, plain_scale = one_line(weight, dtype)
        assert torch.equal(q.view(torch.int8), plain.view(torch.int8)) and torch.equal(scale, plain_scale)
        calls = (
            lambda dtype=dtype: one_line(weight, dtype),
            lambda dtype=dtype: quantise(weight, dtype),
            lambda q=q, scale=scale: (q.float() * scale).bfloat16(),
            lambda q=q, scale=scale: dequantise(q, scale, torch.bfloat16),
        )
        speeds = [gigabytes / best(call, options.runs) for call in calls]
        print(f"{name:8}{speeds[0]:10.2f}{speeds[1]:8.2f}{speeds[2]:26.2f}{speeds[3]:8.2f}")


if __name__ == "__main__":
    main()
