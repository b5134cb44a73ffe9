"""Peak memory of converting the text encoder, whose token table alone is 2.1 GB.

    python -m benchmarks.convert_rss [--rows 256384] [--width 4096] [--blocks 1] [--format fp8]

Writes a .pth file with that table and with blocks of UMT5-XXL's shape (reading zeros takes as much memory as reading
weights), converts it in a process of its own, and prints seconds, GB/s and the peak resident memory, including the
interpreter and torch. The bound is 1.5 GB for a model of any size.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

BOUND = 1_500_000_000
CHILD = """
import sys, time
from pathlib import Path
import torch
from lightx2v.loading.conversion import Conversion, convert
from lightx2v.progress import peak_rss
before, started, cpu = peak_rss(), time.perf_counter(), time.process_time()
convert(Conversion(source=Path(sys.argv[1]), output=Path(sys.argv[2]), format=sys.argv[3]))
print(time.perf_counter() - started, time.process_time() - cpu, before, peak_rss())
"""


def write(path: Path, rows: int, width: int, blocks: int) -> None:
    matrix = lambda out, inner: torch.zeros(out, inner, dtype=torch.bfloat16)  # noqa: E731
    tensors = {"token_embedding.weight": matrix(rows, width), "norm.weight": torch.ones(width).bfloat16()}
    for block in (f"blocks.{index}" for index in range(blocks)):
        tensors |= {f"{block}.attn.{leaf}.weight": matrix(width, width) for leaf in "qkvo"}
        tensors |= {f"{block}.ffn.{leaf}.weight": matrix(width * 5 // 2, width) for leaf in ("gate.0", "fc1")}
        tensors[f"{block}.ffn.fc2.weight"] = matrix(width, width * 5 // 2)
    torch.save(tensors, path)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=256_384)
    parser.add_argument("--width", type=int, default=4096)
    parser.add_argument("--blocks", type=int, default=1)
    parser.add_argument("--format", default="fp8")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        source, output = Path(folder) / "t5.pth", Path(folder) / "out.safetensors"
        write(source, args.rows, args.width, args.blocks)
        size = source.stat().st_size / 1e9
        command = [sys.executable, "-c", CHILD, str(source), str(output), args.format]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    seconds, cpu, before, peak = map(float, done.stdout.split())
    print(f"{size:.2f} GB to {args.format}: {seconds:.1f} s (cpu {cpu:.1f} s), {size / seconds:.2f} GB/s")
    print(f"peak {peak / 1e9:.2f} GB, {before / 1e9:.2f} GB before; bound 1.50: {'kept' if peak < BOUND else 'BROKEN'}")
    return 0 if peak < BOUND else 1


if __name__ == "__main__":
    raise SystemExit(main())
