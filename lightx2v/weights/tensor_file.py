"""TensorFile: the interface of a reader, one for each container format: safetensors_reader.py, pth_reader.py,
gguf_reader.py.

A new format is one more reader, and one line in `checkpoint.open_file`, which picks the reader by a file's first bytes.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

from .gguf_blocks import BlockWeights

FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
"""Ordinary weights are stored in these and cast between them. All others (float8, int8) keep their dtype."""

CHUNK = 4 << 20
"""Bytes of one of the chunks in which a tensor comes that is too large to hold in memory."""

DOWNLOAD_AGAIN = "Delete the file and download it again."


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One tensor of a file. Its bytes begin at byte `start` of the file; -1 if they do not lie there as they are.

    Weights in `blocks` are read as their bytes: `dtype` and `shape` are uint8 [rows, bytes of a row].
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    nbytes: int
    blocks: BlockWeights | None = None


class TensorFile(Protocol):
    """One checked file of tensors. Opening reads names, shapes and dtypes, or raises CheckpointError.

    `Checkpoint` reads the bytes of all entries with a `start` itself, and takes `memory_map` of the others.
    """

    path: Path
    entries: dict[str, TensorEntry]
    metadata: dict[str, str]

    def memory_map(self, name: str) -> torch.Tensor:
        """The tensor as a private memory map: reads nothing before it is touched. Treat it as read-only."""
        ...


def cast_target(stored: torch.dtype, wanted: torch.dtype | None) -> torch.dtype:
    """The dtype in which a tensor leaves its file."""
    return wanted if wanted in FLOATS and stored in FLOATS else stored


def map_tensor(path: Path, entry: TensorEntry) -> torch.Tensor:
    """A private memory map of a tensor with a `start`."""
    if not entry.nbytes:
        return torch.empty(entry.shape, dtype=entry.dtype)
    raw = torch.from_file(str(path), shared=False, size=entry.start + entry.nbytes, dtype=torch.uint8)
    data = raw[entry.start :]
    if data.data_ptr() % entry.dtype.itemsize:
        data = data.clone()
    return data.view(entry.dtype).view(entry.shape)
