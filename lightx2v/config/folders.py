"""Folders to write to where the usual ones are missing: no home folder, a read-only one, no folder for temporary files.

A container often runs under a user id without a name, without HOME, on a disk that cannot be written to.
"""

import atexit
import errno
import logging
import os
import tempfile
from pathlib import Path

from ..errors import ConfigError, OutputError
from ..media.work_folder import WorkFolder

log = logging.getLogger("lightx2v.folders")


def expand(path: str | Path) -> Path:
    """The path with its `~` replaced, or as it is where nobody knows the home folder. Path.expanduser raises there."""
    return Path(os.path.expanduser(path))


def working_folder() -> Path:
    """The folder that this process works in. ConfigError where it was deleted, which Path.cwd answers with a
    traceback."""
    try:
        return Path.cwd()
    except OSError as error:
        raise ConfigError(
            f"The working folder cannot be used: {error.strerror}. It was deleted or closed to you meanwhile. Change "
            "to another folder with cd, and start again."
        ) from None


def own_folder(name: str) -> Path:
    """A folder of this user, below the one for temporary files. OutputError where there is no such place."""
    user = os.getuid() if hasattr(os, "getuid") else ""
    try:
        folder = Path(tempfile.gettempdir()) / f"lightx2v-{user}"
        folder.mkdir(mode=0o700, exist_ok=True)
        if hasattr(os, "getuid") and (folder.is_symlink() or folder.stat().st_uid != user):
            raise PermissionError(0, "it belongs to another user")
        (folder / name).mkdir(mode=0o700, exist_ok=True)
    except OSError as error:
        raise _no_temporary(error) from None
    return folder / name


def can_write(folder: Path) -> bool:
    """Whether files can be made in a folder, which is created if it is missing."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return True
    except (OSError, ValueError):
        return False


def use_home() -> None:
    """Give a process without a home folder one, for all libraries with a cache. Where HOME is not set and the user id
    has no name, they would write into a folder called `~` or fail."""
    if os.path.expanduser("~") != "~":
        return
    try:
        os.environ["HOME"] = str(own_folder("home"))
    except OutputError:  # below this nothing can be made: a cache is left out, and what needs one says so
        os.environ["HOME"] = os.devnull
        return
    log.warning(
        "There is no home folder, so caches are in %s, which may not last. Set HOME to a folder that stays.",
        os.environ["HOME"],
    )


def use_temporary(folder: Path) -> None:
    """Let this process put its temporary files into `folder` where TMPDIR and the system's folders cannot be used.

    torch cannot be imported without such a place. OutputError where `folder` cannot be used either.
    """
    try:
        tempfile.gettempdir()
        return
    except FileNotFoundError:
        pass
    try:
        folder.mkdir(parents=True, exist_ok=True)
        work = WorkFolder(folder.absolute())
    except OSError as error:
        raise _no_temporary(error) from None
    os.environ["TMPDIR"] = tempfile.tempdir = str(work.path)
    atexit.register(work.close)


def use_kernel_cache() -> None:
    """Let Triton keep its kernels where it can write. Its folder is in the home folder, which may be read-only."""
    if not os.environ.keys() & {"TRITON_CACHE_DIR", "TRITON_HOME"} and not can_write(expand("~/.triton/cache")):
        os.environ["TRITON_CACHE_DIR"] = str(own_folder("triton"))


def output_folder(given: str | None) -> Path:
    """The folder for videos: the given one, else `outputs` in the working folder. Where that cannot be written to, one
    for this user alone, with a warning."""
    folder = Path(given or "outputs")
    if given or can_write(folder):
        return folder
    try:
        other = own_folder("outputs")
    except OutputError:
        raise OutputError(
            "Neither the working folder nor one for temporary files can be written to. Choose a folder for videos with "
            "LIGHTX2V_OUTPUT_DIR."
        ) from None
    log.warning(
        "The working folder cannot be written to, so videos are in %s, which may not last. Choose another with "
        "LIGHTX2V_OUTPUT_DIR.",
        other,
    )
    return other


def _no_temporary(error: OSError) -> OutputError:
    reason = "there is none" if error.errno == errno.ENOENT else error.strerror
    return OutputError(f"No folder for temporary files can be written to: {reason}. Set TMPDIR to one that can.")
