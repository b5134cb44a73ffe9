"""Seconds and GB/s of loading tensors, next to the limits of the same machine in the same run.

    python -m benchmarks.load_speed --gb 2                      host memory
    python -m benchmarks.load_speed --gb 20 --device cuda       onto a GPU, and into memory that it may read

Writes files of random weights with the sizes of the model's (bf16 and float32 safetensors, a PyTorch file), and loads
each in several ways that take turns: `preadv` is the limit, the same threads that only read into buffers (and copy from
these to the GPU); `ours` is what loading a model calls; others are the libraries that are installed. `cold` first drops
the files from the page cache, and its limit reads with O_DIRECT. Every way ends with all tensors in place.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import os
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lightx2v.offload.host_slabs import HostSlabs
from lightx2v.weights import parallel_reader
from lightx2v.weights.checkpoint import open_checkpoint
from lightx2v.weights.host_memory import use_huge_pages

SHAPES = ((5120, 5120), (5120,), (5120, 5120), (13824, 5120), (1, 6, 5120), (5120, 13824), (5120,))
"""Some of a block's tensors."""
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
CODES = {"bf16": "BF16", "fp32": "F32"}

Way = Callable[[Path, torch.device], Any]


def write_files(folder: Path, gb: float, names: list[str]) -> dict[str, Path]:
    """{kind: file} with so many GB in each, tensor by tensor; their values do not matter."""
    rng = np.random.default_rng(0)
    noise = rng.standard_normal(1 << 20, dtype=np.float32)
    paths: dict[str, Path] = {}
    for kind in names:
        dtype = DTYPES[kind.removesuffix(".pth")]
        shapes: dict[str, tuple[int, ...]] = {}
        size = 0
        while size < gb * 1e9 or len(shapes) < len(SHAPES):
            shape = SHAPES[len(shapes) % len(SHAPES)]
            shapes[f"w{len(shapes)}"] = shape = shape if gb >= 0.5 else tuple(-(-side // 16) for side in shape)
            size += math.prod(shape) * dtype.itemsize
        if kind.endswith(".pth"):
            paths[kind] = folder / f"{kind}"
            values = torch.from_numpy(noise).to(dtype)
            count = max(map(math.prod, shapes.values()))
            values = values.repeat(-(-count // len(values)))
            torch.save(
                {name: values[: math.prod(shape)].view(shape).clone() for name, shape in shapes.items()}, paths[kind]
            )
            continue
        paths[kind] = folder / f"{kind}.safetensors"
        header, at = {}, 0
        for name, shape in shapes.items():
            nbytes = math.prod(shape) * dtype.itemsize
            header[name] = {"dtype": CODES[kind], "shape": shape, "data_offsets": [at, at + nbytes]}
            at += nbytes
        text = json.dumps(header).encode()
        block = torch.from_numpy(noise).to(dtype).view(torch.uint8).numpy().tobytes()
        with paths[kind].open("wb") as out:
            out.write(len(text).to_bytes(8, "little") + text)
            while at > 0:
                out.write(block[: min(at, len(block))])
                at -= len(block)
    return paths


# ---- ways of loading ------------------------------------------------------------------------------------------------


def ours(path: Path, device: torch.device) -> Any:
    return dict(open_checkpoint(path).tensors(dtype_of=lambda _: torch.bfloat16, device=device))


def preadv(path: Path, device: torch.device, flags: int = 0) -> Any:
    """The limit: threads read pieces of the file into buffers of their own, pinned for a GPU, and copy them there."""
    piece, size = 32 << 20, path.stat().st_size
    local, file = threading.local(), os.open(path, os.O_RDONLY | flags)
    cuda = device.type == "cuda"
    area = torch.empty(piece * 16, dtype=torch.uint8, device=device) if cuda else torch.empty(0)

    def read(at: int) -> None:
        if not hasattr(local, "buffers"):
            room = torch.empty(2, piece + 4096, dtype=torch.uint8, pin_memory=cuda)
            local.buffers = [row[-row.data_ptr() % 4096 :][:piece] for row in room]
            local.stream = torch.cuda.Stream(device) if cuda else None
            local.events = [torch.cuda.Event(), torch.cuda.Event()] if cuda else []
            local.mine = area[threading.get_ident() % 16 * piece :][:piece]
        local.buffers.reverse()
        if cuda:
            local.events.reverse()
            local.events[0].synchronize()
        os.preadv(file, [local.buffers[0].numpy().data], at)
        if cuda:
            with torch.cuda.stream(local.stream):
                local.mine.copy_(local.buffers[0], non_blocking=True)
                local.events[0].record()

    with ThreadPoolExecutor(threads()) as pool:
        list(pool.map(read, range(0, size, piece)))
    if cuda:
        torch.cuda.synchronize()
    os.close(file)


def load_file(path: Path, device: torch.device) -> Any:
    from safetensors.torch import load_file as load

    return {name: tensor.to(torch.bfloat16, copy=True) for name, tensor in load(path, device=str(device)).items()}


def torch_load(path: Path, device: torch.device) -> Any:
    state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    return {name: tensor.to(device, torch.bfloat16, copy=True) for name, tensor in state.items()}


def instanttensor(path: Path, device: torch.device) -> Any:
    import instanttensor  # pyright: ignore[reportMissingImports]

    with instanttensor.safe_open(str(path), framework="pt", device="cuda:0") as file:
        return {name: tensor.to(torch.bfloat16, copy=True) for name, tensor in file.tensors()}


def fastsafetensors(path: Path, device: torch.device) -> Any:
    from fastsafetensors import SafeTensorsFileLoader, SingleGroup  # pyright: ignore[reportMissingImports]

    loader = SafeTensorsFileLoader(SingleGroup(), str(device), nogds=True)
    loader.add_filenames({0: [str(path)]})
    buffer = loader.copy_files_to_device()
    tensors = {name: buffer.get_tensor(name).to(torch.bfloat16, copy=True) for name in loader.get_keys()}
    buffer.close()
    loader.close()
    return tensors


def runai(path: Path, device: torch.device) -> Any:
    from runai_model_streamer import SafetensorsStreamer  # pyright: ignore[reportMissingImports]

    with SafetensorsStreamer() as streamer:
        streamer.stream_file(str(path))
        return {name: tensor.to(device, torch.bfloat16, copy=True) for name, tensor in streamer.get_tensors()}


def threads() -> int:
    return min(parallel_reader.THREADS, len(os.sched_getaffinity(0)))


# ---- host memory for a GPU ------------------------------------------------------------------------------------------


def touch_and_register(path: Path, device: torch.device) -> Any:
    """The limit of fresh pinned memory: huge pages that threads touch, then registered."""
    size = path.stat().st_size
    memory = torch.empty(size, dtype=torch.uint8)
    use_huge_pages(memory)
    step = -(-size // threads())
    with ThreadPoolExecutor(threads()) as pool:
        list(pool.map(lambda at: memory[at : at + step : 4096].fill_(1), range(0, size, step)))
    if device.type == "cuda":
        runtime: Any = torch.cuda.cudart()
        assert int(runtime.cudaHostRegister(memory.data_ptr(), size, 0)) == 0
        runtime.cudaHostUnregister(memory.data_ptr())


class Slabs:
    """Read into pinned slabs: fresh ones, then the same again."""

    def __init__(self, device: torch.device) -> None:
        self.pool = HostSlabs(pin=device.type == "cuda")

    def __call__(self, path: Path, device: torch.device) -> Any:
        checkpoint = open_checkpoint(path)
        sizes = {name: -(-math.prod(shape) * 2 // 256) * 256 for name, shape in checkpoint.shapes.items()}
        buffers = dict(zip(sizes, self.pool.take(list(sizes.values())), strict=True))

        def into(name: str) -> torch.Tensor:
            shape = checkpoint.shapes[name]
            return buffers[name][: math.prod(shape) * 2].view(torch.bfloat16).view(shape)

        for _ in checkpoint.tensors(dtype_of=lambda _: torch.bfloat16, into=into):
            pass
        self.pool.wait()
        self.pool.give_back(list(buffers.values()))


# ---- the measurement ------------------------------------------------------------------------------------------------


def drop_from_cache(path: Path) -> None:
    file = os.open(path, os.O_RDONLY)
    os.fsync(file)
    os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(file)


def seconds(way: Way, path: Path, device: torch.device) -> float:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.synchronize()
    started = time.perf_counter()
    kept = way(path, device)
    if device.type == "cuda":
        torch.cuda.synchronize()
    took = time.perf_counter() - started
    del kept
    return took


def turns(ways: dict[str, Way], path: Path, device: torch.device, rounds: int, cold: bool) -> dict[str, list[float]]:
    took: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(rounds):
        order = list(ways) if turn % 2 == 0 else list(ways)[::-1]
        for name in order:
            if cold:
                drop_from_cache(path)
            try:
                took[name].append(seconds(ways[name], path, device))
            except (ValueError, RuntimeError, TypeError) as error:  # a library that cannot do this here
                print(f"  {name}: {error!s:.200}")
                del ways[name]
    return {name: times for name, times in took.items() if times}


def installed(ways: dict[str, Way]) -> dict[str, Way]:
    from importlib.util import find_spec

    modules = {"instanttensor": "instanttensor", "fastsafetensors": "fastsafetensors", "runai": "runai_model_streamer"}
    return {name: way for name, way in ways.items() if name not in modules or find_spec(modules[name]) is not None}


def cases(
    paths: dict[str, Path], device: torch.device, only: list[str]
) -> Iterator[tuple[str, Path, dict[str, Way], bool]]:
    libraries = installed(
        {"load_file": load_file, "instanttensor": instanttensor, "fastsafetensors": fastsafetensors, "runai": runai}
    )
    direct: Way = lambda path, device: preadv(path, device, getattr(os, "O_DIRECT", 0))  # noqa: E731
    for kind in ("bf16", "fp32", "bf16.pth"):
        if kind in only:
            others = {"torch.load": torch_load} if kind.endswith(".pth") else libraries
            yield kind, paths[kind], {"preadv": preadv, "ours": ours, **others}, False
    if "slabs" in only:
        for kind in ("bf16", "fp32"):
            slabs = Slabs(device)
            first: Way = lambda path, device: Slabs(device)(path, device)  # noqa: E731
            yield (
                f"{kind} into host memory",
                paths[kind],
                {"touch and register": touch_and_register, "fresh": first, "again": slabs},
                False,
            )
    if "cold" in only:
        yield "bf16 cold", paths["bf16"], {"O_DIRECT": direct, "ours": ours}, True


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gb", type=float, default=2.0, help="size of each file")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="where to write the files")
    parser.add_argument("--cases", default="bf16,fp32,bf16.pth,slabs,cold")
    parser.add_argument("--threads", type=int, default=parallel_reader.THREADS)
    parser.add_argument("--json", type=Path, help="write the seconds here")
    args = parser.parse_args()
    parallel_reader.THREADS = args.threads
    device, only, results = torch.device(args.device), args.cases.split(","), {}
    if device.type == "cuda":
        torch.zeros(1, device=device)
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        paths = write_files(Path(name), args.gb, ["bf16", "fp32", "bf16.pth"])
        for case, path, ways, cold in cases(paths, device, only):
            size = path.stat().st_size
            took = results[case] = turns(ways, path, device, args.rounds, cold)
            limit = statistics.median(took[next(iter(took))])
            print(f"{case}, {size / 1e9:.2f} GB, {threads()} threads, {device}", flush=True)
            for way, times in took.items():
                median = statistics.median(times)
                spread = f"{min(times):.2f} to {max(times):.2f}"
                rate, share = size / median / 1e9, limit / median
                print(f"  {way:20} {median:7.3f} s ({spread})  {rate:6.2f} GB/s  {share:5.2f} of the limit", flush=True)
    if args.json:
        args.json.write_text(json.dumps(results))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
