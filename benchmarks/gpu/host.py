"""The speed of copies from each kind of host memory, and whether the host waits for them.

Offloading uses `registered` memory (`offload.host_slabs.HostSlabs`). A call that does not wait for its copy
returns in microseconds.
"""

from __future__ import annotations

import time

import torch
from torch import Tensor

from lightx2v.offload.host_slabs import HostSlabs

from .bench import Bench

SIZE = 703 << 20
"""About one block in bf16."""


def run(bench: Bench) -> None:
    size = 1 << 20 if bench.tiny else SIZE
    if bench.cuda:
        torch.zeros(1, device=bench.device)
        room = torch.empty(size, dtype=torch.uint8)
        code = torch.cuda.cudart().cudaHostRegister(room.data_ptr(), size, 0)
        bench.write("cudaHostRegister", code=str(code), is_pinned=room.is_pinned())
        torch.cuda.cudart().cudaHostUnregister(room.data_ptr())
    pools = {"pageable": HostSlabs(pin=False), "registered": HostSlabs(pin=True)}
    kinds = {name: slabs.take([size])[0] for name, slabs in pools.items()}
    for slabs in pools.values():
        slabs.wait()
    if bench.cuda:
        kinds["torch's pinned memory"] = torch.empty(size, dtype=torch.uint8, pin_memory=True)
    target = torch.empty(size, dtype=torch.uint8, device=bench.device)
    for name, source in kinds.items():
        source[:: 1 << 12] = 1  # every page is there
        measure(bench, name, source[:size], target)
    after_pause(bench, kinds["registered"][:size], target)


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


def after_pause(bench: Bench, source: Tensor, target: Tensor) -> None:
    """Time single copies after the device was idle, as it is while a model loads."""
    time.sleep(0 if bench.tiny else 5)
    rates = []
    for _ in range(24):
        seconds = bench.timed(lambda: target.copy_(source, non_blocking=True), 1, warm_up=0)["seconds"]
        rates.append(round(len(source) / seconds / 1e9, 1))
    bench.write("after a pause", gbytes_per_second=rates[0], rates=rates)
