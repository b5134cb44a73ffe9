"""How fast weights come from host memory, by the kind of that memory, and whether the host waits for the copy.

`registered` is what offloading uses (`placement.piece.host_buffer`); a copy that the host does not wait for returns in
microseconds.
"""

from __future__ import annotations

import ctypes
import mmap
import time
from pathlib import Path

import torch
from torch import Tensor

from lightx2v.placement.piece import host_buffer

from .bench import Bench

SIZE = 703 << 20
"""About one block in bf16."""
HUGE = 2 << 20


def run(bench: Bench) -> None:
    size = 1 << 20 if bench.tiny else SIZE
    if bench.cuda:
        torch.zeros(1, device=bench.device)
        room = torch.empty(size, dtype=torch.uint8)
        code = torch.cuda.cudart().cudaHostRegister(room.data_ptr(), size, 0)
        bench.write("cudaHostRegister", code=str(code), is_pinned=room.is_pinned())
        torch.cuda.cudart().cudaHostUnregister(room.data_ptr())
    kinds = {"pageable": host_buffer(size, pin=False), "registered": host_buffer(size, pin=True)}
    if bench.cuda:
        kinds["torch's pinned memory"] = torch.empty(size, dtype=torch.uint8, pin_memory=True)
    target = torch.empty(size, dtype=torch.uint8, device=bench.device)
    setting = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    nodes = len(list(Path("/sys/devices/system/node").glob("node[0-9]*")))
    bench.write("memory", huge_pages=setting.read_text().strip() if setting.is_file() else "", numa_nodes=nodes)
    many(bench, size, target)
    for name, source in kinds.items():
        source[:: 1 << 12] = 1  # every page is there
        measure(bench, name, source[:size], target)


def measure(bench: Bench, name: str, source: Tensor, target: Tensor) -> None:
    times = bench.timed(lambda: target.copy_(source, non_blocking=True), 5)
    if bench.cuda:
        torch.cuda.synchronize()
    began = time.perf_counter()
    target.copy_(source, non_blocking=True)
    waited = time.perf_counter() - began
    if bench.cuda:
        torch.cuda.synchronize()
    rate = len(source) / times["seconds"] / 1e9
    pinned = bench.cuda and torch.from_numpy(source.numpy()).is_pinned()  # of this page, not of the storage
    bench.write(name, gbytes_per_second=rate, host_waited=waited, is_pinned=pinned, **times)


def many(bench: Bench, size: int, target: Tensor) -> None:
    """Whether it matters how much memory is registered, and on what pages: a third of an expert's blocks, each way."""
    for name, make in (("usual pages", usual_pages), ("huge pages", huge_pages)):
        began, rates = time.perf_counter(), []
        buffers = [make(size) for _ in range(2 if bench.tiny else 14)]
        for buffer in buffers:
            buffer.copy_(target)  # written as a block is that was on the device
        took = time.perf_counter() - began
        for buffer in buffers:
            seconds = bench.timed(lambda b=buffer: target.copy_(b, non_blocking=True), 2)["seconds"]
            rates.append(round(len(target) / seconds / 1e9, 1))
        bench.write(f"{len(buffers)} buffers, {name}", rates=rates, made=took)
        if make is huge_pages and bench.cuda:
            for buffer in buffers:
                torch.cuda.cudart().cudaHostUnregister(buffer.data_ptr())


def usual_pages(size: int) -> Tensor:
    return host_buffer(size, pin=True)[:size]


def huge_pages(size: int) -> Tensor:
    room = torch.empty(size + HUGE, dtype=torch.uint8)
    start = -room.data_ptr() % HUGE
    buffer = room[start : start + size]
    ctypes.CDLL(None).madvise(ctypes.c_void_p(buffer.data_ptr()), ctypes.c_size_t(size), mmap.MADV_HUGEPAGE)
    if torch.cuda.is_available():
        torch.cuda.cudart().cudaHostRegister(buffer.data_ptr(), size, 0)
    return buffer
