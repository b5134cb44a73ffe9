"""PrebuiltCache: files made once from a model and kept: experts with LoRAs merged or in 8 bits, the text encoder in 8.

    cache = PrebuiltCache(folder)
    cache.find(job)             the complete file of this Conversion, or None
    cache.build(job)            makes it; a second process waits for the first one and uses its file
    cache.files()               all files, with sizes and whether their sources have changed
    cache.prune()               removes files whose sources have changed

A file's name ends in a hash of its sources (names, sizes, times) and of the settings, so another LoRA is another file.
It grows under another name and gets its own when it is complete: an interrupted build is never used, and continues the
next time.
"""

import hashlib
import json
import logging
import re
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch

from ..config.engine_config import EngineConfig
from ..config.environment import Environment
from ..config.folders import can_write, expand, own_folder
from ..progress import CancelToken, OnProgress
from ..weights.checkpoint import open_checkpoint
from ..weights.safetensors_reader import header_text
from .conversion import FINGERPRINT, VERSION, Conversion, convert, fingerprint, has_fingerprint, prebuilt_conversions
from .model_files import ModelFiles, PrebuiltFiles
from .writer_lock import writer_lock

log = logging.getLogger("lightx2v.prebuilt")

SourceState = Literal["current", "stale", "missing-source"]

PATHS = "lightx2v_paths"
"""Metadata key: the paths of a file's sources."""
PART = ".part"


def prebuilt_folder(models_dir: str | None, environment: Environment | None = None) -> Path:
    """The cache's folder: beside the models if they have a folder, since that disk has space for them."""
    environment = environment or Environment.read()
    if models_dir := models_dir or environment.models_dir:
        return expand(models_dir) / ".built"
    if environment.cache_dir:
        return expand(environment.cache_dir) / "built"
    usual = expand("~/.cache/lightx2v/built")
    return usual if usual.is_dir() or can_write(usual) else own_folder("built")


@dataclass(frozen=True, slots=True, kw_only=True)
class CachedFile:
    """A file in the cache. `whole` is False for an interrupted build.

    `state` describes its sources: "current" (unchanged), "stale" (changed) or "missing-source" (their folder is not
    there, so a comparison is impossible).
    """

    path: Path
    size: int
    state: SourceState
    whole: bool


class PrebuiltCache:
    """The prebuilt files in one folder, which the first build creates."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def find(self, job: Conversion) -> Path | None:
        own, expected = self._own(job)
        return own.output if own.output.is_file() and has_fingerprint(own.output, expected) else None

    def build(
        self,
        job: Conversion,
        *,
        device: torch.device | str = "cpu",
        on_progress: OnProgress | None = None,
        cancel: CancelToken | None = None,
    ) -> Path:
        """The file of this job, made if it is missing. OutputError if the disk is full or not writable."""
        if (path := self.find(job)) is not None:
            return path
        own, _ = self._own(job)
        with self._locked(cancel):
            if (path := self.find(job)) is not None:  # another process made it while this one waited
                return path
            self._prune()
            log.info("Building %s once; later starts read it.", own.output.name)
            sources = [file.path for file in open_checkpoint(job.source).files] + [path for path, _ in job.loras]
            paths = json.dumps([str(path.absolute()) for path in sources])
            # An existing file with this name is damaged, or `find` would have returned it.
            convert(own, force=True, metadata={PATHS: paths}, device=device, on_progress=on_progress, cancel=cancel)
        return own.output

    def files(self) -> list[CachedFile]:
        """All files, the largest first."""
        files = []
        for path in self.folder.glob("*.safetensors*") if self.folder.is_dir() else ():
            whole = path.suffix == ".safetensors"
            if whole or path.suffix == PART:
                files.append(CachedFile(path=path, size=path.stat().st_size, state=_state(path), whole=whole))
        return sorted(files, key=lambda file: (-file.size, file.path.name))

    def prune(self) -> list[CachedFile]:
        """Remove and return the stale files."""
        if not self.folder.is_dir():
            return []
        with self._locked(None):
            return self._prune()

    def _own(self, job: Conversion) -> tuple[Conversion, str]:
        """The job with its output in this cache, and that file's fingerprint."""
        content = fingerprint(open_checkpoint(job.source), job)
        digest = hashlib.sha256(content.encode()).hexdigest()[:16]
        label = re.sub(r"[^\w.-]+", "_", f"{job.source.absolute().parent.name}-{job.output.stem}")
        return replace(job, output=self.folder / f"{label[:100]}-{digest}.safetensors"), content

    def _prune(self) -> list[CachedFile]:
        stale = [file for file in self.files() if file.state == "stale"]
        for file in stale:
            log.info("Removing %s: its sources have changed.", file.path.name)
            file.path.unlink(missing_ok=True)
        return stale

    def _locked(self, cancel: CancelToken | None) -> AbstractContextManager[None]:
        """Only one process at a time writes here."""
        return writer_lock(self.folder / ".lock", self.folder, cancel)


def _state(path: Path) -> SourceState:
    try:
        metadata = json.loads(header_text(path)[0])["__metadata__"]
        content = json.loads(metadata[FINGERPRINT])
        if content["version"] != VERSION:
            return "stale"
        recorded = [*content["of"], *content["loras"]]
        sources = [Path(source) for source in json.loads(metadata[PATHS])]
    except (OSError, ValueError, KeyError, TypeError):
        return "stale"  # interrupted before its header was complete, or another program's
    if not all(source.parent.is_dir() for source in sources):
        return "missing-source"
    for source, (_, size, time, *_) in zip(sources, recorded, strict=False):
        if not source.is_file() or (source.stat().st_size, source.stat().st_mtime_ns) != (size, time):
            return "stale"
    return "current"


def find_prebuilt(files: ModelFiles, config: EngineConfig, plain: str) -> PrebuiltFiles | None:
    """The files of a configuration with "build", if all of them exist."""
    cache = PrebuiltCache(prebuilt_folder(config.models_dir))
    found = {part: cache.find(job) for part, job in prebuilt_conversions(files, config, cache.folder, plain).items()}
    complete = {part: path for part, path in found.items() if path is not None}
    return PrebuiltFiles(**complete) if len(complete) == len(found) else None


def build_prebuilt(
    files: ModelFiles,
    config: EngineConfig,
    plain: str,
    *,
    device: torch.device | str = "cpu",
    on_progress: Callable[[str], OnProgress] | None = None,
    cancel: CancelToken | None = None,
) -> None:
    """Build the files that are missing. `on_progress(part)` receives that part's progress."""
    cache = PrebuiltCache(prebuilt_folder(config.models_dir))
    for part, job in prebuilt_conversions(files, config, cache.folder, plain).items():
        cache.build(job, device=device, on_progress=on_progress and on_progress(part), cancel=cancel)
