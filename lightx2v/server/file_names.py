"""FileNames: the names that clients choose for their videos.

On disk a video has its job's id as name, so that two clients never share a file. The client's name is that of the
download, and another way to request the video. The file `<id>.name` holds it and is removed with the job.
"""

import contextlib
import logging
import re
from collections.abc import Iterable
from pathlib import Path

from ..errors import BadRequest

log = logging.getLogger("lightx2v.server")

MAX_NAME = 120
_PLAIN = re.compile(r"\w[\w .()+,=@-]*")
_RESERVED = re.compile(r"(con|prn|aux|nul|com[0-9]|lpt[0-9])(\..*)?", re.IGNORECASE)


def file_name(requested: str) -> str:
    """`./cat.mp4` and the like as a plain file name; BadRequest for paths and names that file systems reject."""
    name = requested.removeprefix("./")
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
            "save_result_path must be a file name such as cat.mp4, without a folder: letters, digits, spaces and "
            f". ( ) + , = @ _ -, at most {MAX_NAME} bytes. The server keeps its videos in its own folder."
        )
    return name


class FileNames:
    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def keep(self, id: str, name: str) -> None:
        """Store a name. On a full disk the job, which is already queued, keeps its id as name."""
        try:
            self._file(id).write_text(name, encoding="utf-8")
        except OSError as error:
            self._file(id).unlink(missing_ok=True)
            log.warning("the name of job %s's video could not be stored: %s", id, error.strerror)

    def of(self, id: str) -> str:
        """The client's name for the job's video, else one after its id."""
        with contextlib.suppress(OSError, UnicodeDecodeError):
            return self._file(id).read_text(encoding="utf-8")
        return f"{id}.mp4"

    def find(self, name: str, ids: Iterable[str]) -> str | None:
        """The first of these jobs whose video has this name."""
        return next((id for id in ids if name in (f"{id}.mp4", self.of(id))), None)

    def _file(self, id: str) -> Path:
        return self._folder / f"{id}.name"
