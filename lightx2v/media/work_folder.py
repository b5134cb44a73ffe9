"""WorkFolder: a hidden folder for unfinished files, beside the place where the finished ones go.

    work = WorkFolder(target.parent)
    ...                                 # write into work.path, and rename the finished file out of it
    work.close()

A process that is killed leaves its folder behind. `sweep` removes such folders and leaves alone those whose process
lives: it holds the lock beside its folder, and the system frees the lock of a process that ends.
"""

import contextlib
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

WORK_PREFIX = ".lightx2v-"
LOCK = ".lock"


class WorkFolder:
    """The folder `path` in `parent`, made now and removed by `close`. OSError where that is not possible."""

    def __init__(self, parent: Path) -> None:
        self.path = parent / f"{WORK_PREFIX}{secrets.token_hex(6)}"
        self._lock = FileLock(_lock_of(self.path), thread_local=False)
        with contextlib.suppress(NotImplementedError):  # a file system without locks
            self._lock.acquire(blocking=False)
        try:
            self.path.mkdir(mode=0o700)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Remove the folder with all it holds. May be called again."""
        shutil.rmtree(self.path, ignore_errors=True)
        with contextlib.suppress(OSError):
            _lock_of(self.path).unlink(missing_ok=True)
        self._lock.release()


def sweep(parent: Path) -> None:
    """Remove what killed processes have left in `parent`: their work folders, and files that begin like one."""
    for path in list(_leftovers(parent)):
        lock = FileLock(_lock_of(path), thread_local=False)
        try:
            lock.acquire(blocking=False)
        except (Timeout, OSError, NotImplementedError):  # in use, or not ours to remove
            continue
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        with contextlib.suppress(OSError):
            if not path.is_dir():
                path.unlink(missing_ok=True)
            _lock_of(path).unlink(missing_ok=True)
        lock.release()


def _leftovers(parent: Path) -> Iterator[Path]:
    """Work folders and files in `parent`, and the folders that its locks belonged to."""
    with contextlib.suppress(OSError):
        for path in parent.iterdir():
            if path.name.startswith(WORK_PREFIX):
                yield path.with_name(path.name.removesuffix(LOCK))


def _lock_of(folder: Path) -> Path:
    return folder.with_name(folder.name + LOCK)
