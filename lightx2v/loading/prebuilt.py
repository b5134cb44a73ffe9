"""What is made of a model once and kept: its experts with LoRAs merged or in 8 bits, its text encoder in 8 bits.

    store = BuiltStore(folder)
    store.find(job)             the file of this Conversion, if it is there and whole
    store.make(job)             makes it; a second process waits for the first one and takes what it made
    store.items()               what is there, with sizes and whether its sources still are what it was made of
    store.tidy()                removes what was made of files that have changed since

A file's name ends in a hash of its sources (names, sizes, times) and of the settings, so another LoRA is another file.
It grows under another name and gets its own when it is whole: what was interrupted is never used, and is continued the
next time.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from filelock import FileLock, Timeout

from ..config.engine_config import EngineConfig
from ..config.environment import Environment
from ..errors import OutputError, short_path
from ..progress import CancelToken, OnProgress
from ..weights.checkpoint import open_checkpoint
from ..weights.safetensors_reader import MAX_HEADER
from .conversion import FINGERPRINT, VERSION, Conversion, convert, fingerprint, is_made_of, recipes
from .model_files import BuiltFiles, ModelFiles

log = logging.getLogger("lightx2v.built")

State = Literal["current", "stale", "away"]

PATHS = "lightx2v_paths"
"""In a file's metadata: where its sources are."""
PART = ".part"


def folder_of(models_dir: str | None, environment: Environment | None = None) -> Path:
    """Where builds are kept: beside the models where those have a folder, since that is a disk with room for them."""
    environment = environment or Environment.read()
    if models_dir := models_dir or environment.models_dir:
        return Path(models_dir).expanduser() / ".built"
    if environment.cache_dir:
        return Path(environment.cache_dir).expanduser() / "built"
    return Path.home() / ".cache" / "lightx2v" / "built"


@dataclass(frozen=True, slots=True, kw_only=True)
class BuiltItem:
    """A file in the store. `state`: its sources are what they were ("current"), are not ("stale"), or cannot be looked
    at, since their folder is not there ("away"). `whole` is false for what was interrupted."""

    path: Path
    size: int
    state: State
    whole: bool


class BuiltStore:
    """One folder. Made when it is first written to."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def place(self, job: Conversion) -> tuple[Conversion, str]:
        """The job with its output in here, and the fingerprint that this file has."""
        print_ = fingerprint(open_checkpoint(job.source), job)
        digest = hashlib.sha256(print_.encode()).hexdigest()[:16]
        about = re.sub(r"[^\w.-]+", "_", f"{job.source.absolute().parent.name}-{job.output.stem}")
        return replace(job, output=self.folder / f"{about[:100]}-{digest}.safetensors"), print_

    def find(self, job: Conversion) -> Path | None:
        placed, print_ = self.place(job)
        return placed.output if placed.output.is_file() and is_made_of(placed.output, print_) else None

    def make(
        self,
        job: Conversion,
        *,
        device: torch.device | str = "cpu",
        on_progress: OnProgress | None = None,
        cancel: CancelToken | None = None,
    ) -> Path:
        """OutputError where there is no room or no right to write."""
        if (path := self.find(job)) is not None:
            return path
        placed, _ = self.place(job)
        with self._alone(cancel):
            if (path := self.find(job)) is not None:  # made by another process while this one waited
                return path
            self._tidy()
            log.info("Making %s once; later starts read it.", placed.output.name)
            sources = [file.path for file in open_checkpoint(job.source).files] + [path for path, _ in job.loras]
            paths = json.dumps([str(path.absolute()) for path in sources])
            # What is there under this name is damaged, or it would have been found.
            convert(placed, force=True, metadata={PATHS: paths}, device=device, on_progress=on_progress, cancel=cancel)
        return placed.output

    def items(self) -> list[BuiltItem]:
        """Largest first."""
        found = []
        for path in self.folder.glob("*.safetensors*") if self.folder.is_dir() else ():
            whole = path.suffix == ".safetensors"
            if whole or path.suffix == PART:
                found.append(BuiltItem(path=path, size=path.stat().st_size, state=_state(path), whole=whole))
        return sorted(found, key=lambda item: (-item.size, item.path.name))

    def tidy(self) -> list[BuiltItem]:
        """Removes what is stale, and says what it was."""
        if not self.folder.is_dir():
            return []
        with self._alone(None):
            return self._tidy()

    def _tidy(self) -> list[BuiltItem]:
        stale = [item for item in self.items() if item.state == "stale"]
        for item in stale:
            log.info("Removing %s: it was made of files that have changed.", item.path.name)
            item.path.unlink(missing_ok=True)
        return stale

    @contextmanager
    def _alone(self, cancel: CancelToken | None) -> Iterator[None]:
        """One process at a time writes here. The system releases the lock of a process that dies."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            lock, waited = FileLock(self.folder / ".lock"), False
            while True:
                try:
                    lock.acquire(timeout=0.3, poll_interval=0.05)
                    break
                except Timeout:
                    if not waited:
                        log.info("Another process is building in %s; waiting for it.", short_path(self.folder))
                    waited = True
                    if cancel is not None:
                        cancel.check()
        except OSError as error:
            raise OutputError(f"{short_path(self.folder)} cannot be written to: {error.strerror or error}.") from None
        try:
            yield
        finally:
            lock.release()


def _state(path: Path) -> State:
    try:
        about = _metadata(path)
        made = json.loads(about[FINGERPRINT])
        if made["version"] != VERSION:
            return "stale"
        known = [*made["of"], *made["loras"]]
        sources = [Path(source) for source in json.loads(about[PATHS])]
    except (OSError, ValueError, KeyError, TypeError, struct.error):
        return "stale"  # interrupted before its header was whole, or not ours
    if not all(source.parent.is_dir() for source in sources):
        return "away"
    for source, (_, size, time, *_) in zip(sources, known, strict=False):
        if not source.is_file() or (source.stat().st_size, source.stat().st_mtime_ns) != (size, time):
            return "stale"
    return "current"


def _metadata(path: Path) -> dict[str, str]:
    """Of a file that need not be whole."""
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        if length > MAX_HEADER:
            raise ValueError("no header")
        return json.loads(file.read(length))["__metadata__"]


def find_built(files: ModelFiles, config: EngineConfig, plain: str) -> BuiltFiles | None:
    """What a configuration with "build" has made before, if all of it is there."""
    store = BuiltStore(folder_of(config.models_dir))
    found = {part: store.find(job) for part, job in recipes(files, config, store.folder, plain).items()}
    if not all(found.values()):
        return None
    return BuiltFiles(**found)  # type: ignore[arg-type]


def make_built(
    files: ModelFiles,
    config: EngineConfig,
    plain: str,
    *,
    device: torch.device | str = "cpu",
    on_progress: Callable[[str], OnProgress] | None = None,
    cancel: CancelToken | None = None,
) -> BuiltFiles:
    """Makes what is not there. `on_progress(part)` hears of that part."""
    store = BuiltStore(folder_of(config.models_dir))
    made = {
        part: store.make(job, device=device, on_progress=on_progress and on_progress(part), cancel=cancel)
        for part, job in recipes(files, config, store.folder, plain).items()
    }
    return BuiltFiles(**made)
