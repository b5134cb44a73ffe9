"""writer_lock: one process at a time makes a file or writes into a folder; others wait and can be cancelled."""

import contextlib
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from ..errors import OutputError, short_path
from ..progress import CancelToken

log = logging.getLogger("lightx2v.loading")


@contextmanager
def writer_lock(file: Path, target: Path, cancel: CancelToken | None = None) -> Iterator[None]:
    """Hold the lock `file` while the block writes to `target`. The system frees the lock of a process that dies."""
    lock, waited = FileLock(file), False
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        while not lock.is_locked:
            try:
                lock.acquire(timeout=0.3, poll_interval=0.05)
            except Timeout:
                if not waited:
                    log.info("Another process is writing to %s; waiting for it.", short_path(target))
                waited = True
                if cancel is not None:
                    cancel.check()
    except NotImplementedError:  # a file system without locks
        pass
    except OSError as error:
        raise OutputError(
            f"{short_path(target)} cannot be written to: {error.strerror or error}. Choose another folder, for the "
            "prebuilt files of presets with LIGHTX2V_CACHE_DIR."
        ) from None
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            file.unlink(missing_ok=True)
        lock.release()
