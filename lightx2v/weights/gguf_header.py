"""The header of a GGUF file, checked to the last byte: metadata, and where each tensor's blocks lie.

A GGUF file is a magic number, key-value pairs, a list of tensors, and the tensors' bytes, each aligned. Its dimensions
count columns first, so a shape here is theirs reversed. Format: ggml-org/ggml, docs/gguf.md (version 2 and 3).
"""

import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Any, NoReturn

import torch

from ..errors import CheckpointError, one_line, quoted, short_path
from .gguf_blocks import FORMATS, BlockWeights
from .tensor_file import DOWNLOAD_AGAIN, TensorEntry

MAX_TENSORS = 100_000
MAX_PAIRS = 10_000
MAX_TEXT = 1 << 20
"""Bytes of a name or a text value. The tensors' names have at most 64; a licence text may be long."""
MAX_ITEMS = 1 << 22
"""Items of an array: a text encoder's file lists 256 000 tokens."""
KEPT_ITEMS = 16
"""Longer arrays are checked and skipped: nothing here needs a tokenizer's list of words."""
MAX_DIMS = 8

FLOATS = {0: torch.float32, 1: torch.float16, 30: torch.bfloat16, 28: torch.float64}
BLOCKS = {form.number: form for form in FORMATS.values()}
OTHER_FORMATS = {
    4: "Q4_2", 5: "Q4_3", 9: "Q8_1", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S", 21: "IQ3_S",
    22: "IQ2_S", 24: "I8", 25: "I16", 26: "I32", 27: "I64", 29: "IQ1_M", 31: "Q4_0_4_4", 32: "Q4_0_4_8",
    33: "Q4_0_8_8", 34: "TQ1_0", 35: "TQ2_0", 36: "IQ4_NL_4_4", 37: "IQ4_NL_4_8", 38: "IQ4_NL_8_8", 39: "MXFP4",
    40: "NVFP4", 41: "Q1_0",
}  # fmt: skip
"""Formats of llama.cpp that are refused by their name."""

_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_TEXT, _ARRAY = 8, 9
QUANT_VERSION = 2
"""The layout of ggml's blocks since 2023; before, a Q4_0 block had its values in another order."""
_ORIGINAL_SHAPE = "comfy.gguf.orig_shape."


@dataclass(frozen=True, slots=True)
class GGUFHeader:
    """Values of `metadata` are numbers, text or short lists; longer lists are left out."""

    metadata: dict[str, Any]
    tensors: dict[str, TensorEntry]


def read_gguf_header(path: Path) -> GGUFHeader:
    """The header of `path`. CheckpointError where it is damaged, cut short, or holds a format that is not supported."""
    size = path.stat().st_size
    with path.open("rb") as file:
        return _Parser(short_path(path), file, size).header()


