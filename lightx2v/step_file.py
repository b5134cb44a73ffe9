"""StepFile: the file in which a run keeps its newest saved step until its video is there.

A killed run goes on from that step (engine/saved_step.py). The engine knows only the protocol StepStore, so a step may
as well go to another process as bytes.
"""

import hashlib
import os
from contextlib import suppress
from pathlib import Path
from typing import Protocol, Self

from .errors import OutputError, short_path

SAVE_EVERY = 20.0
"""Seconds of work that a run may lose: it saves its step at most this often. 0 turns saving off."""

SUFFIX, PART = ".step.safetensors", ".part"
LONGEST_NAME = 255
"""Bytes of a file's name on the usual file systems."""


class StepStore(Protocol):
    """Where a run reads the step from which it goes on, and saves its steps, at most once in `every` seconds."""

    every: float

    def read(self) -> bytes | None:
        """The newest saved step; None if there is none. OutputError if it cannot be read."""

    def write(self, data: bytes) -> None:
        """Replace the saved step as a whole. OutputError if that fails; the old one stays then."""


class StepFile:
    """The saved step of one video: `<video>.step.safetensors` beside it. `resume` False reads none."""

    def __init__(self, video: Path, every: float = SAVE_EVERY, *, resume: bool = True) -> None:
        self.video = video
        self.path = video.with_name(_fitting(video.name) + SUFFIX)
        self.every = every
        self._resume = resume
        self._part = self.path.with_name(self.path.name + PART)

    @classmethod
    def all_in(cls, folder: Path) -> list[Self]:
        """The saved steps in a folder, the newest first."""
        paths = [path for path in folder.glob(f"*{SUFFIX}") if path.is_file()]
        paths.sort(key=lambda path: path.stat().st_mtime_ns, reverse=True)
        return [cls(path.with_name(path.name.removesuffix(SUFFIX))) for path in paths]

    def exists(self) -> bool:
        return self.path.is_file()

    def read(self) -> bytes | None:
        try:
            return self.path.read_bytes() if self._resume else None
        except FileNotFoundError:
            return None
        except OSError as error:
            raise OutputError(f"{short_path(self.path)} cannot be read: {error.strerror or error}.") from None

    def write(self, data: bytes) -> None:
        try:
            with self._part.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            self._part.replace(self.path)
        except OSError as error:
            with suppress(OSError):
                self._part.unlink(missing_ok=True)
            raise OutputError(f"{short_path(self.path)} could not be written: {error.strerror or error}.") from None

    def remove(self) -> None:
        """Remove the step, and what a killed process has left of the next one. What cannot be removed stays."""
        for path in (self.path, self._part):
            with suppress(OSError):
                path.unlink(missing_ok=True)


def _fitting(name: str) -> str:
    """A video's name, or a short one made of it where no file could have the name of its step."""
    if len(os.fsencode(name + SUFFIX + PART)) <= LONGEST_NAME:
        return name
    return f"{name[:50]}-{hashlib.sha256(os.fsencode(name)).hexdigest()[:16]}"
