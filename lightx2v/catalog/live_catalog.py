"""LiveCatalog: the catalogue of a program that keeps running: made in the background, offers what is allowed."""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path

from ..errors import LightX2VError
from .catalog import Catalog, FoundLora
from .folders import model_folders
from .found_model import FoundModel
from .scan import memory_file, scan

log = logging.getLogger("lightx2v.catalog")


class LiveCatalog:
    """What is in `model_dirs` and the other folders of models.

    `allowed` are patterns of names, such as wan2.2_*, of the models and LoRAs to offer to others; None offers all.
    """

    def __init__(self, model_dirs: Sequence[str | Path] = (), allowed: Sequence[str] | None = None) -> None:
        self.model_dirs, self._allowed = tuple(model_dirs), allowed
        self.catalog = Catalog()
        self.folders: tuple[Path, ...] = ()
        self.version = 0
        """Changes when something else is found."""
        self._lock = threading.Lock()
        self._scanning: threading.Thread | None = None
        self._again = False

    @property
    def scanning(self) -> bool:
        return self._scanning is not None

    @property
    def models(self) -> dict[str, FoundModel]:
        return {name: model for name, model in self.catalog.models.items() if self.offers(name)}

    @property
    def loras(self) -> dict[str, FoundLora]:
        return {name: lora for name, lora in self.catalog.loras.items() if self.offers(name)}

    def offers(self, name: str) -> bool:
        """Whether others may use what has this name."""
        return self._allowed is None or any(fnmatchcase(name, pattern) for pattern in self._allowed)

    def refresh(self) -> None:
        """Look at the folders again, in the background. Does nothing where nothing may be offered."""
        if self._allowed is not None and not self._allowed:
            return
        with self._lock:
            if self._scanning is not None:
                self._again = True
                return
            self._scanning = threading.Thread(target=self._scan, name="lightx2v-catalog", daemon=True)
            self._scanning.start()

    def wait(self) -> None:
        """Wait until the folders have been looked at."""
        while (thread := self._scanning) is not None:
            thread.join()

    def _scan(self) -> None:
        while True:
            try:
                folders = model_folders(self.model_dirs)
                found = Catalog(scan(folders, memory_file()))
                if found.files != self.catalog.files or tuple(folders) != self.folders:
                    _ = found.models, found.loras  # made here, where nobody waits for it
                    self.catalog, self.folders = found, tuple(folders)
                    self.version += 1
            except LightX2VError as error:
                log.warning("%s", error)
            with self._lock:
                if not self._again:
                    self._scanning = None
                    return
                self._again = False