class _Parser:
    """Reads one header from front to back. Every count is bounded before it is used."""

    def __init__(self, name: str, file: BufferedReader, size: int) -> None:
        self.name, self.file, self.size = name, file, size

    def header(self) -> GGUFHeader:
        if self._bytes(4) != b"GGUF":
            raise CheckpointError(f"{self.name} is not a GGUF file: it does not begin with GGUF. Check the path.")
        version = self._number("I")
        if version in (2 << 24, 3 << 24):
            raise CheckpointError(
                f"{self.name} is a big-endian GGUF file, which is not supported. Take the little-endian one."
            )
        if version not in (2, 3):
            raise CheckpointError(
                f"{self.name} has GGUF version {version}; 2 and 3 are supported. Take a file of one of these."
            )
        count = self._count("tensors", MAX_TENSORS)
        metadata = dict(self._pairs(self._count("key-value pairs", MAX_PAIRS)))
        infos = [self._tensor_info() for _ in range(count)]
        alignment = metadata.get("general.alignment", 32)
        if type(alignment) is not int or not 1 <= alignment <= 1 << 16 or alignment & (alignment - 1):
            self._damaged(f"general.alignment is {quoted(alignment)}, expected a power of two")
        data = -(-self.file.tell() // alignment) * alignment
        tensors: dict[str, TensorEntry] = {}
        for name, shape, number, offset in infos:
            if name in tensors:
                self._damaged(f"tensor {_named(name)} is listed twice")
            if offset % alignment:
                self._damaged(f"tensor {_named(name)} begins at {offset}, which is no multiple of {alignment}")
            original = metadata.get(_ORIGINAL_SHAPE + name)
            tensors[name] = self._tensor(name, shape, original, number, data + offset)
        self._check_places(tensors, data)
        version = metadata.get("general.quantization_version", QUANT_VERSION)
        if version != QUANT_VERSION and any(tensor.blocks for tensor in tensors.values()):
            raise CheckpointError(
                f"{self.name} has blocks of general.quantization_version {quoted(version)}; {QUANT_VERSION} is "
                "supported. Take a file of this version."
            )
        return GGUFHeader(metadata, tensors)

    def _pairs(self, count: int) -> Iterator[tuple[str, Any]]:
        seen: set[str] = set()
        for _ in range(count):
            key = self._text("a key")
            if key in seen:
                self._damaged(f"the key {_named(key)} is given twice")
            seen.add(key)
            kind = self._number("I")
            value = self._array(key) if kind == _ARRAY else self._value(kind, key)
            if value is not None:
                yield key, value

    def _value(self, kind: int, key: str) -> Any:
        if kind == _TEXT:
            return self._text(f"the value of {_named(key)}")
        if kind not in _NUMBERS:
            self._damaged(f"the value of {_named(key)} has the unknown type {kind}")
        return self._number(_NUMBERS[kind])

    def _array(self, key: str) -> list[Any] | None:
        """The items of a short array; None for a longer one, which is skipped."""
        kind, count = self._number("I"), self._number("Q")
        if count > MAX_ITEMS:
            self._damaged(f"the value of {_named(key)} has {count} items, at most {MAX_ITEMS} are allowed")
        if count <= KEPT_ITEMS:
            return [self._value(kind, key) for _ in range(count)]
        if kind in _NUMBERS:
            self._bytes(struct.calcsize("<" + _NUMBERS[kind]) * count)
            return None
        for _ in range(count):
            self._value(kind, key)
        return None

    def _tensor_info(self) -> tuple[str, tuple[int, ...], int, int]:
        name = self._text("a tensor's name")
        dims = self._number("I")
        if not 1 <= dims <= MAX_DIMS:
            self._damaged(f"tensor {_named(name)} has {dims} dimensions, expected 1 to {MAX_DIMS}")
        shape = tuple(self._number("Q") for _ in range(dims))[::-1]
        return name, shape, self._number("I"), self._number("Q")

    def _tensor(self, name: str, shape: tuple[int, ...], original: Any, number: int, start: int) -> TensorEntry:
        weights = math.prod(shape)
        if weights == 0 or weights >= 1 << 48:
            self._damaged(f"tensor {_named(name)} has the shape {_named(str(list(shape)))}")
        logical = self._original(name, shape, original)
        if number in FLOATS:
            return TensorEntry(FLOATS[number], logical, start, weights * FLOATS[number].itemsize)
        form = BLOCKS.get(number)
        if form is None:
            raise CheckpointError(
                f"{self.name}: tensor {_named(name)} is stored as {OTHER_FORMATS.get(number, f'number {number}')}, "
                f"which is not supported. Take a file in one of {', '.join(FORMATS)}, F16, BF16 or F32."
            )
        if shape[-1] % form.size:
            self._damaged(f"tensor {_named(name)} has rows of {shape[-1]}, which {form.name} cannot hold")
        nbytes = weights // form.size * form.nbytes
        rows = weights // shape[-1]
        return TensorEntry(torch.uint8, (rows, nbytes // rows), start, nbytes, BlockWeights(form, logical))

    def _original(self, name: str, shape: tuple[int, ...], original: Any) -> tuple[int, ...]:
        """The shape that a converter noted before it flattened the tensor; else the shape as listed."""
        if original is None:
            return shape
        good = isinstance(original, list) and all(type(side) is int and side > 0 for side in original)
        if not good or math.prod(original) != math.prod(shape):
            self._damaged(
                f"the original shape of {_named(name)} is {quoted(original)}, its data have the shape {list(shape)}"
            )
        return tuple(original)

    def _check_places(self, tensors: dict[str, TensorEntry], data: int) -> None:
        end, before = data, "the header"
        for name, tensor in sorted(tensors.items(), key=lambda item: item[1].start):
            if tensor.start < end:
                self._damaged(f"tensor {_named(name)} overlaps {_named(before)}")
            end, before = tensor.start + tensor.nbytes, name
        if end > self.size:
            self._incomplete(end)

    # ---- bytes ------------------------------------------------------------------------------------------------------

    def _bytes(self, count: int) -> bytes:
        if self.file.tell() + count > self.size:
            self._incomplete(self.file.tell() + count)
        return self.file.read(count)

    def _number(self, code: str) -> Any:
        return struct.unpack("<" + code, self._bytes(struct.calcsize("<" + code)))[0]

    def _count(self, what: str, most: int) -> int:
        count = self._number("Q")
        if count > most:
            self._damaged(f"its header claims {count} {what}, at most {most} are allowed")
        return count

    def _text(self, what: str) -> str:
        length = self._number("Q")
        if length > MAX_TEXT:
            self._damaged(f"{what} has {length} bytes, at most {MAX_TEXT} are allowed")
        try:
            return self._bytes(length).decode("utf-8")
        except UnicodeDecodeError:
            self._damaged(f"{what} is not UTF-8")

    def _damaged(self, why: str) -> NoReturn:
        raise CheckpointError(f"{self.name} is damaged: {why}. {DOWNLOAD_AGAIN}")

    def _incomplete(self, needed: int) -> NoReturn:
        raise CheckpointError(
            f"{self.name} is incomplete: got {self.size} bytes, its header needs {needed}. {DOWNLOAD_AGAIN}"
        )


def _named(text: str) -> str:
    return one_line(text[:80])
