"""Ways in which several processes of one machine get the same weights, in turns: seconds and GB/s.

    torchrun --nproc_per_node=2 -m benchmarks.parallel_load --gb 1

`rank 0` is what loading does: rank 0 reads and broadcasts. `shares`: each process reads its share of the tensors, and
broadcasts that. `all`: each process reads everything, and nothing is exchanged. Each way ends with all tensors in all
processes. With CUDA the tensors are on the GPUs, else in host memory.
"""

from __future__ import annotations

import argparse
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.distributed as dist

from benchmarks.load_speed import write_files
from lightx2v.config.environment import Environment
from lightx2v.parallel.broadcast import BUNDLE
from lightx2v.parallel.process_group import ProcessGroup
from lightx2v.parallel.rendezvous import join
from lightx2v.weights.checkpoint import Checkpoint, open_checkpoint

Tensors = dict[str, torch.Tensor]


def rank_0(group: ProcessGroup, checkpoint: Checkpoint) -> Tensors:
    return dict(group.broadcast_stream(checkpoint.tensors(device=group.device)))


def everything(group: ProcessGroup, checkpoint: Checkpoint) -> Tensors:
    return dict(checkpoint.tensors(device=group.device))


def shares(group: ProcessGroup, checkpoint: Checkpoint) -> Tensors:
    """The processes own the bundles in turns; all know them from the headers."""
    bundles = list(_bundles(checkpoint))
    own = {name for index, names in enumerate(bundles) if index % group.size == group.rank for name in names}
    reading = checkpoint.tensors(own, device=group.device)
    found: Tensors = {}
    for index, names in enumerate(bundles):
        owner = index % group.size
        if owner == group.rank:
            flat = torch.cat([next(reading)[1].flatten().view(torch.uint8) for _ in names])
        else:
            flat = torch.empty(sum(_bytes(checkpoint, name) for name in names), dtype=torch.uint8, device=group.device)
        dist.broadcast(flat, group=group.handle, group_src=owner)
        for name, raw in zip(names, flat.split([_bytes(checkpoint, name) for name in names]), strict=True):
            found[name] = raw.view(checkpoint.dtypes[name]).view(checkpoint.shapes[name])
    return found


def _bundles(checkpoint: Checkpoint) -> Iterator[list[str]]:
    names: list[str] = []
    for _, name in checkpoint.disk_order():
        if names and sum(_bytes(checkpoint, each) for each in (*names, name)) > BUNDLE:
            yield names
            names = []
        names.append(name)
    yield names


def _bytes(checkpoint: Checkpoint, name: str) -> int:
    return math.prod(checkpoint.shapes[name]) * checkpoint.dtypes[name].itemsize


WAYS: dict[str, Callable[[ProcessGroup, Checkpoint], Tensors]] = {"rank 0": rank_0, "shares": shares, "all": everything}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gb", type=float, default=1.0, help="size of the file")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="where to write the file")
    args = parser.parse_args()
    group = join(Environment.read())
    assert isinstance(group, ProcessGroup), "start this with torchrun"
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        written = str(write_files(Path(name), args.gb, ["bf16"])["bf16"]) if group.is_rank0 else ""
        path = Path(group.broadcast_json(written))
        took: dict[str, list[float]] = {way: [] for way in WAYS}
        for turn in range(args.rounds + 1):
            for way in list(WAYS)[:: 1 if turn % 2 else -1]:
                group.all_true(True)
                started = time.perf_counter()
                tensors = WAYS[way](group, open_checkpoint(path))
                if group.device.type == "cuda":
                    torch.cuda.synchronize(group.device)
                group.all_true(True)
                if turn:  # the first turn warms up
                    took[way].append(time.perf_counter() - started)
                del tensors
        size = path.stat().st_size
        group.all_true(True)
    if group.is_rank0:
        print(f"{size / 1e9:.2f} GB of bf16, {group.size} processes, {group.device}")
        for way, times in took.items():
            median = statistics.median(times)
            spread = f"{min(times):.2f} to {max(times):.2f}"
            print(f"  {way:8} {median:6.2f} s ({spread})  {size / median / 1e9:6.2f} GB/s in each process")
    group.close()


if __name__ == "__main__":
    main()
