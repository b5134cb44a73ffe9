"""Read many tensors from files with many threads, straight to where they are used.

    for name, tensor in read_tensors(places, "cuda"): ...

Each thread reads pieces of a few megabytes. In host memory it reads into the tensor itself, or into a buffer from which
it casts. For a GPU it reads into one of two pinned buffers and copies from there on a stream of its own while it fills
the other one, and the GPU casts. So the page cache, the bus and the cast work at the same time. Beside the tensors
there are never more than `MAX_STAGING` bytes.

Reads go through the page cache, so that the next start finds the files in memory. Where the model is too large for
that, what is not cached is read past it (O_DIRECT): the cache would lose all of it again before it could be of use.
"""

from __future__ import annotations

import math
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch
from torch import Tensor

from ..errors import CheckpointError, one_line, short_path
from ..progress import CancelToken
from .host_memory import use_huge_pages

THREADS = 16
"""Reading threads at most."""
SECTOR = 4096
"""O_DIRECT reads whole sectors into memory that begins at one."""
BUFFER = 8 << 20
PIECE = BUFFER - 2 * SECTOR
"""Bytes of one piece: small enough for many to be under way, large enough to cost nothing each. The sectors around it
fit into a buffer."""
MAX_STAGING = 3 * THREADS * BUFFER
"""Of each thread for a GPU: two pinned buffers, and one on the GPU if it casts."""
AHEAD = 1 << 30
"""Bytes of tensors that are being read beside the one that is wanted next."""
HOST_AHEAD = 64 << 20
"""The same in host memory, for users that drop each tensor."""
STEP = 1 << 20
"""Bytes asked of a disk at once. Between two steps a thread looks whether it should stop."""
CAST = 32_000
"""Elements cast at once on a CPU: they stay in its cache, and torch starts no threads of its own for so few."""
RESERVE = 64 << 20
"""From so many bytes on, memory for all tensors is asked of the GPU's driver at once: each request stops the copies."""
PARTS = 3
"""The page cache is of use if it can hold this many times what is read: a model has two experts and a text encoder."""

NO_WAIT = getattr(os, "RWF_NOWAIT", None)
DIRECT = getattr(os, "O_DIRECT", None)


@dataclass(frozen=True, slots=True)
class TensorPlace:
    """Where a tensor's bytes lie, and what it becomes: dtype `wanted`, in memory of its own or in `into`.

    `into` is contiguous, in host memory or on the GPU that is read to. Only ordinary floats are cast; bytes of any
    other format are a tensor of uint8.
    """

    name: str
    path: Path
    start: int
    stored: torch.dtype
    shape: tuple[int, ...]
    wanted: torch.dtype
    into: Tensor | None = None

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.stored.itemsize


def read_tensors(
    places: Iterable[TensorPlace],
    device: torch.device | str = "cpu",
    *,
    cancel: CancelToken | None = None,
    on_bytes: Callable[[int], None] | None = None,
) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor on `device` or in the place's `into`) of all `places`, in their order.

    CheckpointError where a file ends early or cannot be read. `on_bytes` gets the bytes of each tensor that has
    arrived, in the caller's thread.
    """
    every = list(places)
    device = torch.device(device)
    with ExitStack() as stack:
        reading = stack.enter_context(_Reading(device, every))
        waiting: deque[tuple[TensorPlace, _Target, list[Future[None]]]] = deque()
        under_way, limit = 0, AHEAD if reading.cuda is not None else HOST_AHEAD

        def finish() -> tuple[str, Tensor]:
            nonlocal under_way
            place, target, pieces = waiting.popleft()
            _await(pieces, cancel)
            under_way -= place.nbytes
            if on_bytes is not None:
                on_bytes(place.nbytes)
            return place.name, reading.finish(target)

        for place in every:
            while waiting and under_way + place.nbytes > limit:
                yield finish()
            if cancel is not None:
                cancel.check()
            target = reading.target(place)
            waiting.append((place, target, reading.submit(place, target)))
            under_way += place.nbytes
        while waiting:
            yield finish()


def _await(pieces: list[Future[None]], cancel: CancelToken | None) -> None:
    """Wait for the pieces and raise what stopped one of them. Cancelled at most a moment after `cancel`."""
    while wait(pieces, timeout=0.1 if cancel is not None else None).not_done:
        assert cancel is not None
        cancel.check()
    if cancel is not None:
        cancel.check()
    for piece in pieces:
        piece.result()


class _Target:
    """One tensor while it arrives; on a GPU with `ready`, from which on it may be written, and the copies into it."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor
        self.flat = tensor.view(-1)
        self.ready: torch.cuda.Event | None = None
        self.copied: list[torch.cuda.Event] = []


