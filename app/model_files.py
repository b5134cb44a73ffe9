"""Which files a preset needs and which of them are here. Who downloads is given to the page as a `Files`."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from lightx2v.config import PROJECT, needed_files
from lightx2v.engine_config import EngineConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class FileState:
    """One thing that a preset needs. `bytes` is its whole size where it is known, `here` how much of it is."""

    name: str
    ready: bool
    bytes: int | None = None
    here: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Download:
    """A download in progress."""

    done: int
    total: int
    per_second: float
    eta: float | None
    error: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class FilesStatus:
    files: tuple[FileState, ...]
    disk_free: int
    download: Download | None = None
    can_download: bool = False

    @property
    def ready(self) -> bool:
        return all(file.ready for file in self.files)

    @property
    def missing_bytes(self) -> int | None:
        """Bytes to fetch; None where a size is not known."""
        missing = [file for file in self.files if not file.ready]
        if any(file.bytes is None for file in missing):
            return None
        return sum((file.bytes or 0) - file.here for file in missing)


class Files(Protocol):
    """What the page asks about model files. Every method returns at once; `download` goes on in the background."""

    def status(self, config: EngineConfig) -> FilesStatus: ...

    def download(self, config: EngineConfig) -> None: ...

    def cancel(self) -> None: ...


class LocalFiles:
    """Files that are on this machine already, in the model folder, the working folder or the project."""

    def __init__(self, folders: Sequence[Path] = ()) -> None:
        self._folders = [*folders, Path.cwd(), PROJECT]

    def status(self, config: EngineConfig) -> FilesStatus:
        folders = [Path(config.models_dir), *self._folders] if config.models_dir else self._folders
        states = []
        for name in needed_files(config):
            found = next((folder / name for folder in folders if (folder / name).exists()), None)
            states.append(FileState(name=name, ready=found is not None, here=_bytes(found) if found else 0))
        return FilesStatus(files=tuple(states), disk_free=shutil.disk_usage(folders[0]).free)

    def download(self, config: EngineConfig) -> None:
        """Nothing can be fetched without the Hub."""

    def cancel(self) -> None:
        """There is nothing to cancel."""


def _bytes(path: Path) -> int:
    return sum(p.stat().st_size for p in path.rglob("*") if p.is_file()) if path.is_dir() else path.stat().st_size
