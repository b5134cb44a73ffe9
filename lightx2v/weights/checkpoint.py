"""Checkpoint: one model's tensors in a file, in shards with or without an index, or in a folder split by block.

    checkpoint = open_checkpoint(path)        names, shapes and dtypes; reads no tensor yet
    checkpoint.tensor("head.head.weight")     one tensor, as it is stored
    for name, tensor in checkpoint.tensors(): all of them, one at a time, in the order they lie on disk

A file's first bytes decide its format, never its name: a pickle called `model.safetensors` is still a pickle. Opening
checks each file, so a broken download is found before anything is loaded.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Container, Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path, PurePath

import torch

from ..config.model_paths import shard_names
from ..errors import CheckpointError, quoted, short_path
from ..progress import UNWATCHED, LoadWatch
from .gguf_reader import GGUFReader, open_parts
from .parallel_reader import TensorPlace, read_tensors
from .pth_reader import PthReader
from .safetensors_reader import SafetensorsReader
from .tensor_file import CHUNK, DOWNLOAD_AGAIN, TensorEntry, TensorFile, cast_target

Look = Callable[[torch.Tensor], None]

PICKLES = (".pth", ".pt", ".bin")


class Checkpoint:
    """Tensors by name over one or several files. `open_checkpoint` makes it."""

    def __init__(self, path: Path, files: Sequence[TensorFile]) -> None:
        self.path = path
        self.files = files
        self._file_of: dict[str, TensorFile] = {}
        for file in files:
            for name in file.entries:
                if not name.isprintable():  # messages repeat names: one could forge a line or control the terminal
                    raise CheckpointError(
                        f"{short_path(file.path)} holds a tensor called {quoted(name)}; expected printable characters. "
                        "Do not trust this file: get the model from its publisher."
                    )
                if name in self._file_of:
                    first = self._file_of[name].path.name
                    raise CheckpointError(
                        f"{short_path(path)}: tensor {name:.80} is in {first} and in {file.path.name}. "
                        "Two models seem to share this folder; keep one, or name a file instead of the folder."
                    )
                self._file_of[name] = file
        entries = {name: file.entries[name] for name, file in self._file_of.items()}
        self.blocks = {name: entry.blocks for name, entry in entries.items() if entry.blocks}
        """The weights that are stored in blocks: of them `tensor` and the others return the bytes."""
        self.shapes = {name: entry.blocks.shape if entry.blocks else entry.shape for name, entry in entries.items()}
        """Of weights in blocks, the shape of the weights."""
        self.dtypes = {name: entry.dtype for name, entry in entries.items()}
        self.metadata = {key: value for file in files for key, value in file.metadata.items()}

    def __contains__(self, name: object) -> bool:
        return name in self._file_of

    def __len__(self) -> int:
        return len(self._file_of)

    @property
    def nbytes(self) -> int:
        return sum(entry.nbytes for _, entry in self.entries())

    def entries(self) -> Iterator[tuple[str, TensorEntry]]:
        """(name, entry) of each tensor, from the headers."""
        return (item for file in self.files for item in file.entries.items())

    def disk_order(self) -> list[tuple[TensorFile, str]]:
        """(file, name) of each tensor, in the order they lie on disk."""
        return [
            (file, name)
            for file in self.files
            for name, _ in sorted(file.entries.items(), key=lambda item: item[1].start)
        ]

    def file_of(self, name: str) -> Path:
        return self._file_of[name].path

    def tensor(self, name: str) -> torch.Tensor:
        """One tensor in its own memory, in its stored dtype."""
        return next(read_in_order([self.wanted(name)]))[1]

    def wanted(
        self, name: str, dtype: torch.dtype | None = None, into: torch.Tensor | None = None, look: Look | None = None
    ) -> Wanted:
        """A tensor of this checkpoint for `read_in_order`."""
        return Wanted(self._file_of[name], name, dtype, into, look)

    def chunks(self, name: str, dtype: torch.dtype | None = None) -> Iterator[torch.Tensor]:
        """One tensor, cast if it is an ordinary float, flat and a few megabytes at a time."""
        file = self._file_of[name]
        entry = file.entries[name]
        target, most = cast_target(entry.dtype, dtype), CHUNK // entry.dtype.itemsize
        if entry.start < 0:
            yield from (part.to(target, copy=True) for part in file.memory_map(name).flatten().split(most))
            return
        count = math.prod(entry.shape)
        places = (
            replace(_place(file, name, dtype), start=entry.start + at * entry.dtype.itemsize, shape=(size,))
            for at in range(0, count, most)
            for size in [min(most, count - at)]
        )
        yield from (chunk for _, chunk in read_tensors(places))

    def memory_map(self, name: str) -> torch.Tensor:
        """One tensor as a memory map: reads nothing before it is touched. Treat it as read-only."""
        return self._file_of[name].memory_map(name)

    def tensors(
        self,
        names: Container[str] | None = None,
        *,
        dtype_of: Callable[[str], torch.dtype] | None = None,
        device: torch.device | str = "cpu",
        into: Callable[[str], torch.Tensor | None] | None = None,
        look: Callable[[str, torch.Tensor], None] | None = None,
        watch: LoadWatch = UNWATCHED,
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """(name, tensor on `device`) of all tensors, or of those in `names`, in the order they lie on disk.

        `dtype_of` (file's name -> dtype) casts ordinary floats while they are read, which needs no memory for the dtype
        on disk. Without it tensors come as stored, e.g. to merge a LoRA before rounding.

        `into` may name the tensor to read into: contiguous, of the final dtype, in host memory or on `device`. The next
        tensors are read meanwhile. Reading threads call `look` with the parts of tensors in host memory.
        """
        chosen = [
            self.wanted(
                name,
                dtype_of(name) if dtype_of else None,
                into(name) if into else None,
                partial(look, name) if look else None,
            )
            for _, name in self.disk_order()
            if names is None or name in names
        ]
        yield from read_in_order(chosen, device, watch)


@dataclass(frozen=True, slots=True)
class Wanted:
    """A tensor to read from `file`, in `dtype` if both are ordinary floats, and into this memory if there is any. In
    host memory, reading threads call `look` with its parts."""

    file: TensorFile
    name: str
    dtype: torch.dtype | None = None
    into: torch.Tensor | None = None
    look: Look | None = None

    @property
    def nbytes(self) -> int:
        """Its bytes in the file."""
        return self.file.entries[self.name].nbytes


def read_in_order(
    chosen: Sequence[Wanted], device: torch.device | str = "cpu", watch: LoadWatch = UNWATCHED
) -> Generator[tuple[str, torch.Tensor], None, None]:
    """(name, tensor) of these tensors of any files, in their order; see `Checkpoint.tensors`."""
    places = [
        replace(_place(each.file, each.name, each.dtype), into=each.into, look=each.look)
        for each in chosen
        if each.file.entries[each.name].start >= 0
    ]
    with closing(read_tensors(places, device, watch=watch)) as reading:
        for each in chosen:
            entry, target = each.file.entries[each.name], each.into
            if entry.start >= 0:
                yield next(reading)
                continue
            if target is None:
                target = torch.empty(entry.shape, dtype=cast_target(entry.dtype, each.dtype), device=device)
            yield each.name, target.copy_(each.file.memory_map(each.name))
            watch.on_bytes(entry.nbytes)


def _place(file: TensorFile, name: str, dtype: torch.dtype | None) -> TensorPlace:
    entry = file.entries[name]
    return TensorPlace(name, file.path, entry.start, entry.dtype, entry.shape, cast_target(entry.dtype, dtype))


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Open and check a file or folder of tensors. CheckpointError tells what is wrong with it."""
    path = Path(path)
    if path.is_dir():
        return _open_folder(path)
    if not path.exists():
        raise CheckpointError(f"{short_path(path)} does not exist. Check the path, or download the model.")
    file = open_file(path)
    return Checkpoint(path, open_parts(file) if isinstance(file, GGUFReader) else [file])


def open_file(path: Path) -> TensorFile:
    """Open one file with the reader for its first bytes."""
    if not path.is_file():
        raise CheckpointError(f"{short_path(path)} is not a file.")
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            head = file.read(512)
    except OSError as error:
        raise CheckpointError(f"{short_path(path)} cannot be read ({error.strerror}).") from None
    name, text = short_path(path), head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if size < 16 or not head.strip(b"\0"):
        zeros = "" if size < 16 else ", the first of them all zero"
        raise CheckpointError(f"{name} is incomplete: got {size} bytes{zeros}. {DOWNLOAD_AGAIN}")
    if head[8:9] == b"{":
        return SafetensorsReader(path)
    if text.startswith(b"version https://git-lfs"):
        raise CheckpointError(
            f"{name} is a git-lfs pointer, not the model. Run `git lfs pull` in its folder, or download the file again."
        )
    if text.startswith(b"<"):
        raise CheckpointError(f"{name} is a web page or a picture in XML, not a model. {DOWNLOAD_AGAIN}")
    if text.startswith((b"{", b"[")):
        raise CheckpointError(
            f"{name} is a text in JSON, as servers answer with an error, not a model: {quoted(_shown(head))}. "
            f"{DOWNLOAD_AGAIN}"
        )
    if head.startswith(b"\x1f\x8b"):
        raise CheckpointError(
            f"{name} is compressed with gzip: a model to unpack first, or a web page. Unpack it with gzip -d, or "
            "delete the file and download it again."
        )
    if head.startswith(b"GGUF"):
        return GGUFReader(path)
    if head.startswith((b"PK\x03\x04", b"\x80")):
        return PthReader(path)
    raise CheckpointError(
        f"{name} is neither a safetensors, PyTorch nor GGUF file (first bytes {head[:8].hex(' ')}). {DOWNLOAD_AGAIN}"
    )


def _shown(head: bytes) -> str:
    return head.decode("utf-8", "replace").strip("\ufeff \t\r\n")[:60]


def _open_folder(folder: Path) -> Checkpoint:
    indexes = sorted(path for path in folder.iterdir() if path.name.lower().endswith(".index.json"))
    if len(indexes) > 1:
        raise CheckpointError(
            f"{short_path(folder)} has {len(indexes)} index files ({', '.join(path.name for path in indexes)}); "
            "keep the one that belongs to the model."
        )
    if indexes:
        return _open_indexed(folder, indexes[0])
    for suffixes in ((".safetensors",), PICKLES, (".gguf",)):
        if paths := sorted(path for path in folder.iterdir() if path.suffix.lower() in suffixes):
            break
    else:
        raise CheckpointError(
            f"{short_path(folder)} holds no model: expected *.safetensors with or without an index, "
            f"{', '.join(f'*{suffix}' for suffix in PICKLES)} or *.gguf. Give the folder with these files."
        )
    names = {path.name for path in paths}
    _require_shards(folder, names, set().union(*map(shard_names, names)))
    return Checkpoint(folder, [open_file(path) for path in paths])


def _require_shards(folder: Path, present: set[str], wanted: set[str]) -> None:
    missing = sorted(wanted - present)
    if missing:
        raise CheckpointError(
            f"{short_path(folder)} lacks {len(missing)} of {len(wanted)} files: {', '.join(missing[:20])}. "
            "Download the folder again: complete files stay."
        )


def _open_indexed(folder: Path, index: Path) -> Checkpoint:
    """Open the shards of an index. All must exist and hold the tensors that the index lists."""
    weight_map = _read_index(index)
    names = sorted(set(weight_map.values()))
    _require_shards(folder, {name for name in names if (folder / name).is_file()}, set(names))
    files = []
    for name in names:
        listed = sum(file == name for file in weight_map.values())
        try:
            files.append(open_file(folder / name))
        except CheckpointError as error:
            raise CheckpointError(f"{error} ({index.name} says it holds {listed} tensors.)") from None
    checkpoint = Checkpoint(folder, files)
    for tensor, name in weight_map.items():
        if tensor not in checkpoint or checkpoint.file_of(tensor).name != name:
            raise CheckpointError(
                f"{short_path(folder / name)} does not hold tensor {tensor:.80}, which {index.name} says it does. "
                "Files of two versions seem mixed; download the folder again."
            )
    return checkpoint


def _read_index(index: Path) -> dict[str, str]:
    name = short_path(index)
    try:
        weight_map = json.loads(index.read_text("utf-8"))["weight_map"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{name} is damaged ({type(error).__name__}: {error!s:.100}). {DOWNLOAD_AGAIN}") from None
    good = isinstance(weight_map, dict) and all(
        isinstance(file, str) and f"{tensor}{file}".isprintable() for tensor, file in weight_map.items()
    )
    if not weight_map or not good:
        raise CheckpointError(f"{name} is damaged: weight_map must map tensor names to file names. {DOWNLOAD_AGAIN}")
    outside = [
        file
        for file in weight_map.values()
        if len(file) > 200 or file != PurePath(file).name or "\\" in file or file in ("", "..")
    ]
    if outside:
        raise CheckpointError(f"{name} names a file outside its folder, or with too long a name: {outside[0]:.80}.")
    return weight_map
