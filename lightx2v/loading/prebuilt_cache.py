"""What is made of a model once and kept: its experts with LoRAs merged or in 8 bits, its text encoder in 8 bits.

    store = PrebuiltCache(folder)
    store.find(job)             the file of this Conversion, if it is there and whole
    store.build(job)             makes it; a second process waits for the first one and takes what it made
    store.files()               what is there, with sizes and whether its sources still are what it was made of
    store.prune()                removes what was made of files that have changed since

A file's name ends in a hash of its sources (names, sizes, times) and of the settings, so another LoRA is another file.
It grows under another name and gets its own when it is whole: what was interrupted is never used, and is continued the
next time.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
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
from ..weights.safetensors_reader import header_text
from .conversion import FINGERPRINT, VERSION, Conversion, convert, fingerprint, has_fingerprint, prebuilt_conversions
from .model_files import ModelFiles, PrebuiltFiles

log = logging.getLogger("lightx2v.prebuilt")

State = Literal["current", "stale", "missing-source"]

PATHS = "lightx2v_paths"
"""In a file's metadata: where its sources are."""
PART = ".part"


def prebuilt_folder(models_dir: str | None, environment: Environment | None = None) -> Path:
    """Where builds are kept: beside the models where those have a folder, since that is a disk with room for them."""
    environment = environment or Environment.read()
    if models_dir := models_dir or environment.models_dir:
        return Path(models_dir).expanduser() / ".built"
    if environment.cache_dir:
        return Path(environment.cache_dir).expanduser() / "built"
    return Path.home() / ".cache" / "lightx2v" / "built"


@dataclass(frozen=True, slots=True, kw_only=True)
class CachedFile:
    """A file in the store. `state`: its sources are what they were ("current"), are not ("stale"), or cannot be looked
    at, since their folder is not there ("missing-source"). `whole` is false for what was interrupted."""

    path: Path
    size: int
    state: State
    whole: bool


class PrebuiltCache:
    """One folder. Made when it is first written to."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def locate(self, job: Conversion) -> tuple[Conversion, str]:
        """The job with its output in here, and the fingerprint that this file has."""
        print_ = fingerprint(open_checkpoint(job.source), job)
        digest = hashlib.sha256(print_.encode()).hexdigest()[:16]
        about = re.sub(r"[^\w.-]+", "_", f"{job.source.absolute().parent.name}-{job.output.stem}")
        return replace(job, output=self.folder / f"{about[:100]}-{digest}.safetensors"), print_

    def find(self, job: Conversion) -> Path | None:
        placed, print_ = self.locate(job)
        return placed.output if placed.output.is_file() and has_fingerprint(placed.output, print_) else None

    def build(
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
        placed, _ = self.locate(job)
        with self._locked(cancel):
            if (path := self.find(job)) is not None:  # made by another process while this one waited
                return path
            self._prune()
            log.info("Making %s once; later starts read it.", placed.output.name)
            sources = [file.path for file in open_checkpoint(job.source).files] + [path for path, _ in job.loras]
            paths = json.dumps([str(path.absolute()) for path in sources])
            # What is there under this name is damaged, or it would have been found.
            convert(placed, force=True, metadata={PATHS: paths}, device=device, on_progress=on_progress, cancel=cancel)
        return placed.output

    def files(self) -> list[CachedFile]:
        """Largest first."""
        found = []
        for path in self.folder.glob("*.safetensors*") if self.folder.is_dir() else ():
            whole = path.suffix == ".safetensors"
            if whole or path.suffix == PART:
                found.append(CachedFile(path=path, size=path.stat().st_size, state=_state(path), whole=whole))
        return sorted(found, key=lambda item: (-item.size, item.path.name))

    def prune(self) -> list[CachedFile]:
        """Removes what is stale, and says what it was."""
        if not self.folder.is_dir():
            return []
        with self._locked(None):
            return self._prune()

    def _prune(self) -> list[CachedFile]:
        stale = [item for item in self.files() if item.state == "stale"]
        for item in stale:
            log.info("Removing %s: it was made of files that have changed.", item.path.name)
            item.path.unlink(missing_ok=True)
        return stale

    @contextmanager
    def _locked(self, cancel: CancelToken | None) -> Iterator[None]:
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
    except (OSError, ValueError, KeyError, TypeError):
        return "stale"  # interrupted before its header was whole, or not ours
    if not all(source.parent.is_dir() for source in sources):
        return "missing-source"
    for source, (_, size, time, *_) in zip(sources, known, strict=False):
        if not source.is_file() or (source.stat().st_size, source.stat().st_mtime_ns) != (size, time):
            return "stale"
    return "current"


def _metadata(path: Path) -> dict[str, str]:
    """Of a file that need not be whole."""
    return json.loads(header_text(path)[0])["__metadata__"]


def find_prebuilt(files: ModelFiles, config: EngineConfig, plain: str) -> PrebuiltFiles | None:
    """What a configuration with "build" has made before, if all of it is there."""
    store = PrebuiltCache(prebuilt_folder(config.models_dir))
    found = {part: store.find(job) for part, job in prebuilt_conversions(files, config, store.folder, plain).items()}
    if not all(found.values()):
        return None
    return PrebuiltFiles(**found)  # type: ignore[arg-type]


def build_prebuilt(
    files: ModelFiles,
    config: EngineConfig,
    plain: str,
    *,
    device: torch.device | str = "cpu",
    on_progress: Callable[[str], OnProgress] | None = None,
    cancel: CancelToken | None = None,
) -> PrebuiltFiles:
    """Makes what is not there. `on_progress(part)` hears of that part."""
    store = PrebuiltCache(prebuilt_folder(config.models_dir))
    made = {
        part: store.build(job, device=device, on_progress=on_progress and on_progress(part), cancel=cancel)
        for part, job in prebuilt_conversions(files, config, store.folder, plain).items()
    }
    return PrebuiltFiles(**made)
