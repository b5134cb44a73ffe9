"""JobFiles: the files of the jobs in one folder. Their names start with the job's id; no client chooses them."""

import contextlib
import filecmp
import logging
import re
import secrets
from collections.abc import Set
from dataclasses import replace
from pathlib import Path

from ..config.request import IMAGES, Request
from ..media.images import store_image
from ..media.video_writer import original_path
from ..media.work_folder import sweep
from ..step_file import SAVE_EVERY, SUFFIX, StepFile

log = logging.getLogger("lightx2v.jobs")

_ID = re.compile("[0-9a-f]{32}")


class JobFiles:
    """`<id>.mp4`, its original if that is kept, the saved step of its run and the input images `<id>.image-….png`.

    Any other file `<id>.…` is removed with the job too.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def ensure_folder(self) -> None:
        """Create the folder again if it was removed, so that the running job does not lose its video."""
        self.folder.mkdir(parents=True, exist_ok=True)

    def video(self, id: str) -> Path:
        return self.folder / f"{id}.mp4"

    def steps(self, id: str, save_every: float = SAVE_EVERY) -> StepFile:
        """The saved step of the job's run."""
        return StepFile(self.video(id), save_every)

    def with_steps(self) -> set[str]:
        """The ids of the jobs that have a saved step, or a part of one."""
        return {file.name.partition(".")[0] for file in self.folder.glob(f"*{SUFFIX}*")}

    def remove_video(self, id: str) -> None:
        """Remove the job's video if it is there, and its original. The folder itself may be gone, and a file may have
        its name."""
        for file in (self.video(id), original_path(self.video(id))):
            with contextlib.suppress(FileNotFoundError, NotADirectoryError):
                file.unlink()

    def with_own_images(self, id: str, request: Request) -> Request:
        """The request with its images copied to the job's own files: uploads do not survive a restart."""
        copies: dict[str, str] = {}
        for name, path in (("image_path", request.image_path), ("last_frame_path", request.last_frame_path)):
            if path is not None and not (self.folder == Path(path).parent and Path(path).name.startswith(f"{id}.")):
                stem = f"{id}.{name.removesuffix('_path')}-{secrets.token_hex(4)}"
                copies[name] = str(store_image(path, self.folder / stem))
        return replace(request, **copies) if copies else request

    def same_images(self, request: Request, kept: Request) -> bool:
        """Whether the images of two requests for the same task are equal, byte by byte."""
        pairs = [(getattr(request, name), getattr(kept, name)) for name in IMAGES[kept.task]]
        try:
            return all(filecmp.cmp(given, own, shallow=False) for given, own in pairs)
        except OSError:  # the job's own file is gone
            return False

    def remove(self, id: str) -> None:
        for file in self.folder.glob(f"{id}.*"):
            try:
                file.unlink(missing_ok=True)
            except OSError as error:
                log.warning("could not remove %s: %s", file.name, error.strerror)

    def sizes(self) -> dict[str, int]:
        """The bytes of each job's files."""
        sizes: dict[str, int] = {}
        for file in self.folder.iterdir():
            id, _, rest = file.name.partition(".")
            if id and rest:
                with contextlib.suppress(OSError):
                    sizes[id] = sizes.get(id, 0) + file.stat().st_size
        return sizes

    def strays(self, known: Set[str]) -> list[Path]:
        """Videos of jobs that are not `known`, the oldest first."""
        found = [path for path in self.folder.glob("*.mp4") if _ID.fullmatch(path.stem) and path.stem not in known]
        return sorted(found, key=lambda path: path.stat().st_mtime)

    def remove_leftovers(self, known: Set[str]) -> None:
        """Remove what a killed process left: unfinished videos, and pictures of jobs that are not `known`. A video
        stays, and its pictures with it."""
        sweep(self.folder)
        for file in self.folder.iterdir():
            id = file.name.partition(".")[0]
            if _ID.fullmatch(id) and id not in known and file.is_file() and not self.video(id).exists():
                self.remove(id)
