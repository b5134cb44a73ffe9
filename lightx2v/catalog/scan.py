"""Scan folders for model files. What a header said is remembered, so that a file is opened once for each content.

No link is followed that leads out of the folders. 10 000 LoRAs of A14B's size take six seconds the first time on one
core, and one afterwards.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..config.environment import Environment
from ..config.model_paths import shard_names
from ..errors import short_path
from .found_file import FoundFile
from .lora_notes import BESIDE, PICTURES

log = logging.getLogger("lightx2v.catalog")

Describe = Callable[[Path, int], FoundFile | None]
"""From a path and its size to what it is; None for something else than a model file."""

ENDINGS = (".safetensors", ".gguf", ".pth", ".pt")
SHARD = re.compile(r".*-[0-9]{5}-of-[0-9]{5}\.safetensors")
GGUF_FIRST = re.compile(r".*-00001-of-[0-9]{5}\.gguf")
"""The name of the first part of a split GGUF file, by which the whole is opened."""
MAX_ITEMS = 200_000
"""Files in all folders together, beyond which the rest is left out: a disk's root was told by mistake."""
VERSION = 2
"""Version of the descriptions. Those of another version are made anew."""


@dataclass(frozen=True, slots=True)
class Item:
    """A file, or a folder of shards or of a tokenizer, with what identifies its content."""

    path: Path
    size: int
    changed: int

    @property
    def is_tokenizer(self) -> bool:
        return (self.path / "tokenizer.json").is_file()


def describe_late(path: Path, size: int) -> FoundFile | None:
    """`describe.describe`. Only this imports it, and with it torch, which takes seconds: once everything is remembered,
    nothing needs it."""
    from .describe import describe

    return describe(path, size)


def recognise_late(path: Path, size: int) -> FoundFile | None:
    """`describe.recognise`, imported as late."""
    from .describe import recognise

    return recognise(path, size)


def scan(folders: Sequence[Path], memory: Path | None = None, *, describe: Describe = describe_late) -> list[FoundFile]:
    """All model files in `folders`, ordered by path. `memory` is the file that remembers descriptions."""
    known = _load(memory) if memory else {}
    now: dict[str, list[Any]] = {}
    found: dict[Path, FoundFile] = {}
    for item in items(folders):
        key = str(item.path)
        entry = known.get(key)
        if entry is None or entry[:2] != [item.size, item.changed]:
            file = _tokenizer(item) if item.is_tokenizer else describe(item.path, item.size)
            entry = [item.size, item.changed, file.to_json() if file is not None else None]
        now[key] = entry
        if entry[2] is not None:
            # A file that several commits of a cached repository share is one file.
            found.setdefault(item.path.resolve(), FoundFile.from_json(entry[2]))
    if memory:
        roots = [f"{folder.resolve()}{os.sep}" for folder in folders]
        others = {key: entry for key, entry in known.items() if not key.startswith(tuple(roots))}
        if (others | now) != known:
            _save(memory, others | now)
    return sorted(found.values(), key=lambda file: str(file.path).lower())


def items(folders: Sequence[Path]) -> Iterator[Item]:
    """What `scan` describes. Unreadable folders and files are left out."""
    roots = [folder.resolve() for folder in folders]
    left = MAX_ITEMS
    for root in roots:
        for place, inside, names in os.walk(root):
            inside[:] = sorted(name for name in inside if not name.startswith(".") and name != "blobs")
            folder = Path(place)
            notes = _notes(folder, names)
            files = [each for name in sorted(names) if (each := _file(folder / name, roots, notes)) is not None]
            if (left := left - len(names)) < 0:
                log.warning("%s holds too many files; the rest is left out.", short_path(root))
                return
            yield from _grouped(folder, files)


def _notes(folder: Path, names: Sequence[str]) -> dict[str, int]:
    """{file name without its ending: when the newest note or picture beside it changed}."""
    newest: dict[str, int] = {}
    for name in names:
        stem = next((name.removesuffix(ending) for ending in (*BESIDE, *PICTURES) if name.endswith(ending)), None)
        if stem:
            with contextlib.suppress(OSError):
                stem = stem.removesuffix(".preview")
                newest[stem] = max(newest.get(stem, 0), (folder / name).stat().st_mtime_ns)
    return newest


def _file(path: Path, roots: Sequence[Path], notes: Mapping[str, int]) -> Item | None:
    if not path.name.lower().endswith(ENDINGS) and path.name != "tokenizer.json":
        return None
    try:
        real = path.resolve(strict=True)
        stat = real.stat()
    except (OSError, RuntimeError):
        return None
    if not real.is_file() or not any(real.is_relative_to(root) for root in roots):
        return None
    return Item(path, stat.st_size, max(stat.st_mtime_ns, notes.get(path.stem, 0)))


def _grouped(folder: Path, files: Sequence[Item]) -> Iterator[Item]:
    """The files of one folder, its shards as one item, and a tokenizer as its folder."""
    shards = [item for item in files if SHARD.fullmatch(item.path.name)]
    if shards:
        yield _sum(folder, shards)
    for first in [item for item in files if GGUF_FIRST.fullmatch(item.path.name)]:
        parts = [item for item in files if item.path.name in shard_names(first.path.name)]
        yield _sum(first.path, parts)
        shards += parts
    for item in files:
        if item.path.name == "tokenizer.json":
            if _may_be_umt5(folder):
                yield Item(folder, item.size, item.changed)
        elif item not in shards:
            yield item


def _sum(path: Path, parts: Sequence[Item]) -> Item:
    return Item(path, sum(item.size for item in parts), max(item.changed for item in parts))


def _may_be_umt5(folder: Path) -> bool:
    """Whether a folder is UMT5's tokenizer by its name: google/umt5-xxl, or tokenizer in a Wan repository."""
    if "umt5" in folder.name.lower():
        return True
    above = folder.parent / "model_index.json"
    try:
        return folder.name == "tokenizer" and "Wan" in above.read_text("utf-8")[:500]
    except (OSError, ValueError):
        return False


def _tokenizer(item: Item) -> FoundFile:
    return FoundFile(path=item.path, kind="tokenizer", size=item.size)


def memory_file(environment: Environment | None = None) -> Path:
    """Where the descriptions are remembered: below LIGHTX2V_CACHE_DIR, or else in the home folder's .cache."""
    named = (environment or Environment.read()).cache_dir or "~/.cache/lightx2v"
    return Path(os.path.expanduser(named)) / "catalog.json"


def _load(memory: Path) -> dict[str, list[Any]]:
    try:
        content = json.loads(memory.read_text("utf-8"))
        if content["version"] != VERSION:
            return {}
        entries = content["files"]
        for entry in entries.values():
            size, changed, file = entry
            if not isinstance(size, int) or not isinstance(changed, int):
                return {}
            if file is not None:
                FoundFile.from_json(file)
        return entries
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return {}


def _save(memory: Path, entries: dict[str, list[Any]]) -> None:
    """A memory that cannot be written costs time at the next start, and nothing else."""
    try:
        memory.parent.mkdir(parents=True, exist_ok=True)
        new = memory.with_name(f"{memory.name}.{os.getpid()}.new")
        new.write_text(json.dumps({"version": VERSION, "files": entries}), "utf-8")
        os.replace(new, memory)
    except OSError as error:
        log.warning("%s cannot be written: %s.", short_path(memory), error.strerror)
