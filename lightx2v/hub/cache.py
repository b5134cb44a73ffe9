"""The cache of model files that all programs on this machine share, in huggingface_hub's layout.

models--OWNER--REPO/blobs/ETAG               a file's content, named by its hash; ETAG.incomplete while it arrives
models--OWNER--REPO/snapshots/COMMIT/PATH    a link to it
models--OWNER--REPO/refs/main                the current commit
.locks/models--OWNER--REPO/ETAG.lock         held by the process that downloads that content
"""

import json
import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from ..config.model_paths import part_names, shard_names

ABANDONED = 24 * 3600.0
"""Age in seconds at which a partial file with a name of its own is deleted: no program continues it."""
STALE = 30 * ABANDONED
"""The same for a partial file that any later download can continue."""


@dataclass(frozen=True, slots=True)
class CachedRepo:
    """The model repository `name`, OWNER/REPO, in the cache folder `cache`."""

    cache: Path
    name: str

    @property
    def folder(self) -> Path:
        return self.cache / f"models--{self.name.replace('/', '--')}"

    @property
    def snapshot(self) -> Path | None:
        """The folder of the current commit; None where there is none yet."""
        try:
            commit = (self.folder / "refs" / "main").read_text("ascii").strip()
        except (OSError, UnicodeDecodeError):
            return None
        path = self.folder / "snapshots" / commit
        return path if re.fullmatch(r"[0-9a-f]{40}", commit) and path.is_dir() else None

    def blob(self, etag: str) -> Path:
        return self.folder / "blobs" / etag

    def partial(self, etag: str) -> Path:
        """The partial file of a content, under the name from which huggingface_hub before 1.18 also continued."""
        return self.folder / "blobs" / f"{etag}.incomplete"

    def has(self, etag: str, size: int) -> bool:
        blob = self.blob(etag)
        return blob.is_file() and blob.stat().st_size == size

    def find(self, path: str | None) -> Path | None:
        """A file, or a folder with all its shards, in the current commit; the commit's own folder for None."""
        snapshot = self.snapshot
        if snapshot is None or path is None:
            return snapshot
        place = snapshot / path
        whole = place.is_file() and all((place.parent / part).is_file() for part in part_names(place.name))
        return place if whole or is_complete(place) else None

    def link(self, commit: str, path: str, etag: str) -> None:
        """Make a blob visible as the file `path` of `commit`."""
        pointer, blob = self.folder / "snapshots" / commit / path, self.blob(etag)
        if pointer.exists():
            return
        pointer.parent.mkdir(parents=True, exist_ok=True)
        pointer.unlink(missing_ok=True)  # a link whose target is gone
        try:
            pointer.symlink_to(os.path.relpath(blob, pointer.parent))
        except FileExistsError:  # another process was faster
            pass
        except OSError:  # Windows without the right to make links: huggingface_hub moves the file, too
            os.replace(blob, pointer)

    def make_current(self, commit: str) -> None:
        """Let all programs use `commit` from now on."""
        ref = self.folder / "refs" / "main"
        ref.parent.mkdir(parents=True, exist_ok=True)
        new = ref.with_name(f"main.{os.getpid()}.new")
        new.write_text(commit, "ascii")
        os.replace(new, ref)

    @contextmanager
    def try_lock(self, etag: str) -> Iterator[bool]:
        """Yield whether this process may download a content now. The kernel frees the lock of a process that dies."""
        from filelock import FileLock, SoftFileLock, Timeout

        path = self.cache / ".locks" / self.folder.name / f"{etag}.lock"
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(path, mode=0o664)
        try:
            try:
                lock.acquire(blocking=False)
            except NotImplementedError:  # a file system without flock
                lock = SoftFileLock(path, mode=0o664)
                lock.acquire(blocking=False)
        except Timeout:
            yield False
            return
        try:
            yield True
        finally:
            lock.release()

    def sweep(self) -> None:
        """Delete partial files that no program will continue.

        A killed huggingface_hub leaves one under a new name each time, and ours may belong to an old commit.
        """
        for partial in self.folder.glob("blobs/*.incomplete"):
            etag, _, own_name = partial.name.removesuffix(".incomplete").partition(".")
            try:
                age = time.time() - partial.stat().st_mtime
            except FileNotFoundError:
                continue
            if age > (ABANDONED if own_name else STALE) or not own_name and self.blob(etag).exists():
                with self.try_lock(etag) as locked:
                    if locked:
                        partial.unlink(missing_ok=True)


def standard_cache() -> Path:
    """The cache folder: HF_HUB_CACHE, below HF_HOME, or below the home folder."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)


def is_complete(folder: Path) -> bool:
    """Whether a folder has all its shards: those that its index names, and n of those called 1-of-n."""
    names = {path.name for path in folder.glob("*") if path.is_file()}
    wanted = set[str]().union(*map(shard_names, names))
    for index in names:
        if index.endswith(".index.json"):
            try:
                wanted |= {str(name) for name in json.loads((folder / index).read_text("utf-8"))["weight_map"].values()}
            except (OSError, ValueError, KeyError, AttributeError, TypeError):
                return False
    content = {name for name in names if not name.endswith((".index.json", "config.json"))}
    return bool(content) and wanted <= names
