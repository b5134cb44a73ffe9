"""One safetensors file: its header checked to the last byte, its tensors read one at a time.

The format is eight bytes of header length, a JSON header, and the tensors' bytes back to back. Everything the header
claims is checked against the file's size before a tensor is read, so that a short download, a header bomb or two
tensors over the same bytes end in a CheckpointError and not in a crash or in wrong numbers.

Tensors are read with plain reads into memory of their own. A memory map would be simpler, but its pages count as
resident memory until the map is closed, and a tensor that is read whole before it is cast needs both copies at once:
benchmarks/load_rss.py measures all three ways.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from io import FileIO
from pathlib import Path

import torch

from ..errors import CheckpointError, short_path

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}

MAX_HEADER = 16 << 20
"""A 14-billion-parameter expert's header has 150 kB; more than this is no header."""

MAX_DIMS = 16

FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
"""What an ordinary weight may be stored in and cast between. Everything else (float8, int8) keeps its dtype."""

CHUNK = 4 << 20
"""Bytes read at once when a tensor is cast while it is read: small enough to stay in a processor's cache."""

AGAIN = "Delete the file and download it again."


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One tensor of a file. `start` counts from the file's first byte."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    nbytes: int


class SafetensorsReader:
    """Names, dtypes and shapes after opening; `read` and `mapped` give the data."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.entries, self.metadata = read_header(path)

    def read(
        self,
        name: str,
        dtype: torch.dtype | None = None,
        staging: torch.Tensor | None = None,
        room: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The tensor in memory of its own, or at the beginning of `room`, which is bytes enough for it.

        An ordinary float is cast to `dtype` chunk by chunk on the way. `staging` is CHUNK bytes to do that in; whoever
        reads many tensors brings one for all.
        """
        entry = self.entries[name]
        target = cast_target(entry.dtype, dtype)
        result = empty(entry.shape, target, room)
        flat = result.view(-1)
        with self.path.open("rb", buffering=0) as file:
            file.seek(entry.start)
            if target == entry.dtype:
                self._fill(file, flat, name)
                return result
            chunk = (staging if staging is not None else torch.empty(CHUNK, dtype=torch.uint8)).view(entry.dtype)
            for part in flat.split(len(chunk)):
                self._fill(file, chunk[: len(part)], name)
                part.copy_(chunk[: len(part)])
        return result

    def pieces(self, name: str, dtype: torch.dtype | None = None) -> Iterator[torch.Tensor]:
        """What `read` gives, flat and a few megabytes at a time: for tensors larger than memory should hold."""
        entry = self.entries[name]
        target = cast_target(entry.dtype, dtype)
        count, most = math.prod(entry.shape), CHUNK // entry.dtype.itemsize
        with self.path.open("rb", buffering=0) as file:
            file.seek(entry.start)
            for start in range(0, count, most):
                piece = torch.empty(min(most, count - start), dtype=entry.dtype)
                self._fill(file, piece, name)
                yield piece.to(target)

    def _fill(self, file: FileIO, flat: torch.Tensor, name: str) -> None:
        target = flat.view(torch.uint8).numpy().data
        done = 0
        while done < len(target):  # one read returns 2 GiB at most
            got = file.readinto(target[done:])
            if not got:
                raise CheckpointError(f"{short_path(self.path)} became shorter while {name} was read. {AGAIN}")
            done += got

    def mapped(self, name: str) -> torch.Tensor:
        """The tensor as a private memory map: nothing is read before it is touched. Treat it as read-only."""
        entry = self.entries[name]
        if not entry.nbytes:
            return torch.empty(entry.shape, dtype=entry.dtype)
        raw = torch.from_file(str(self.path), shared=False, size=entry.start + entry.nbytes, dtype=torch.uint8)
        data = raw[entry.start :]
        if data.data_ptr() % entry.dtype.itemsize:
            data = data.clone()
        return data.view(entry.dtype).view(entry.shape)


