"""UsedFiles: the model files of a loaded engine, by size and content, so that a video can be made again from them.

The Hub's cache names a file by its hash. Any other file is hashed once, in the background, and the hash is remembered
with the file's size and time; a video that is written before has the size alone.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import threading
from collections.abc import Callable, Container, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from ..background import Background
from ..config.engine_config import FILE_KEYS
from ..config.environment import Environment
from ..errors import ConfigError, byte_size, short_path
from .catalog import Catalog
from .scan import memory_file

log = logging.getLogger("lightx2v.catalog")

FLAGS = {"high": "--high", "low": "--low", "t5": "--t5", "vae": "--vae"}
ROLES = {
    "high": "high-noise expert",
    "low": "low-noise expert",
    "t5": "T5",
    "vae": "VAE",
    "lora": "LoRA",
    "loras": "LoRA",
}
"""The role in a video's records of the file that a key names, by the key's first word."""
HASHED_AT_ONCE = 2 << 30
"""Bytes of a file at its place whose content is compared whatever it takes: two seconds at most. An expert's hash is
compared where it is known."""

PIECE = 1 << 20
"""Bytes that are hashed at once. Between two, the thread looks whether it should stop."""


class UsedFiles:
    """`paths` are files or folders of shards by role, such as "high-noise expert"."""

    def __init__(self, paths: Mapping[str, Path]) -> None:
        self._files = [(role, file) for role, path in paths.items() for file in _files(path)]

    def hash_in_background(self) -> None:
        """Hash what has no known hash yet."""
        unknown = [file for _, file in self._files if known_hash(file) is None]
        if unknown:
            Background(partial(_hash_all, unknown), "lightx2v-hash")

    def to_json(self, loras: Iterable[Path] = ()) -> list[dict[str, Any]]:
        """Role, name, bytes and, where it is known, sha256 of each file, with those of `loras`."""
        files = [*self._files, *(("LoRA", path) for path in loras)]
        return [
            {"role": role, "name": file.name, "size": file.stat().st_size, "sha256": known_hash(file)}
            for role, file in dict.fromkeys(files)
            if file.is_file()
        ]


def known_hash(path: Path) -> str | None:
    """The sha256 of a file's content, from the Hub's cache or as it was remembered; None before it was computed."""
    real = path.resolve()
    if real.parent.name == "blobs" and re.fullmatch(r"[0-9a-f]{64}", real.name):
        return real.name
    entry = _remembered().get(str(real))
    return entry[2] if entry is not None and entry[:2] == _identity(real) else None


def content_hash(path: Path) -> str:
    """The sha256 of a file's content, computed where it is not known."""
    if (known := known_hash(path)) is not None:
        return known
    return _remembered_hash(path, threading.Event())


def _remembered_hash(path: Path, stop: threading.Event) -> str:
    """Hash a file and remember it. "" if that was stopped."""
    sha256, piece = hashlib.sha256(), memoryview(bytearray(PIECE))
    with path.open("rb", buffering=0) as file:
        while size := file.readinto(piece):
            if stop.is_set():
                return ""
            sha256.update(piece[:size])
    real, digest = path.resolve(), sha256.hexdigest()
    _remember({**_remembered(), str(real): [*_identity(real), digest]})
    return digest


def find_again(
    settings: Mapping[str, Any], files: Any, catalog: Callable[[], Catalog], named: Container[str] = ()
) -> dict[str, Any]:
    """A video's settings, with the new places of files that have moved. `files` are those of UsedFiles; parts that are
    `named` anew ("high", "low", "t5", "vae") are not looked for.

    ConfigError names a file that is neither at its place nor, with the same content, in the folders of models.
    """
    records = [record for record in files if isinstance(record, Mapping)] if isinstance(files, list) else []
    found = dict(settings)
    for key in FILE_KEYS:
        if key in settings and key.partition("_")[0] not in named:
            found[key] = _place(settings[key], records, catalog, key)
    for key in ("lora_configs", "loras"):
        loras = settings.get(key)
        if isinstance(loras, list) and all(isinstance(lora, Mapping) for lora in loras):
            found[key] = [{**lora, "path": _place(lora.get("path"), records, catalog, key)} for lora in loras]
    return found


def _place(value: Any, records: list[Mapping[str, Any]], catalog: Callable[[], Catalog], key: str) -> Any:
    """The place of the file `value`: its own, or that of a file with the recorded size and content."""
    if not isinstance(value, str) or not value.startswith(("/", "~", "\\")) and not re.match(r"[A-Za-z]:", value):
        return value
    path = Path(os.path.expanduser(value))
    role = ROLES.get(key.partition("_")[0])
    named = [each for each in records if each.get("name") == path.name]
    recorded = [each for each in named if each.get("role") == role] or named
    if os.path.isdir(path) or not recorded or any(_is_still(path, each) for each in recorded):
        return value
    size, digest = recorded[0].get("size"), recorded[0].get("sha256")
    for file in catalog().files:
        if file.size == size and file.path.is_file() and (digest is None or content_hash(file.path) == digest):
            return str(file.path)
    flag = next((flag for part, flag in FLAGS.items() if key.startswith(part)), "--set " + key)
    told = f" ({byte_size(size)})" if isinstance(size, int) else ""
    raise ConfigError(
        f"The file {short_path(path)}{told} of this video is neither at its place nor, with the same content, in the "
        f"folders of models. Give it with {flag}, or name its folder with --model_dirs."
    )


def _is_still(path: Path, record: Mapping[str, Any]) -> bool:
    """Whether the file at `path` is the recorded one. Where only its size can be compared, the log says so."""
    if not os.path.isfile(path) or (size := path.stat().st_size) != record.get("size"):
        return False
    recorded = record.get("sha256")
    digest = content_hash(path) if recorded and size <= HASHED_AT_ONCE else known_hash(path)
    if not recorded or digest is None:
        log.warning(
            "Of %s only the size is compared with the video's file, because no hash is known.", short_path(path)
        )
        return True
    return digest == recorded


def _files(path: Path) -> list[Path]:
    return sorted(file for file in path.iterdir() if file.is_file()) if path.is_dir() else [path]


def _hash_all(files: Iterable[Path], stop: threading.Event) -> None:
    for file in files:
        try:
            if known_hash(file) is None:
                _remembered_hash(file, stop)
        except OSError as error:
            log.debug("%s is not hashed: %s", short_path(file), error)


def _identity(path: Path) -> list[int]:
    stat = path.stat()
    return [stat.st_size, stat.st_mtime_ns]


def _memory() -> Path:
    return memory_file(Environment.read()).with_name("hashes.json")


def _remembered() -> dict[str, list[Any]]:
    try:
        content = json.loads(_memory().read_text("utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    entries = content.items() if isinstance(content, dict) else ()
    return {key: entry for key, entry in entries if isinstance(entry, list) and len(entry) == 3}


def _remember(entries: Mapping[str, list[Any]]) -> None:
    """A memory that cannot be written costs time, and nothing else."""
    memory = _memory()
    try:
        memory.parent.mkdir(parents=True, exist_ok=True)
        new = memory.with_name(f"{memory.name}.{os.getpid()}.new")
        new.write_text(json.dumps(entries), "utf-8")
        os.replace(new, memory)
    except OSError as error:
        log.warning("%s cannot be written: %s.", short_path(memory), error.strerror)
