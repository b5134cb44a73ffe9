"""The cache of model files that all programs on this machine share, in huggingface_hub's layout.

models--OWNER--REPO/blobs/ETAG               a file's content, named by its hash; ETAG.incomplete while it comes
models--OWNER--REPO/snapshots/COMMIT/PATH    a link to it
models--OWNER--REPO/refs/main                the commit that these programs take
.locks/models--OWNER--REPO/ETAG.lock         held by whoever fetches that content
"""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from ..config.model_paths import shard_names

ORPHANED = 24 * 3600.0
"""Seconds after which nobody goes on with a partial file that has a name of its own."""
FORGOTTEN = 30 * ORPHANED
"""The same for one that any later download can go on with."""


@dataclass(frozen=True, slots=True)
class CachedRepo:
    """One model repository, `name` being OWNER/REPO, in the cache folder `cache`."""

    cache: Path
    name: str

    @property
    def folder(self) -> Path:
        return self.cache / f"models--{self.name.replace('/', '--')}"

    @property
    def snapshot(self) -> Path | None:
        """The folder of the commit that programs take; None where there is none yet."""
        try:
            commit = (self.folder / "refs" / "main").read_text("ascii").strip()
        except (OSError, UnicodeDecodeError):
            return None
        path = self.folder / "snapshots" / commit
        return path if re.fullmatch(r"[0-9a-f]{40}", commit) and path.is_dir() else None

    def blob(self, etag: str) -> Path:
        return self.folder / "blobs" / etag

    def partial(self, etag: str) -> Path:
        """The name under which huggingface_hub before 1.18 also left partial files, and went on with them."""
        return self.folder / "blobs" / f"{etag}.incomplete"

    def has(self, etag: str, size: int) -> bool:
        blob = self.blob(etag)
        return blob.is_file() and blob.stat().st_size == size

    def find(self, inside: str | None) -> Path | None:
        """A file, or a folder with all its parts, of the current commit; the commit's folder for None."""
        snapshot = self.snapshot
        if snapshot is None or inside is None:
            return snapshot
        path = snapshot / inside
        return path if path.is_file() or is_whole(path) else None

    def link(self, commit: str, inside: str, etag: str) -> None:
        """Makes a blob visible as a file of `commit`."""
        pointer, blob = self.folder / "snapshots" / commit / inside, self.blob(etag)
        if pointer.exists():
            return
        pointer.parent.mkdir(parents=True, exist_ok=True)
        pointer.unlink(missing_ok=True)  # a link to something that is gone
        try:
            pointer.symlink_to(os.path.relpath(blob, pointer.parent))
        except FileExistsError:  # another process was faster
            pass
        except OSError:  # Windows without the right to make links: huggingface_hub moves the file, too
            os.replace(blob, pointer)

    def take(self, commit: str) -> None:
        """From now on programs take `commit`."""
        ref = self.folder / "refs" / "main"
        ref.parent.mkdir(parents=True, exist_ok=True)
        new = ref.with_name(f"main.{os.getpid()}.new")
        new.write_text(commit, "ascii")
        os.replace(new, ref)

    @contextmanager
    def try_lock(self, etag: str) -> Iterator[bool]:
        """Whether this process may fetch that content now. The kernel takes the lock from a process that dies."""
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
        """Removes partial files that nobody will go on with: after a kill huggingface_hub leaves one under a new name
        each time, and ours may be of a commit that is history."""
        for partial in self.folder.glob("blobs/*.incomplete"):
            etag, _, own = partial.name.removesuffix(".incomplete").partition(".")
            try:
                age = time.time() - partial.stat().st_mtime
            except FileNotFoundError:
                continue
            if age > (ORPHANED if own else FORGOTTEN) or not own and self.blob(etag).exists():
                with self.try_lock(etag) as free:
                    if free:
                        partial.unlink(missing_ok=True)


def standard_cache() -> Path:
    """By HF_HUB_CACHE or HF_HOME, else below the home folder."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)


def is_whole(folder: Path) -> bool:
    """Whether a folder has all its shards: those that its index names, and n of those called 1-of-n."""
    names = {path.name for path in folder.glob("*") if path.is_file()}
    wanted: set[str] = set()
    for index in names:
        if index.endswith(".index.json"):
            try:
                wanted |= {str(name) for name in json.loads((folder / index).read_text("utf-8"))["weight_map"].values()}
            except (OSError, ValueError, KeyError, AttributeError, TypeError):
                return False
    wanted = wanted.union(*map(shard_names, names))
    content = {name for name in names if not name.endswith((".index.json", "config.json"))}
    return bool(content) and wanted <= names
