"""StepSaver: saves the newest step of one run, in a thread of its own, so that the run waits only for the copy."""

import logging
import threading
import time
from collections.abc import Callable

from ..errors import OutputError
from ..step_file import StepStore
from .saved_step import SavedStep

log = logging.getLogger("lightx2v.run")

SHARE = 0.01
"""The most of a run's time that saving may take: a slow copy from the device makes the saves rarer."""


class StepSaver:
    """`take` copies the newest step to host memory, or returns None before the first one.

    Saves at most once in `store.every` seconds of work, and nothing in the first ones. With no store, or every 0, it
    does nothing. A save that fails is logged and costs no run: the next one is tried.
    """

    def __init__(self, store: StepStore | None, take: Callable[[], SavedStep | None]) -> None:
        self._store = store if store is not None and store.every > 0 else None
        self._take = take
        self._writer: threading.Thread | None = None
        self._written = -1
        self._first = self._due = time.monotonic() + (self._store.every if self._store else 0.0)

    @property
    def active(self) -> bool:
        return self._store is not None

    def save_if_due(self) -> None:
        """Call it between steps, and between chunks of the decoder: the last step is worth most."""
        started = time.monotonic()
        if self._store is None or started < self._due or (self._writer is not None and self._writer.is_alive()):
            return
        if (saved := self._take()) is None or saved.step == self._written:
            return
        self._writer = threading.Thread(target=self._write, args=(self._store, saved), name="lightx2v-save")
        self._writer.start()
        now = time.monotonic()
        self._due = now + max(self._store.every, (now - started) / SHARE)

    def save_at_stop(self) -> None:
        """Save what the run has reached, unless it is still in its first seconds. Returns when it is written."""
        self.close()
        if self._store is None or time.monotonic() < self._first:
            return
        saved = self._take()
        if saved is not None and saved.step != self._written:
            self._write(self._store, saved)
        if saved is not None and saved.step == self._written:
            log.info("Stopped; %d of %d steps are saved.", saved.step, saved.steps)

    def close(self) -> None:
        """Wait for the writer, so that no file appears after the run."""
        if self._writer is not None:
            self._writer.join()

    def _write(self, store: StepStore, saved: SavedStep) -> None:
        try:
            store.write(saved.to_bytes())
            self._written = saved.step
        except (OutputError, MemoryError) as error:
            log.warning("Step %d is not saved, the run goes on: %s", saved.step, error)
