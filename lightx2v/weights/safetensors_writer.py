"""Write a safetensors file tensor by tensor, and continue it after an interruption.

The header is known before the first tensor, so it is written first. The file grows as `<target>.part` and gets its own
name when it is complete. Called again for the same content, the writer skips tensors that the part already holds. At
most one tensor is in memory, and only one chunk of a tensor that comes in chunks.
"""

import json
import math
import os
import shutil
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from ..errors import OutputError, short_path
from ..progress import CancelToken
from .safetensors_reader import DTYPES

TensorInfo = tuple[str, tuple[int, ...], torch.dtype]
"""Name, shape and dtype of a tensor to write."""

Groups = Mapping[str, Sequence[TensorInfo]]
"""The tensors of each group, in the order in which to write them."""

Source = Callable[[str], Iterable[tuple[str, Tensor]]]
"""Yields the tensors of one group in their order. A large one may come in several chunks under the same name."""


def write_safetensors(
    path: Path,
    groups: Groups,
    source: Source,
    *,
    metadata: Mapping[str, str],
    on_bytes: Callable[[int, int], None] | None = None,
    cancel: CancelToken | None = None,
) -> None:
    """Write `path`. `metadata` must identify the content: a part is continued only if its header is the same.

    Calls `on_bytes(done, total)` after every group. OutputError if the disk is full or not writable.
    """
    header, ends = header_of(groups, metadata)
    part = path.with_name(path.name + ".part")
    total = ends[-1] if ends else len(header)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        done = _resumable(part, header, ends)
        free = shutil.disk_usage(path.parent).free
        have = part.stat().st_size if part.exists() else 0
        if free + have < total:
            raise OutputError(
                f"{short_path(path)} needs {total / 1e9:.1f} GB, {(free + have) / 1e9:.1f} GB are free. "
                "Free some space, or write elsewhere."
            )
        with part.open("r+b" if done is not None else "wb") as file:
            if done is None:
                file.write(header)
                done = 0
            else:
                file.truncate(ends[done - 1] if done else len(header))
                file.seek(0, os.SEEK_END)
            for index, group in enumerate(groups):
                if index >= done:
                    if cancel is not None:
                        cancel.check()
                    _write_group(file, groups[group], source(group))
                if on_bytes is not None:
                    on_bytes(ends[index], total)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except OSError as error:
        raise OutputError(f"{short_path(path)} could not be written: {error.strerror or error}.") from None


def _write_group(file: BinaryIO, group: Sequence[TensorInfo], tensors: Iterable[tuple[str, Tensor]]) -> None:
    dtypes = {name: dtype for name, _, dtype in group}
    sizes = {name: math.prod(shape) for name, shape, _ in group}
    order = list(dtypes)
    for name, tensor in tensors:
        assert name == order[0] and tensor.dtype == dtypes[name] and tensor.numel() <= sizes[name], name
        data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        file.write(data.numpy().data)
        sizes[name] -= tensor.numel()
        if not sizes[name]:
            order.pop(0)
    assert not any(sizes.values()), order


def header_of(groups: Groups, metadata: Mapping[str, str]) -> tuple[bytes, list[int]]:
    """The file's first bytes, and the offset at which each group ends."""
    names = {dtype: name for name, dtype in DTYPES.items()}
    table: dict[str, object] = {"__metadata__": dict(metadata)}
    offset, group_ends = 0, []
    for tensors in groups.values():
        for name, shape, dtype in tensors:
            size = math.prod(shape) * dtype.itemsize
            table[name] = {"dtype": names[dtype], "shape": list(shape), "data_offsets": [offset, offset + size]}
            offset += size
        group_ends.append(offset)
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    header = struct.pack("<Q", len(text)) + text
    return header, [len(header) + end for end in group_ends]


def _resumable(part: Path, header: bytes, ends: Sequence[int]) -> int | None:
    """The number of complete groups in an earlier part; None if there is no part with this header."""
    if not part.is_file():
        return None
    with part.open("rb") as file:
        if file.read(len(header)) != header:
            return None
    size = part.stat().st_size
    return sum(end <= size for end in ends)
