"""TensorFile: the interface of a reader. Each container format has one: safetensors_reader.py, pth_reader.py.

A new format is one more reader, and one line in `checkpoint.open_file`, which picks the reader by a file's first bytes.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
"""Ordinary weights are stored in these and cast between them. All others (float8, int8) keep their dtype."""

CHUNK = 4 << 20
"""Bytes read at once when a tensor is cast while it is read: small enough to stay in a processor's cache."""

DOWNLOAD_AGAIN = "Delete the file and download it again."


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One tensor of a file. `start` counts from the file's first byte; -1 if the format does not record it."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    nbytes: int


class TensorFile(Protocol):
    """One checked file of tensors. Opening reads names, shapes and dtypes, or raises CheckpointError."""

    path: Path
    entries: dict[str, TensorEntry]
    metadata: dict[str, str]

    def read(
        self,
        name: str,
        dtype: torch.dtype | None = None,
        staging: torch.Tensor | None = None,
        buffer: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The tensor in its own memory, or at the beginning of `buffer` (uint8, large enough).

        Casts an ordinary float to `dtype` on the way. `staging` is CHUNK bytes of scratch memory for that; pass the
        same one for many tensors.
        """
        ...

    def chunks(self, name: str, dtype: torch.dtype | None = None) -> Iterator[torch.Tensor]:
        """The result of `read`, flat and a few megabytes at a time: for tensors too large to hold in memory."""
        ...

    def memory_map(self, name: str) -> torch.Tensor:
        """The tensor as a private memory map: reads nothing before it is touched. Treat it as read-only."""
        ...


def cast_target(stored: torch.dtype, wanted: torch.dtype | None) -> torch.dtype:
    """The dtype in which a tensor leaves its file."""
    return wanted if wanted in FLOATS and stored in FLOATS else stored


def allocate(shape: tuple[int, ...], dtype: torch.dtype, buffer: torch.Tensor | None) -> torch.Tensor:
    """An uninitialised tensor, at the beginning of `buffer` if there is one."""
    if buffer is None:
        return torch.empty(shape, dtype=dtype)
    return buffer[: math.prod(shape) * dtype.itemsize].view(dtype).view(shape)
