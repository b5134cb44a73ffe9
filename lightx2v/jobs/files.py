"""The files of the jobs in one folder: their names start with the job's id, chosen here and never by a client."""

from __future__ import annotations

import contextlib
import logging
import secrets
import shutil
from dataclasses import replace
from pathlib import Path

from ..config.request import Request
from ..media.images import store_image
from ..media.video_writer import WORK_PREFIX

log = logging.getLogger("lightx2v.jobs")


class JobFiles:
    """`<id>.mp4` and the input pictures `<id>.image-….png`; what else is called `<id>.…` goes with the job too."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def ensure_folder(self) -> None:
        """Makes the folder again if somebody removed it: the run whose video goes there need not be lost."""
        self.folder.mkdir(parents=True, exist_ok=True)

    def video(self, id: str) -> Path:
        return self.folder / f"{id}.mp4"

    def with_own_images(self, id: str, request: Request) -> Request:
        """The request over copies of its pictures that belong to the job: uploads do not outlive a restart."""
        own: dict[str, str] = {}
        for name, path in (("image_path", request.image_path), ("last_frame_path", request.last_frame_path)):
            if path is not None and not self._is_own(id, Path(path)):
                stem = f"{id}.{name.removesuffix('_path')}-{secrets.token_hex(4)}"
                own[name] = str(store_image(path, self.folder / stem))
        return replace(request, **own) if own else request

    def remove(self, id: str) -> None:
        """All files of a job."""
        for file in self.folder.glob(f"{id}.*"):
            try:
                file.unlink(missing_ok=True)
            except OSError as error:
                log.warning("%s could not be removed: %s", file.name, error.strerror)

    def sizes(self) -> dict[str, int]:
        """Bytes that each job's files take."""
        sizes: dict[str, int] = {}
        for file in self.folder.iterdir():
            id, _, rest = file.name.partition(".")
            if id and rest:
                with contextlib.suppress(OSError):
                    sizes[id] = sizes.get(id, 0) + file.stat().st_size
        return sizes

    def remove_leftovers(self) -> None:
        """What a process left that was killed while it wrote."""
        for left in self.folder.glob(f"{WORK_PREFIX}*"):
            shutil.rmtree(left, ignore_errors=True)

    def _is_own(self, id: str, path: Path) -> bool:
        return path.parent == self.folder and path.name.startswith(f"{id}.")
