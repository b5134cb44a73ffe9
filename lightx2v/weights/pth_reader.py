"""PthReader: one PyTorch file (`.pth`, `.pt`, `.bin`). It is a pickle, so torch opens it with all of its guards.

Only this file calls torch.load: with `weights_only=True`, on torch 2.10 or later. A crafted file can make earlier
versions run code or corrupt memory (CVE-2025-32434, CVE-2026-24747).
"""

import pickle
import re
import threading
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path

import torch

from ..errors import CheckpointError, short_path
from .tensor_file import CHUNK, DOWNLOAD_AGAIN, TensorEntry, allocate, cast_target

MIN_TORCH = (2, 10)
REMAP_AFTER = 512 << 20
MAX_PICKLE = 64 << 20


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
        self._state = self._open()
        self.entries = {name: _entry(path, name, tensor) for name, tensor in self._state.items()}
        self._touched = 0
        self._lock = threading.Lock()

    def read(
        self,
        name: str,
        dtype: torch.dtype | None = None,
        staging: torch.Tensor | None = None,
        buffer: torch.Tensor | None = None,
    ) -> torch.Tensor:
        with self._lock:
            tensor = self._mapped(name, self.entries[name].nbytes)
        return allocate(tuple(tensor.shape), cast_target(tensor.dtype, dtype), buffer).copy_(tensor)

    def chunks(self, name: str, dtype: torch.dtype | None = None) -> Iterator[torch.Tensor]:
        entry = self.entries[name]
        target = cast_target(entry.dtype, dtype)
        rows = entry.shape[0] if entry.shape else 0
        if not rows or not entry.nbytes:
            yield self.read(name, dtype).flatten()
            return
        most = max(1, CHUNK * rows // entry.nbytes)
        for start in range(0, rows, most):
            stop = min(start + most, rows)
            with self._lock:
                part = self._mapped(name, (stop - start) * entry.nbytes // rows)[start:stop]
            yield torch.empty(part.shape, dtype=target).copy_(part).flatten()

    def _mapped(self, name: str, nbytes: int) -> torch.Tensor:
        """The mapped tensor, of which the caller will read `nbytes`.

        Maps the file again after each REMAP_AFTER bytes: pages that were read count as resident memory.
        """
        self._touched += nbytes
        if self._zip and self._touched > REMAP_AFTER:
            self._touched = nbytes
            self._state = {}
            self._state = self._open()
        return self._state[name]

    def memory_map(self, name: str) -> torch.Tensor:
        return self._open()[name]  # a new map, so that keeping it keeps no pages that `read` has touched

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
        except (RuntimeError, ValueError, TypeError, KeyError, AttributeError, IndexError, EOFError, OSError) as error:
            reason = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
            raise CheckpointError(f"{name} cannot be read as a PyTorch file ({reason}). {DOWNLOAD_AGAIN}") from None
        if isinstance(state, dict) and isinstance(state.get("state_dict"), dict):
            state = state["state_dict"]
        if not isinstance(state, dict) or not state:
            raise CheckpointError(f"{name} holds a {type(state).__name__}, expected a dictionary of tensors.")
        return state


def _require_safe_torch(path: Path) -> None:
    version = tuple(int(part) for part in re.findall(r"\d+", str(torch.__version__))[:2])
    if version < MIN_TORCH:
        raise CheckpointError(
            f"{short_path(path)} is a PyTorch pickle and torch {torch.__version__} cannot read it safely. This needs "
            "torch 2.10 or later (pip install --upgrade torch). Safetensors files load with any version."
        )


def _starts_as_zip(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(2) == b"PK"


def _check_zip(path: Path) -> None:
    """Refuse archives that would grow when read: torch stores its records uncompressed."""
    try:
        with zipfile.ZipFile(path) as archive:
            records = archive.infolist()
    except (zipfile.BadZipFile, OSError, NotImplementedError, ValueError) as error:
        raise CheckpointError(f"{short_path(path)} is damaged: {error}. {DOWNLOAD_AGAIN}") from None
    if any(record.compress_type != zipfile.ZIP_STORED for record in records):
        raise CheckpointError(f"{short_path(path)} was refused: its records are compressed; those of PyTorch are not.")
    if any(record.filename.endswith(".pkl") and record.file_size > MAX_PICKLE for record in records):
        raise CheckpointError(f"{short_path(path)} was refused: its table of contents is over {MAX_PICKLE} bytes.")


def _entry(path: Path, name: object, tensor: object) -> TensorEntry:
    if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
        raise CheckpointError(
            f"{short_path(path)} holds {name!r:.80}: {type(tensor).__name__}, expected only names with tensors."
        )
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_meta:
        raise CheckpointError(f"{short_path(path)}: {name:.80} is not a dense tensor.")
    nbytes = tensor.numel() * tensor.element_size()
    if nbytes > tensor.untyped_storage().nbytes():
        raise CheckpointError(f"{short_path(path)}: {name:.80} claims {nbytes} bytes, more than are stored.")
    return TensorEntry(tensor.dtype, tuple(tensor.shape), -1, nbytes)
