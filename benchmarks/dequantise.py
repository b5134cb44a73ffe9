"""The speed of dequantising GGUF weights on a CPU, against the `gguf` package.

    OMP_NUM_THREADS=2 python -m benchmarks.dequantise [--rows 13824] [--columns 5120] [--results FILE]

One expert has 14 billion weights in blocks. The aim is half a billion weights a second on two cores for Q8_0 and Q4_K.
"""

from __future__ import annotations

import argparse
import json
import platform
from pathlib import Path

import numpy as np
import torch
from gguf import GGMLQuantizationType, quants

from lightx2v.cost.machine import MachineReader
from lightx2v.weights.gguf_blocks import FORMATS, dequantise

from .quantise import best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=13824)
    parser.add_argument("--columns", type=int, default=5120)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--formats", default=",".join(FORMATS))
    parser.add_argument("--results", help="write JSON lines for docs/performance.md")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    billions = options.rows * options.columns / 1e9
    name, size = MachineReader()().name, f"{options.rows} x {options.columns}"
    print(f"{name}, {size}, {options.threads} threads, torch {torch.__version__}; billion weights a second")
    print(f"{'':8}{'to bf16':>10}{'to float32':>12}{'gguf package':>14}")
    lines: list[dict[str, object]] = [
        {"machine": name, "threads": options.threads, "matrix": size, "torch": torch.__version__,
         "python": platform.python_version(), "command": "python -m benchmarks.dequantise"}
    ]  # fmt: skip
    for form in (FORMATS[each] for each in options.formats.split(",")):
        raw = torch.randint(0, 60, (options.rows, form.row_bytes(options.columns)), dtype=torch.uint8)
        kind, array = GGMLQuantizationType[form.name], raw.numpy()
        theirs = quants.dequantize(array[:8], kind)
        assert np.array_equal(dequantise(raw[:8], form).numpy(), theirs, equal_nan=True)
        calls = (
            lambda raw=raw, form=form: dequantise(raw, form, torch.bfloat16),
            lambda raw=raw, form=form: dequantise(raw, form, torch.float32),
        )
        speeds = [billions / best(call, options.runs) for call in calls]
        speeds.append(billions / best(lambda array=array, kind=kind: quants.dequantize(array, kind), 1))
        print(f"{form.name:8}{speeds[0]:10.2f}{speeds[1]:12.2f}{speeds[2]:14.2f}", flush=True)
        shown = [f"{speed:.2f}" for speed in speeds]
        lines.append({"format": form.name, "to bf16": shown[0], "to float32": shown[1], "gguf package": shown[2]})
    if options.results:
        Path(options.results).write_text("".join(json.dumps(line) + "\n" for line in lines), "utf-8")


if __name__ == "__main__":
    main()
