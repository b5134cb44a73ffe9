"""Model files: which ones a preset needs, which are on this machine, and the download of the others."""

import logging
import threading
import time
from collections.abc import Container
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from lightx2v.config.engine_config import EngineConfig, hub_name
from lightx2v.errors import Cancelled, LightX2VError
from lightx2v.hub import Hub, ensure, find_all, missing
from lightx2v.hub.listing import HubFile, list_files
from lightx2v.hub.page_cache import bytes_in_page_cache
from lightx2v.hub.plan import disk_free, files_below, planned_file, size_on_disk
from lightx2v.progress import CancelToken, Meter, Progress

log = logging.getLogger("lightx2v.page")

CACHED = 0.95
"""The share of a model's bytes in memory from which on its files count as cached."""

RETRY_SECONDS = 600.0
"""Seconds until a repository that could not be listed is listed again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FileState:
    """A file or folder that a preset needs: `bytes` is its full size if known, `here` the bytes on this machine, and
    `cached` those of them that are in memory."""

    name: str
    ready: bool
    bytes: int | None = None
    here: int = 0
    cached: int = 0


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
    """All files of a preset, and the download."""

    files: tuple[FileState, ...]
    disk_free: int
    download: Download | None = None
    can_download: bool = False

    @property
    def ready(self) -> bool:
        return all(file.ready for file in self.files)

    @property
    def cached(self) -> bool:
        """Whether the system has nearly all of the files in memory, so that loading reads no disk."""
        return 0 < CACHED * sum(file.here for file in self.files) <= sum(file.cached for file in self.files)

    @property
    def missing_bytes(self) -> int | None:
        """Bytes to download; None if a size is unknown."""
        missing = [file for file in self.files if not file.ready]
        if any(file.bytes is None for file in missing):
            return None
        return sum((file.bytes or 0) - file.here for file in missing)


class HubFiles:
    """Files in a folder or in the Hub's cache on this machine, and the Hub for missing ones.

    A background thread lists each repository once, so that the page can show sizes before a download. Every method
    returns at once.
    """

    def __init__(self, hub: Hub | None = None) -> None:
        self._hub = hub
        self._lock = threading.Lock()
        self._listings: dict[str, list[HubFile]] = {}
        self._listed_at: dict[str, float] = {}
        self._running: CancelToken | None = None
        self._download: Download | None = None

    def status(self, config: EngineConfig) -> FilesStatus:
        with self._lock:  # before looking for files: a download that has ended by now has left all of them
            download = self._download
        absent = set(missing(config))
        states = [self._state(name, place, absent) for name, place in find_all(config).items()]
        free = disk_free(self._source.cache)
        return FilesStatus(files=tuple(states), disk_free=free, download=download, can_download=bool(absent))

    def download(self, config: EngineConfig) -> None:
        with self._lock:
            if self._running is not None:
                return
            token = self._running = CancelToken()
            self._download = Download(done=0, total=0, per_second=0.0, eta=None)
        threading.Thread(target=self._fetch, args=(config, token), name="download", daemon=True).start()

    def cancel(self) -> None:
        """Stops the download, or dismisses the error of a failed one."""
        with self._lock:
            if self._running is not None:
                self._running.cancel()
            self._download = None

    @property
    def _source(self) -> Hub:
        return self._hub or Hub()

    def _state(self, name: str, place: Path | None, absent: Container[str]) -> FileState:
        if place is not None:
            return FileState(name=name, ready=True, here=size_on_disk(place), cached=bytes_in_page_cache(place))
        repo, inside = hub_name(name) or ("", None)
        if name not in absent or inside is None:
            return FileState(name=name, ready=False)
        self._list(repo)
        listed = files_below(self._listings.get(repo, ()), inside)
        files = [planned_file(self._source.repo(repo), file) for file in listed]
        size = sum(file.file.size for file in files) if files else None
        return FileState(name=name, ready=False, bytes=size, here=sum(file.here for file in files))

    def _list(self, repo: str) -> None:
        """Lists the repository in the background, unless that was done or tried recently."""
        with self._lock:
            if repo in self._listings or time.monotonic() - self._listed_at.get(repo, -RETRY_SECONDS) < RETRY_SECONDS:
                return
            self._listed_at[repo] = time.monotonic()

        def list_repo() -> None:
            try:
                listing = list_files(self._source, repo)
            except LightX2VError as error:  # a download will show the same error
                log.debug("%s", error)
                return
            with self._lock:
                self._listings[repo] = listing

        threading.Thread(target=list_repo, name="list", daemon=True).start()

    def _fetch(self, config: EngineConfig, token: CancelToken) -> None:
        error = ""
        try:
            ensure(config, meter=Meter(on_progress=partial(self._note, token)), cancel=token, hub=self._source)
        except Cancelled:
            pass
        except LightX2VError as failure:
            error = str(failure)
        finally:
            with self._lock:
                self._running = None
                if self._download is not None:
                    self._download = replace(self._download, error=error) if error else None

    def _note(self, token: CancelToken, event: Progress) -> None:
        speed = (event.total - event.step) / event.eta if event.eta else 0.0
        with self._lock:
            if not token.cancelled:
                self._download = Download(done=event.step, total=event.total, per_second=speed, eta=event.eta)
