"""LoadProgress: the bytes of a model that are in place, as events of the stage "load"."""

import logging
import time

from ..progress import CancelToken, LoadWatch, Meter, WeightsRead, bytes_from_disk, read_words

log = logging.getLogger("lightx2v.engine")

EVERY = 0.2
"""Seconds between two events at least."""


class LoadProgress:
    """`watch` is for the readers. Loading that begins again, with less on the device, counts from zero."""

    def __init__(self, meter: Meter, cancel: CancelToken | None) -> None:
        self.watch = LoadWatch(cancel, self._arrived, self._begin, self._came_from)
        self._meter = meter
        self._done = self._total = self._known = self._cached = 0
        self._started = self._told = 0.0
        self._fetched = 0

    def _begin(self, total: int) -> None:
        self._done, self._total, self._known, self._cached = 0, total, 0, 0
        self._started = self._told = time.perf_counter()
        self._fetched = bytes_from_disk()

    def _arrived(self, nbytes: int) -> None:
        now = time.perf_counter()
        self._done = min(self._done + nbytes, self._total)
        if now - self._told >= EVERY or self._done == self._total:
            self._told = now
            rate = self._done / max(now - self._started, 1e-6)
            message = f"{self._done / 1e9:.2f} of {self._total / 1e9:.2f} GB, {rate / 1e9:.1f} GB/s"
            self._meter.emit("load", self._done, self._total, message=message)

    def _came_from(self, cached: int, missed: int) -> None:
        self._known += cached + missed
        self._cached += cached

    def result(self) -> WeightsRead:
        """What was read so far."""
        seconds, fetched = self._told - self._started, bytes_from_disk() - self._fetched
        read = WeightsRead(self._done, seconds, self._known, self._cached, fetched)
        if read.nbytes:
            log.info("Read %s.", read_words(read.to_json()))
        return read
