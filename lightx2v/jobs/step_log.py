"""StepLog: the progress events of the latest jobs, in memory, because a step is not worth a commit to the disk."""

from __future__ import annotations

from collections import OrderedDict, deque

from .store import JobEvent

JOBS = 20
EVENTS = 1000
"""Per job; of a longer run the first ones go. One takes about 600 bytes."""


class StepLog:
    """A ring buffer for each of the latest JOBS jobs. It does not survive a restart."""

    def __init__(self) -> None:
        self._events: OrderedDict[str, deque[JobEvent]] = OrderedDict()

    def add(self, job: str, event: JobEvent) -> None:
        self._events.setdefault(job, deque(maxlen=EVENTS)).append(event)
        self._events.move_to_end(job)
        if len(self._events) > JOBS:
            self._events.popitem(last=False)

    def events(self, job: str, after: int) -> list[JobEvent]:
        """The job's progress events with larger ids than `after`, in order."""
        return [event for event in self._events.get(job, ()) if event.id > after]

    def remove(self, job: str) -> None:
        self._events.pop(job, None)
