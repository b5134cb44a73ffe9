"""The file name that a client wished for its video. On disk a video is called by its job's id, so that no two clients
meet in one file; the wish is what it is called when it is downloaded, and one of the ways to ask for it.

The name lies in `<id>.name` beside the video and goes with the job.
"""

from __future__ import annotations

import contextlib
import logging
import re
from collections.abc import Iterable
from pathlib import Path

from ..errors import BadRequest

log = logging.getLogger("lightx2v.server")

MAX_NAME = 120
_PLAIN = re.compile(r"\w[\w .()+,=@-]*")
_RESERVED = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?", re.IGNORECASE)


def file_name(wish: str) -> str:
    """A wish such as `./cat.mp4` as a plain file name; BadRequest for a path or what a file system stumbles over."""
    name = wish.removeprefix("./")
    if not name.lower().endswith(".mp4"):
        name += ".mp4"
    stem = name[: -len(".mp4")]
    if (
        len(name.encode("utf-8", "replace")) > MAX_NAME
        or not _PLAIN.fullmatch(stem)
        or stem.endswith((".", " "))
        or _RESERVED.fullmatch(stem)
    ):
        raise BadRequest(
            "save_result_path names a file such as cat.mp4: letters, digits, spaces and . ( ) + , = @ _ -, at most "
            f"{MAX_NAME} bytes, no folder. The server keeps its videos in a folder of its own."
        )
    return name


class FileNames:
    """The wishes of the jobs in one folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def keep(self, id: str, name: str) -> None:
        """On a full disk the job, which is queued by now, goes on under its id, and the answer says so."""
        try:
            self._file(id).write_text(name, encoding="utf-8")
        except OSError as error:
            self._file(id).unlink(missing_ok=True)
            log.warning("the name of job %s's video could not be stored: %s", id, error.strerror)

    def of(self, id: str) -> str:
        """What the job's video is called when it leaves; after its id where nobody wished anything."""
        with contextlib.suppress(OSError, UnicodeDecodeError):
            return self._file(id).read_text(encoding="utf-8")
        return f"{id}.mp4"

    def find(self, name: str, ids: Iterable[str]) -> str | None:
        """The first of these jobs whose video has this name."""
        return next((id for id in ids if name in (f"{id}.mp4", self.of(id))), None)

    def _file(self, id: str) -> Path:
        return self._folder / f"{id}.name"
