"""SafetensorsReader: one safetensors file, its header validated by the library, its tensors read one at a time.

The format is eight bytes of header length, a JSON header, and the tensors' bytes back to back. `safetensors.safe_open`
validates the header, in Rust: sizes, offsets, holes, overlaps, the file's length. A short download, a header bomb or
two tensors over the same bytes end in a CheckpointError and not in a crash or in wrong numbers.

Plain reads fetch the tensors, not the library, which maps the file: pages of a map count as resident memory until the
map is closed, and a tensor that is read whole before it is cast needs both copies at once (benchmarks/load_rss.py
measures all three ways). Plain reads also read ahead in threads, into reused memory, and report a file that becomes
shorter meanwhile, where a map would kill the process (SIGBUS).
"""

import json
import math
from collections import Counter
from collections.abc import Iterator
from io import FileIO
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from ..errors import CheckpointError, short_path
from .tensor_file import CHUNK, DOWNLOAD_AGAIN, TensorEntry, allocate, cast_target

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

MAX_HEADER = 100_000_000
"""The library's own limit. The header of a 14-billion-parameter expert has 150 kB."""

MAX_DIMS, MAX_STRIDE = 16, 1 << 63
"""Limits of torch's shapes, also where a side is zero. The library does not check these."""


class SafetensorsReader:
    """A TensorFile."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.entries, self.metadata = read_header(path)

    def read(
        self,
        name: str,
        dtype: torch.dtype | None = None,
        staging: torch.Tensor | None = None,
        buffer: torch.Tensor | None = None,
    ) -> torch.Tensor:
        entry = self.entries[name]
        target = cast_target(entry.dtype, dtype)
        result = allocate(entry.shape, target, buffer)
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

    def chunks(self, name: str, dtype: torch.dtype | None = None) -> Iterator[torch.Tensor]:
        entry = self.entries[name]
        target = cast_target(entry.dtype, dtype)
        count, most = math.prod(entry.shape), CHUNK // entry.dtype.itemsize
        with self.path.open("rb", buffering=0) as file:
            file.seek(entry.start)
            for start in range(0, count, most):
                chunk = torch.empty(min(most, count - start), dtype=entry.dtype)
                self._fill(file, chunk, name)
                yield chunk.to(target)

    def _fill(self, file: FileIO, flat: torch.Tensor, name: str) -> None:
        target = flat.view(torch.uint8).numpy().data
        done = 0
        while done < len(target):  # one read returns 2 GiB at most
            got = file.readinto(target[done:])
            if not got:
                raise CheckpointError(f"{short_path(self.path)} became shorter while {name} was read. {DOWNLOAD_AGAIN}")
            done += got

    def memory_map(self, name: str) -> torch.Tensor:
        entry = self.entries[name]
        if not entry.nbytes:
            return torch.empty(entry.shape, dtype=entry.dtype)
        raw = torch.from_file(str(self.path), shared=False, size=entry.start + entry.nbytes, dtype=torch.uint8)
        data = raw[entry.start :]
        if data.data_ptr() % entry.dtype.itemsize:
            data = data.clone()
        return data.view(entry.dtype).view(entry.shape)


def read_header(path: Path) -> tuple[dict[str, TensorEntry], dict[str, str]]:
    """Tensors and metadata of a safetensors file, or CheckpointError. Reads nothing but the header."""
    text, start = header_text(path)
    try:
        with safe_open(path, "np"):
            header = json.loads(text, object_pairs_hook=_unique)
        metadata = header.pop("__metadata__", None) or {}
        return {key: _entry(path, key, value, start) for key, value in header.items()}, metadata
    except (SafetensorError, ValueError) as error:
        size = path.stat().st_size
        claimed = _claimed_size(text, start, size)
        sizes = f"; got {size} bytes, its header says {claimed}" if claimed != size else ""
        raise CheckpointError(
            f"{short_path(path)} is {'incomplete' if size < claimed else 'damaged'}: "
            f"{str(error).removeprefix('Error while deserializing header: '):.300}{sizes}. {DOWNLOAD_AGAIN}"
        ) from None


def header_text(path: Path) -> tuple[bytes, int]:
    """The JSON header, unchecked and possibly cut, and the offset of the first tensor. Reads unfinished files too."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        return file.read(min(length, MAX_HEADER, path.stat().st_size)), 8 + length


def _claimed_size(text: bytes, start: int, size: int) -> int:
    """The file's size according to its header. Where that cannot be read: `size`, or more if the header is cut."""
    try:
        return start + max(entry["data_offsets"][1] for key, entry in json.loads(text).items() if key != "__metadata__")
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError):
        return max(start, size)


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """Refuses a name that occurs twice, of which the library would silently take the last."""
    if len(result := dict(pairs)) != len(pairs):
        raise ValueError(f"the key {Counter(key for key, _ in pairs).most_common(1)[0][0]:.80} occurs twice")
    return result


def _entry(path: Path, key: str, value: object, data_start: int) -> TensorEntry:
    """One tensor of a header that the library has validated; refused where the library allows more than torch."""
    if not isinstance(value, dict) or value.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"tensor {key:.80} must have exactly dtype, shape and data_offsets")
    dtype, shape, (start, end) = str(value["dtype"]), value["shape"], value["data_offsets"]
    if dtype not in DTYPES:
        raise CheckpointError(
            f"{short_path(path)}: tensor {key:.80} has dtype {dtype:.80}; supported are {', '.join(DTYPES)}. "
            "Use a file with one of these."
        )
    if len(shape) > MAX_DIMS or math.prod(side or 1 for side in shape) >= MAX_STRIDE:
        raise ValueError(f"tensor {key:.80} has the shape {shape!s:.80}")
    return TensorEntry(DTYPES[dtype], tuple(shape), data_start + start, end - start)
