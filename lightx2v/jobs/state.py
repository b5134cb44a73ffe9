"""QueueState: what the job manager and its workers share: one store, one folder and one lock."""

import re
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from ..errors import Busy, OutputError
from ..step_file import SAVE_EVERY
from .files import JobFiles
from .store import Job, JobStore, StepLog, UnknownJob

CLOSING = "The server is shutting down. Retry once it has restarted."


class Changes(threading.Condition):
    """Wakes threads, as any condition does, and calls listeners: event loops, which must not block."""

    def __init__(self) -> None:
        super().__init__(threading.RLock())
        self.listeners: list[Callable[[], None]] = []

    def notify_all(self) -> None:
        super().notify_all()
        for listener in tuple(self.listeners):
            listener()


@dataclass(kw_only=True)
class QueueState:
    """Use everything but `session` under the lock of `changed`. `closed`: the store must not be used any more."""

    folder: Path
    clock: Callable[[], float] = time.time
    save_every: float = SAVE_EVERY
    closed: bool = False
    changed: Changes = field(default_factory=Changes)
    steps: StepLog = field(default_factory=StepLog)

    def __post_init__(self) -> None:
        self.files = JobFiles(self.folder)
        self.store = JobStore(self.folder / "jobs.sqlite")

    @contextmanager
    def session(self) -> Iterator[JobStore]:
        """The store, under the lock; its errors become OutputError."""
        with self.changed:
            if self.closed:
                raise Busy(CLOSING)
            try:
                yield self.store
            except sqlite3.Error as error:
                raise OutputError(f"Cannot access the list of jobs: {error}. Is the disk full?") from None

    def job(self, id: str) -> Job:
        """A job as the store has it; UnknownJob for whatever is no id."""
        if not isinstance(id, str) or re.fullmatch("[0-9a-f]{32}", id) is None:
            raise UnknownJob("There is no job with this id.")
        return self.store.job(id)

    def remove(self, id: str) -> None:
        """Remove the files first: on a full disk SQLite needs their space to delete the row."""
        self.files.remove(id)
        self.steps.remove(id)
        self.store.remove(id)
