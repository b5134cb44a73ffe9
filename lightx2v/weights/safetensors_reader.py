"""SafetensorsReader: the header of one safetensors file, validated by the library: where each tensor lies.

The format is eight bytes of header length, a JSON header, and the tensors' bytes back to back. `safetensors.safe_open`
validates the header, in Rust: sizes, offsets, holes, overlaps, the file's length. A short download, a header bomb or
two tensors over the same bytes end in a CheckpointError and not in a crash or in wrong numbers.

parallel_reader.py fetches the tensors, not the library, which maps the file: pages of a map count as resident memory
until the map is closed, and a tensor that is read whole before it is cast needs both copies at once
(benchmarks/load_rss.py measures all three ways). A file that becomes shorter meanwhile is an error there, where a map
would kill the process (SIGBUS).
"""

import json
import math
from collections import Counter
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from ..errors import CheckpointError, one_line, short_path
from .tensor_file import DOWNLOAD_AGAIN, TensorEntry, map_tensor

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

MAX_TENSORS = 50_000
"""An expert has 1100 tensors and a LoRA at most some thousand. Looking at each takes time: 10 microseconds."""

_KEYS = {"dtype", "shape", "data_offsets"}

MAX_DIMS, MAX_STRIDE = 16, 1 << 63
"""Limits of torch's shapes, also where a side is zero. The library does not check these."""


class SafetensorsReader:
    """A TensorFile."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.entries, self.metadata = read_header(path)

    def memory_map(self, name: str) -> torch.Tensor:
        return map_tensor(self.path, self.entries[name])


def read_header(path: Path) -> tuple[dict[str, TensorEntry], dict[str, str]]:
    """Tensors and metadata of a safetensors file, or CheckpointError. Reads nothing but the header."""
    text, start = header_text(path)
    if (count := text.count(b'"data_offsets"')) > MAX_TENSORS:
        raise CheckpointError(
            f"{short_path(path)} lists {count} tensors; at most {MAX_TENSORS} are read. It is no model of this kind: "
            "get the model from its publisher."
        )
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
            f"{one_line(str(error)).removeprefix('Error while deserializing header: '):.300}{sizes}. {DOWNLOAD_AGAIN}"
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
        twice = Counter(key for key, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"the key {one_line(twice):.80} occurs twice")
    return result


def _entry(path: Path, key: str, value: object, data_start: int) -> TensorEntry:
    """One tensor of a header that the library has validated; refused where the library allows more than torch."""
    if not isinstance(value, dict) or value.keys() != _KEYS:
        raise ValueError(f"{_named(key)} must have exactly dtype, shape and data_offsets")
    dtype, shape, (start, end) = str(value["dtype"]), value["shape"], value["data_offsets"]
    if dtype not in DTYPES:
        raise CheckpointError(
            f"{short_path(path)}: {_named(key)} has dtype {one_line(dtype):.80}; supported are {', '.join(DTYPES)}. "
            "Use a file with one of these."
        )
    if len(shape) > MAX_DIMS or (math.prod(shape) or math.prod(side or 1 for side in shape)) >= MAX_STRIDE:
        raise ValueError(f"{_named(key)} has the shape {shape!s:.80}")
    return TensorEntry(DTYPES[dtype], tuple(shape), data_start + start, end - start)


def _named(key: str) -> str:
    return f"tensor {one_line(key):.80}"
