"""PthReader: one PyTorch file (`.pth`, `.pt`, `.bin`). It is a pickle, so torch opens it with all of its guards.

Only this file calls torch.load: with `weights_only=True`, on torch 2.10 or later. A crafted file can make earlier
versions run code or corrupt memory (CVE-2025-32434, CVE-2026-24747).
"""

import mmap
import pickle
import re
import struct
import sys
import warnings
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO

import torch

from ..errors import CheckpointError, one_line, short_path
from .tensor_file import DOWNLOAD_AGAIN, TensorEntry, map_tensor

MIN_TORCH = (2, 10)
MAX_PICKLE = 64 << 20
SMALL_RECORD = 1 << 20
"""Records up to this size, such as the table of contents, are compared with their checksums on opening."""
_UNREADABLE = (RuntimeError, ValueError, TypeError, LookupError, AttributeError, EOFError, OSError)
_UNREADABLE += (AssertionError, struct.error)  # of truncated files in torch's old format


class PthReader:
    """A TensorFile over a flat dictionary of tensors, with or without a "state_dict" around it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.metadata: dict[str, str] = {}
        if path.suffix.lower() == ".safetensors":  # torch.load would trust the name
            raise CheckpointError(
                f"{short_path(path)} was refused: its name says safetensors, its content is a PyTorch pickle. "
                "If you trust its source, rename it to .pth."
            )
        _require_safe_torch(path)
        self._zip = zipfile.is_zipfile(path)
        if self._zip:
            _check_zip(path)
        elif _starts_as_zip(path):
            raise CheckpointError(
                f"{short_path(path)} is incomplete: got {path.stat().st_size} bytes, the end is missing. "
                f"{DOWNLOAD_AGAIN}"
            )
        state = self._open()
        self.entries = {name: _entry(path, name, tensor) for name, tensor in state.items()}
        if self._zip:
            self.entries = _with_places(path, self.entries, state)
        # What is read from its place needs no map: pages of a map count as resident memory.
        self._others = {name: tensor for name, tensor in state.items() if self.entries[name].start < 0}

    def verify(self) -> None:
        """Compare all bytes with their checksums: a second for each 1.6 GB. CheckpointError if some have changed."""
        if self._zip:
            try:
                with zipfile.ZipFile(self.path) as archive:
                    compare_sums(archive, sys.maxsize)
            except (zipfile.BadZipFile, OSError, NotImplementedError, ValueError) as error:
                raise CheckpointError(f"{short_path(self.path)} is damaged: {error}. {DOWNLOAD_AGAIN}") from None

    def memory_map(self, name: str) -> torch.Tensor:
        return self._others[name] if name in self._others else map_tensor(self.path, self.entries[name])

    def _open(self) -> dict[str, torch.Tensor]:
        name = short_path(self.path)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # about an unusual pickle protocol; the result is checked below
                state = torch.load(self.path, map_location="cpu", weights_only=True, mmap=self._zip)
        except pickle.UnpicklingError:
            raise CheckpointError(
                f"{name} was refused: it is a pickle that holds more than tensors and could run code when read. "
                "Use a safetensors file of the same model."
            ) from None
        except _UNREADABLE as error:
            reason = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
            raise CheckpointError(f"{name} cannot be read as a PyTorch file ({reason}). {DOWNLOAD_AGAIN}") from None
        if isinstance(state, dict) and isinstance(state.get("state_dict"), dict):
            state = state["state_dict"]
        if not isinstance(state, dict) or not state:
            raise CheckpointError(f"{name} holds a {type(state).__name__}, expected a dictionary of tensors.")
        return state


def _require_safe_torch(path: Path) -> None:
    version = tuple(int(part) for part in re.findall(r"[0-9]+", str(torch.__version__))[:2])
    if version < MIN_TORCH:
        raise CheckpointError(
            f"{short_path(path)} is a PyTorch pickle and torch {torch.__version__} cannot read it safely. This needs "
            "torch 2.10 or later (pip install --upgrade torch). Safetensors files load with any version."
        )


def _starts_as_zip(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(2) == b"PK"


def compare_sums(archive: zipfile.ZipFile, largest: int) -> None:
    """BadZipFile where the bytes of a record, of at most `largest`, are not those that were written."""
    for record in archive.infolist():
        if record.file_size <= largest and record.compress_type == zipfile.ZIP_STORED:
            with archive.open(record) as content:
                while content.read(1 << 20):
                    pass


def _check_zip(path: Path) -> None:
    """Refuse archives that would grow when read: torch stores its records uncompressed."""
    try:
        with zipfile.ZipFile(path) as archive:
            records = archive.infolist()
            compare_sums(archive, SMALL_RECORD)
    except (zipfile.BadZipFile, OSError, NotImplementedError, ValueError) as error:
        raise CheckpointError(f"{short_path(path)} is damaged: {error}. {DOWNLOAD_AGAIN}") from None
    if any(record.compress_type != zipfile.ZIP_STORED for record in records):
        raise CheckpointError(f"{short_path(path)} was refused: its records are compressed; those of PyTorch are not.")
    if any(record.filename.endswith(".pkl") and record.file_size > MAX_PICKLE for record in records):
        raise CheckpointError(f"{short_path(path)} was refused: its table of contents is over {MAX_PICKLE} bytes.")


def _with_places(path: Path, entries: dict[str, TensorEntry], state: dict[str, torch.Tensor]) -> dict[str, TensorEntry]:
    """The entries of an archive that torch has mapped, with the places of the tensors whose bytes lie there unchanged.

    torch does not tell them, but its addresses do: the archive's map begins where every tensor's memory is at the start
    of a record.
    """
    with zipfile.ZipFile(path) as archive, path.open("rb") as file:
        orders = {archive.read(name) for name in archive.namelist() if name.endswith("/byteorder")}
        records = sorted({_data_start(file, record.header_offset) for record in archive.infolist()})
    if orders - {sys.byteorder.encode()}:  # torch has swapped the bytes
        return entries
    memory = {tensor.untyped_storage().data_ptr() for tensor in state.values() if tensor.numel()}
    known = set(records)
    starts = [
        min(memory) - record
        for record in records
        if memory
        and (min(memory) - record) % mmap.PAGESIZE == 0
        and all(address - min(memory) + record in known for address in memory)
    ]
    if len(starts) != 1:
        return entries
    return {
        name: replace(entry, start=state[name].data_ptr() - starts[0] if entry.nbytes else 0)
        if _is_plain(state[name])
        else entry
        for name, entry in entries.items()
    }


def _data_start(file: BinaryIO, header: int) -> int:
    """The file offset of a record's data; `header` is the offset of its local header."""
    file.seek(header + 26)
    name, extra = struct.unpack("<HH", file.read(4))
    return header + 30 + name + extra


def _is_plain(tensor: torch.Tensor) -> bool:
    """Whether a tensor's values are its bytes in order."""
    return tensor.is_contiguous() and not tensor.is_conj() and not tensor.is_neg()


def _entry(path: Path, name: object, tensor: object) -> TensorEntry:
    if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
        raise CheckpointError(
            f"{short_path(path)} holds {name!r:.80}: {type(tensor).__name__}, expected only names with tensors."
        )
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_meta:
        raise CheckpointError(f"{short_path(path)}: {one_line(name):.80} is not a dense tensor.")
    nbytes = tensor.numel() * tensor.element_size()
    if nbytes > tensor.untyped_storage().nbytes():
        raise CheckpointError(f"{short_path(path)}: {one_line(name):.80} claims {nbytes} bytes, more than are stored.")
    return TensorEntry(tensor.dtype, tuple(tensor.shape), -1, nbytes)
