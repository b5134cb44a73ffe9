"""Peak memory and time of loading fp32 shards as bf16. Each way runs in a fresh process and touches every loaded page.

    python -m benchmarks.load_rss --gib 2 --tensor_mib 256

Makes a folder with shards of that size (warm page cache) and loads it in three ways: ours (`load_into`), a state dict
(`safetensors.load_file` of every shard, then cast), and `safe_open` one tensor at a time. The bound for ours is the
bf16 size + the largest tensor + 300 MB, for the whole process with the interpreter and torch.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import zlib
from pathlib import Path

import torch
from torch import nn

from lightx2v.weights.checkpoint import open_checkpoint
from lightx2v.weights.module_loader import load_into

SLACK = 300_000_000
METHODS = ("ours", "load_file", "safe_open")


class Matrices(nn.Module):
    """A module with as many square matrices as the shards hold."""

    def __init__(self, shapes: dict[str, tuple[int, ...]]) -> None:
        super().__init__()
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.empty(shape, device="meta")))


def write_shards(folder: Path, gib: float, tensor_mib: int, shards: int) -> None:
    """Write fp32 shards with an index, tensor by tensor: the test must not use the memory that it measures."""
    rows, size = tensor_mib * 256, tensor_mib * 2**20
    count = max(shards, round(gib * 1024 / tensor_mib))
    weight_map: dict[str, str] = {}
    noise = torch.randn(256, 1024).numpy().tobytes()  # 1 MiB, repeated: a child inherits its parent's peak memory
    for shard in range(shards):
        names = [f"w{index}" for index in range(shard * count // shards, (shard + 1) * count // shards)]
        file = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
        spans = {name: [i * size, (i + 1) * size] for i, name in enumerate(names)}
        header = {n: {"dtype": "F32", "shape": [rows, 1024], "data_offsets": span} for n, span in spans.items()}
        text = json.dumps(header).encode()
        with (folder / file).open("wb") as out:
            out.write(len(text).to_bytes(8, "little") + text)
            for _ in range(len(names) * tensor_mib):
                out.write(noise)
        weight_map |= dict.fromkeys(names, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def load(method: str, folder: Path) -> nn.Module:
    checkpoint = open_checkpoint(folder)
    module = Matrices(checkpoint.shapes)
    bf16 = torch.bfloat16
    if method == "ours":
        load_into(module, checkpoint, dtype_of=lambda _: bf16, device="cpu")
        return module
    from safetensors import safe_open
    from safetensors.torch import load_file

    state: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        if method == "load_file":
            state |= load_file(path)
            continue
        with safe_open(path, "pt") as file:
            for name in file.keys():
                state[name] = file.get_tensor(name).to(bf16)
    module.load_state_dict({name: tensor.to(bf16) for name, tensor in state.items()}, assign=True)
    return module


def own_peak() -> int:
    """Peak resident bytes of this process alone: ru_maxrss starts from the parent's value at the fork."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["VmHWM"].split()[0]) * 1024


def measure(method: str, folder: Path) -> dict[str, float]:
    """Load once in this process, and read every page of the result before taking the peak."""
    before, start, cpu = own_peak(), time.perf_counter(), time.process_time()
    module = load(method, folder)
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    checksum = 0
    for parameter in module.parameters():
        checksum = zlib.crc32(memoryview(parameter.detach().view(torch.uint8).numpy()), checksum)
    return {"before": before, "peak": own_peak(), "seconds": seconds, "cpu": cpu, "checksum": checksum}


def measure_in_child(method: str, folder: Path) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.load_rss", "--child", method, "--folder", str(folder)]
    quiet = os.environ | {"OMP_NUM_THREADS": "1"}  # on a shared machine OpenMP's waiting threads are what is measured
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True, env=quiet).stdout)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gib", type=float, default=2.0, help="size of the fp32 shards")
    parser.add_argument("--tensor_mib", type=int, default=64, help="size of one tensor in fp32")
    parser.add_argument("--shards", type=int, default=4)
    parser.add_argument("--child", choices=METHODS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(measure(args.child, args.folder)))
        return 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_shards(folder, args.gib, args.tensor_mib, args.shards)
        checkpoint = open_checkpoint(folder)
        half, largest = (
            checkpoint.nbytes / 2,
            max(entry.nbytes for f in checkpoint.files for entry in f.entries.values()),
        )
        bound = half + largest + SLACK
        results = {method: measure_in_child(method, folder) for method in METHODS}
    print(f"fp32 {2 * half / 1e9:.2f} GB -> bf16 {half / 1e9:.2f} GB, largest tensor {largest / 1e6:.0f} MB")
    for method, result in results.items():
        rate = 2 * half / result["seconds"] / 1e9
        print(
            f"{method:10} {result['seconds']:6.2f} s (cpu {result['cpu']:.2f} s)  {rate:5.2f} GB/s  "
            f" peak {result['peak'] / 1e9:5.2f} GB   (before loading {result['before'] / 1e9:.2f} GB)"
        )
    kept = results["ours"]["peak"] <= bound and len({result["checksum"] for result in results.values()}) == 1
    print(f"bound {bound / 1e9:.2f} GB: {'kept' if kept else 'BROKEN'}")
    return 0 if kept else 1


if __name__ == "__main__":
    raise SystemExit(main())