class _Lane(threading.local):
    """A thread's buffers and, for a GPU, its stream."""

    buffers: deque[tuple[Tensor, torch.cuda.Event | None]] | None = None
    wide: Tensor | None = None
    stream: torch.cuda.Stream | None = None


class _Reading:
    """The threads, buffers and open files of one call of `read_tensors`."""

    def __init__(self, device: torch.device, places: Sequence[TensorPlace]) -> None:
        self._device = device
        self.cuda = device if device.type == "cuda" else None
        self._host = torch.device("cpu")
        total = sum(place.nbytes for place in places)
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        count = min(THREADS, max(2, cores), max(1, -(-total // PIECE)))
        self._pool = ThreadPoolExecutor(count, "lightx2v-read") if count > 1 or self.cuda is not None else None
        self._past_cache = PARTS * total > psutil.virtual_memory().available
        self._files: dict[Path, _OpenFile] = {}
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._lane = _Lane()
        self._streams: list[torch.cuda.Stream] = []
        fresh = sum(math.prod(place.shape) * place.wanted.itemsize for place in places if place.into is None)
        if self.cuda is not None and fresh >= RESERVE:
            with suppress(torch.OutOfMemoryError):  # tensor by tensor it may fit; else that reports it
                torch.empty(fresh, dtype=torch.uint8, device=self.cuda)  # stays in torch's cache, which divides it

    def __enter__(self) -> _Reading:
        return self

    def __exit__(self, *_: object) -> None:
        """Nothing writes into any tensor afterwards."""
        self._stop.set()
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
        for stream in self._streams:
            stream.synchronize()
        for file in self._files.values():
            file.close()

    def target(self, place: TensorPlace) -> _Target:
        if place.into is not None:
            tensor = place.into
        else:
            with torch.inference_mode(False):  # the tensor may be changed later, outside of inference mode
                tensor = torch.empty(place.shape, dtype=place.wanted, device=self.cuda or self._host)
            use_huge_pages(tensor)
        target = _Target(tensor)
        if tensor.is_cuda:
            target.ready = torch.cuda.Event()
            target.ready.record(torch.cuda.current_stream(tensor.device))
        return target

    def submit(self, place: TensorPlace, target: _Target) -> list[Future[None]]:
        pieces = [(at, min(PIECE, place.nbytes - at)) for at in range(0, place.nbytes, PIECE)]
        if self._pool is not None:
            return [self._pool.submit(self._read, place, target, *piece) for piece in pieces]
        for piece in pieces:
            self._read(place, target, *piece)
        return []

    def finish(self, target: _Target) -> Tensor:
        if target.copied:
            stream = torch.cuda.current_stream(target.tensor.device)
            for event in target.copied:
                stream.wait_event(event)
        tensor = target.tensor
        return tensor if self.cuda is not None or self._device.type == "cpu" else tensor.to(self._device)

    def _read(self, place: TensorPlace, target: _Target, at: int, size: int) -> None:
        """One piece, `size` bytes from byte `at` of the tensor on."""
        if self._stop.is_set():
            return
        item = place.stored.itemsize
        part, cast = target.flat[at // item : (at + size) // item], place.stored != place.wanted
        file = self._file(place)
        with torch.inference_mode():  # a tensor of inference mode can be written in no other
            if target.ready is not None:
                self._read_to_gpu(file, place, target, part, at, size)
            elif cast or file.direct is not None:
                buffer, _ = self._buffers()[0]
                raw = file.read_into(buffer, place, at, size)
                raw = raw.clone() if raw.storage_offset() % item else raw
                for to, values in zip(part.split(CAST), raw.view(place.stored).split(CAST), strict=True):
                    to.copy_(values)
            else:
                file.fill(part.view(torch.uint8), place, at)

    def _read_to_gpu(
        self, file: _OpenFile, place: TensorPlace, target: _Target, part: Tensor, at: int, size: int
    ) -> None:
        assert target.ready is not None
        lane, buffers = self._lane, self._buffers()
        assert lane.stream is not None
        buffer, free = buffers[0]
        buffers.rotate()
        assert free is not None
        free.synchronize()  # the last copy from this buffer has ended
        raw = file.read_into(buffer, place, at, size)
        lane.stream.wait_event(target.ready)
        if place.stored == place.wanted:
            part.view(torch.uint8).copy_(raw, non_blocking=True)
        else:
            if lane.wide is None:
                lane.wide = torch.empty(BUFFER, dtype=torch.uint8, device=target.tensor.device)
            wide = lane.wide[:size]
            part.copy_(wide.copy_(raw, non_blocking=True).view(place.stored))
        free.record(lane.stream)
        done = torch.cuda.Event()
        done.record(lane.stream)
        target.copied.append(done)

    def _buffers(self) -> deque[tuple[Tensor, torch.cuda.Event | None]]:
        """This thread's buffers; two for a GPU, whose stream becomes the thread's current one."""
        lane = self._lane
        if lane.buffers is None:
            if self.cuda is None:
                room = torch.empty(BUFFER + SECTOR, dtype=torch.uint8)
                lane.buffers = deque([(room[-room.data_ptr() % SECTOR :][:BUFFER], None)])
            else:
                torch.cuda.set_device(self.cuda)
                lane.stream = torch.cuda.Stream(self.cuda)
                torch.cuda.set_stream(lane.stream)
                self._streams.append(lane.stream)
                # torch keeps pinned memory for the next time.
                pinned = (torch.empty(BUFFER, dtype=torch.uint8, pin_memory=True) for _ in range(2))
                lane.buffers = deque((buffer, torch.cuda.Event()) for buffer in pinned)
        return lane.buffers

    def _file(self, place: TensorPlace) -> _OpenFile:
        with self._lock:
            if place.path not in self._files:
                self._files[place.path] = _OpenFile(place.path, self._past_cache, self._stop)
            return self._files[place.path]


class _OpenFile:
    """One file that many threads read; `direct` reads past the page cache, if that is wanted and possible."""

    def __init__(self, path: Path, past_cache: bool, stop: threading.Event) -> None:
        self._path, self._stop = path, stop
        self.direct: int | None = None
        try:
            self._cached = os.open(path, os.O_RDONLY)
        except OSError as error:
            raise CheckpointError(f"{short_path(path)} cannot be read ({error.strerror}).") from None
        if past_cache and DIRECT is not None:
            with suppress(OSError):  # some file systems have none
                self.direct = os.open(path, os.O_RDONLY | DIRECT)

    def close(self) -> None:
        os.close(self._cached)
        if self.direct is not None:
            os.close(self.direct)

    def fill(self, target: Tensor, place: TensorPlace, at: int) -> None:
        """Fill `target` (bytes in host memory) from byte `at` of the tensor on, through the page cache."""
        self._fill(target.numpy().data, place, place.start + at)

    def read_into(self, buffer: Tensor, place: TensorPlace, at: int, size: int) -> Tensor:
        """These bytes of the tensor, somewhere in `buffer`."""
        start = place.start + at
        bytes_ = buffer.numpy().data
        done = self._read_cached(bytes_[:size], start) if self.direct is not None else 0
        if done < size and self.direct is not None and self._fill_direct(bytes_, start, size):
            return buffer[start % SECTOR :][:size]
        self._fill(bytes_[:size], place, start, done)
        return buffer[:size]

    def _fill(self, target: memoryview, place: TensorPlace, start: int, done: int = 0) -> None:
        done = done or self._read_cached(target, start)
        while done < len(target) and not self._stop.is_set():
            try:
                got = os.preadv(self._cached, [target[done : done + STEP]], start + done)
            except OSError as error:
                raise CheckpointError(
                    f"{short_path(self._path)} cannot be read at tensor {one_line(place.name):.80} "
                    f"({error.strerror}). Check the disk, or download the file again."
                ) from None
            if not got:
                raise CheckpointError(
                    f"{short_path(self._path)} became shorter while {one_line(place.name):.80} was read. "
                    "Delete the file and download it again."
                )
            done += got

    def _read_cached(self, target: memoryview, start: int) -> int:
        """Read what the page cache has of these bytes, without waiting for a disk. The number of bytes read."""
        if NO_WAIT is None:
            return 0
        try:
            return os.preadv(self._cached, [target], start, NO_WAIT)
        except OSError:  # nothing of it, or the file system cannot tell
            return 0

    def _fill_direct(self, target: memoryview, start: int, size: int) -> bool:
        """Read the whole sectors around these bytes into aligned memory. False where that fails."""
        assert self.direct is not None
        first = start // SECTOR * SECTOR
        needed = start + size - first
        done = 0
        while done < needed and not self._stop.is_set():
            length = min(STEP, -(-(needed - done) // SECTOR) * SECTOR)
            try:
                got = os.preadv(self.direct, [target[done : done + length]], first + done)
            except OSError:
                return False
            done += got
            if got % SECTOR and done < needed or not got:  # the file's end, too early
                return False
        return True