def cast_target(stored: torch.dtype, wanted: torch.dtype | None) -> torch.dtype:
    """The dtype in which a tensor leaves its file."""
    return wanted if wanted in FLOATS and stored in FLOATS else stored


def empty(shape: tuple[int, ...], dtype: torch.dtype, room: torch.Tensor | None) -> torch.Tensor:
    """A tensor to be written to, at the beginning of `room` if that is given."""
    if room is None:
        return torch.empty(shape, dtype=dtype)
    return room[: math.prod(shape) * dtype.itemsize].view(dtype).view(shape)


def read_header(path: Path) -> tuple[dict[str, TensorEntry], dict[str, str]]:
    """Tensors and metadata of a safetensors file, or CheckpointError. Reads nothing but the header."""
    name = short_path(path)
    size = path.stat().st_size
    with path.open("rb") as file:
        length = struct.unpack("<Q", file.read(8).ljust(8, b"\0"))[0]
        if not 2 <= length <= MAX_HEADER:
            raise CheckpointError(
                f"{name} is damaged: its header claims {length} bytes, {MAX_HEADER} are allowed. {AGAIN}"
            )
        if 8 + length > size:
            raise CheckpointError(
                f"{name} is incomplete: got {size} bytes, its header alone needs {8 + length}. {AGAIN}"
            )
        text = file.read(length)
    try:
        header = json.loads(text.decode("utf-8"), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{name} is damaged: its header is not valid JSON ({error}). {AGAIN}") from None
    if not isinstance(header, dict):
        raise CheckpointError(f"{name} is damaged: its header is a {type(header).__name__}, not an object. {AGAIN}")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise CheckpointError(f"{name} is damaged: __metadata__ must map names to strings. {AGAIN}")
    entries = {key: _entry(name, key, value, 8 + length) for key, value in header.items()}

    end, before = 8 + length, "the header"
    for key, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].nbytes)):
        if entry.start != end:
            how = "overlaps" if entry.start < end else "leaves a gap after"
            raise CheckpointError(f"{name} is damaged: tensor {_clip(key)} {how} {_clip(before)}. {AGAIN}")
        end, before = entry.start + entry.nbytes, key
    if end > size:
        raise CheckpointError(f"{name} is incomplete: got {size} bytes, its header says {end}. {AGAIN}")
    if end < size:
        raise CheckpointError(f"{name} is damaged: got {size} bytes, its header says {end}. {AGAIN}")
    return entries, metadata


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))
        raise ValueError(f"the key {_clip(twice)} occurs twice")
    return result


def _entry(file: str, name: str, value: object, data_start: int) -> TensorEntry:
    """One header entry, checked by itself: its dtype, its shape, and that they fill exactly its bytes."""

    def damaged(why: str) -> CheckpointError:
        return CheckpointError(f"{file} is damaged: tensor {_clip(name)} {why}. {AGAIN}")

    if not isinstance(value, dict) or value.keys() != {"dtype", "shape", "data_offsets"}:
        raise damaged("has no dtype, shape and data_offsets")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise CheckpointError(f"{file}: tensor {_clip(name)} has dtype {_clip(dtype)}; known are {', '.join(DTYPES)}.")
    if not isinstance(shape, list) or len(shape) > MAX_DIMS or not all(_is_count(side) for side in shape):
        raise damaged(f"has the shape {_clip(shape)}")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(_is_count(offset) for offset in offsets):
        raise damaged(f"has the offsets {_clip(offsets)}")
    nbytes = math.prod(shape) * DTYPES[dtype].itemsize
    if offsets[1] - offsets[0] != nbytes:
        raise damaged(f"has {offsets[1] - offsets[0]} bytes, its shape {_clip(shape)} needs {nbytes}")
    return TensorEntry(DTYPES[dtype], tuple(shape), data_start + offsets[0], nbytes)


def _is_count(value: object) -> bool:
    return type(value) is int and 0 <= value < 1 << 63


def _clip(value: object) -> str:
    text = value if isinstance(value, str) else repr(value)
    return text if len(text) <= 80 else text[:77] + "…"
