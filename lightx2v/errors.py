"""The tree of all errors that a user can cause or meet.

    LightX2VError
    ├── BadRequest          invalid settings of one video (size, frames, prompt, image ...)
    ├── ConfigError         presets, flags or a machine that do not fit together
    ├── CheckpointError     a model file that is missing, broken or from another model
    │   └── LoraError       a LoRA that does not fit
    ├── DownloadError       a file that could not be downloaded
    ├── OutputError         a result that could not be written
    ├── OutOfMemory         the device or the host ran out of memory
    ├── NumericsError       NaN or infinity where numbers should be
    ├── GroupFailed         a process of a parallel run has ended, so the others end too
    ├── Busy                the queue is full or the engine is being exchanged
    └── Cancelled           the user stopped the run

A message says what is wrong, the given value, the expected one and what to do next. `str(error)` may be shown on a page
or in an HTTP response: it never holds a traceback, and names files by their last parts only (`short_path`).
"""

import errno
import re
from pathlib import PurePath
from typing import Any

MAX_SHOWN = 100
"""The most characters of what a user gave that a message repeats."""


class LightX2VError(Exception):
    """Base class. `exit_code` is for command lines, `status` for HTTP responses."""

    exit_code = 1
    status = 500


class BadRequest(LightX2VError):
    exit_code = 2
    status = 422


class ConfigError(LightX2VError):
    exit_code = 2
    status = 422


class CheckpointError(LightX2VError):
    pass


class LoraError(CheckpointError):
    status = 422


class DownloadError(LightX2VError):
    status = 502


class OutputError(LightX2VError):
    status = 507


class OutOfMemory(LightX2VError):
    status = 507


class NumericsError(LightX2VError):
    pass


class GroupFailed(LightX2VError):
    pass


class Busy(LightX2VError):
    status = 429


class Cancelled(LightX2VError):
    exit_code = 130
    status = 409


_NO_MEMORY = re.compile(r"out of memory|not enough memory|can(no|')t allocate|_ALLOC_FAILED", re.IGNORECASE)
"""What errors without a type of their own say: torch's on a CPU and on Apple's GPUs, and those of CUDA's libraries."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the host or the device ran out of memory. Knows torch's errors without importing torch."""
    if isinstance(error, (MemoryError, OutOfMemory)) or type(error).__name__ == "OutOfMemoryError":
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, RuntimeError) and _NO_MEMORY.search(str(error)) is not None


def short_path(path: str | PurePath, parts: int = 2) -> str:
    """The last `parts` components of a path: enough to recognise a file, too little to learn a server's folders.

    Long names lose their middle. Control characters and bytes that are no text, which file names may hold, are escaped.
    """
    pure = PurePath(path)
    tail = pure.parts[-parts:]
    text = one_line(str(PurePath(*tail)) if len(pure.parts) <= parts else "…/" + "/".join(tail))
    return text if len(text) <= MAX_SHOWN else f"{text[: MAX_SHOWN // 2]}…{text[-MAX_SHOWN // 2 :]}"


def quoted(value: Any) -> str:
    """A value that a user gave, for a message: in Python's spelling, on one line, and cut where it is long."""
    try:
        text = repr(value)
    except ValueError:  # more digits than Python converts
        return "a huge number"
    return text if len(text) <= MAX_SHOWN else f"{text[: MAX_SHOWN - 20]}… ({len(text)} characters)"


def one_line(text: str) -> str:
    """`text` with its control characters escaped: no prompt can forge a second log line or control the terminal."""
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


def byte_size(count: float) -> str:
    """A number of bytes for people: 57.2 GB, 480 MB, 12 kB."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= scale:
            return f"{count / scale:.3g} {unit}" if count < 1000 * scale else f"{count / scale:.0f} {unit}"
    return f"{count:.0f} bytes"
