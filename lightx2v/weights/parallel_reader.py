"""Read many tensors from files with many threads, straight to where they are used.

    for name, tensor in read_tensors(places, "cuda"): ...

Each thread reads pieces of a few megabytes. In host memory it reads into the tensor itself, or into a buffer from which
it casts. For a GPU it reads into one of two pinned buffers and copies from there on a stream of its own while it fills
the other one, and the GPU casts. So the page cache, the bus and the cast work at the same time. Beside the tensors
there are never more than `MAX_STAGING` bytes.

Reads go through the page cache, so that the next start finds the files in memory. Where the model is too large for
that, the cache lets go at once of what it did not have before: it would lose that before it could be of use.
"""

from __future__ import annotations

import math
import os
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch
from torch import Tensor

from ..errors import CheckpointError, one_line, short_path
from ..progress import UNWATCHED, LoadWatch
from .host_memory import use_huge_pages

THREADS = 16
"""Reading threads at most."""
GPU_THREADS = 8
"""The same for a GPU: each piece costs a thread more Python there, for which more threads only wait."""
PIECE = 8 << 20
"""Bytes of one piece: small enough for many to be under way, large enough to cost nothing each."""
MAX_STAGING = max(THREADS, 3 * GPU_THREADS) * PIECE
"""A buffer for each thread that casts; for a GPU two pinned ones, and one on the GPU."""
AHEAD = 1 << 30
"""Bytes of tensors that are being read beside the one that is wanted next."""
HOST_AHEAD = 64 << 20
"""The same in host memory, for users that drop each tensor."""
STEP = 1 << 20
"""Bytes asked of a disk at once. Between two steps a thread looks whether it should stop."""
PARTS = 3
"""The page cache is of use if it can hold this many times what is read: a model has two experts and a text encoder."""
LARGE = 64 << 20
"""Bytes from which on the page cache matters."""

NO_WAIT = getattr(os, "RWF_NOWAIT", None)

Sources = tuple[int, int]
"""How many bytes the page cache had and how many it had not; zeros where the system does not tell."""


@dataclass(frozen=True, slots=True)
class TensorPlace:
    """Where a tensor's bytes lie, and what it becomes: dtype `wanted`, in memory of its own or in `into`.

    `into` is contiguous, in host memory or on the GPU that is read to. Only ordinary floats are cast; bytes of any
    other format are a tensor of uint8. In host memory, the thread that has read a part calls `look` with it.
    """

    name: str
    path: Path
    start: int
    stored: torch.dtype
    shape: tuple[int, ...]
    wanted: torch.dtype
    into: Tensor | None = None
    look: Callable[[Tensor], None] | None = None

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.stored.itemsize


def read_tensors(
    places: Iterable[TensorPlace], device: torch.device | str = "cpu", *, watch: LoadWatch = UNWATCHED
) -> Generator[tuple[str, Tensor]]:
    """(name, tensor on `device` or in the place's `into`) of all `places`, in their order.

    CheckpointError where a file ends early or cannot be read, Cancelled soon after `watch` says so.
    """
    left = deque(places)
    device = torch.device(device)
    with ExitStack() as stack:
        reading = stack.enter_context(_Reading(device, left))
        waiting: deque[tuple[TensorPlace, _Target, list[Future[Sources]]]] = deque()
        under_way, limit = 0, AHEAD if reading.cuda is not None else HOST_AHEAD
        refill = limit // 2 if reading.cuda is not None else limit  # for a GPU, starting many at once is cheaper
        while left or waiting:
            if waiting and not (left and under_way + left[0].nbytes <= refill):
                place, target, pieces = waiting.popleft()
                sources = _await(pieces, watch)
                under_way -= place.nbytes
                watch.on_bytes(place.nbytes)
                watch.on_source(sum(cached for cached, _ in sources), sum(missed for _, missed in sources))
                yield place.name, reading.finish(target)
                continue
            started: list[tuple[TensorPlace, _Target]] = []
            while left and (not (waiting or started) or under_way + left[0].nbytes <= limit):
                watch.check()
                started.append((left[0], reading.target(left[0])))
                under_way += left.popleft().nbytes
            waiting += reading.start(started)


def _await(pieces: list[Future[Sources]], watch: LoadWatch) -> list[Sources]:
    """Wait for the pieces and raise what stopped one of them. Cancelled at most a moment after `watch` says so."""
    while not all(piece.done() for piece in pieces) and wait(pieces, timeout=0.1).not_done:
        watch.check()
    watch.check()
    return [piece.result() for piece in pieces]


class _Target:
    """One tensor while it arrives; on a GPU with `ready`, from which on it may be written, and the copies into it."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor
        self.flat = tensor.view(-1)
        self.ready: torch.cuda.Event | None = None
        self.copied: list[torch.cuda.Event] = []


class _Lane(threading.local):
    """A thread's buffers and, for a GPU, its stream."""

    buffers: deque[_Buffer] | None = None
    wide: Tensor | None = None
    stream: torch.cuda.Stream | None = None
    ready: torch.cuda.Event | None = None
    """The last event that the stream waits for."""


@dataclass(eq=False)
class _Buffer:
    """`copied` is the end of the last copy from it to a GPU."""

    memory: Tensor
    copied: torch.cuda.Event | None = None


class _Reading:
    """The threads, buffers and open files of one call of `read_tensors`."""

    def __init__(self, device: torch.device, places: Iterable[TensorPlace]) -> None:
        self._device = device
        self.cuda = torch.empty(0, device=device).device if device.type == "cuda" else None  # with its index
        self._host = torch.device("cpu")
        total = sum(place.nbytes for place in places)
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        count = min(GPU_THREADS if self.cuda else THREADS, max(2, cores), max(1, -(-total // PIECE)))
        self._pool = ThreadPoolExecutor(count, "lightx2v-read") if count > 1 or self.cuda is not None else None
        self._let_go = total > LARGE and PARTS * total > psutil.virtual_memory().available
        self._files: dict[Path, _OpenFile] = {}
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._lane = _Lane()
        self._streams: list[torch.cuda.Stream] = []

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
        return _Target(tensor)

    def start(
        self, targets: Sequence[tuple[TensorPlace, _Target]]
    ) -> list[tuple[TensorPlace, _Target, list[Future[Sources]]]]:
        """Begin to read these tensors, whose memory earlier work on the GPU may still use."""
        ready = None
        for _, target in targets:
            if target.tensor.is_cuda:
                if ready is None:
                    ready = torch.cuda.Event()
                    ready.record(torch.cuda.current_stream(target.tensor.device))
                target.ready = ready
        return [(place, target, self._submit(place, target)) for place, target in targets]

    def _submit(self, place: TensorPlace, target: _Target) -> list[Future[Sources]]:
        pieces = [(at, min(PIECE, place.nbytes - at)) for at in range(0, place.nbytes, PIECE)]
        if self._pool is not None:
            return [self._pool.submit(self._read, place, target, *piece) for piece in pieces]
        done: list[Future[Sources]] = []
        for piece in pieces:
            done.append(Future())
            done[-1].set_result(self._read(place, target, *piece))
        return done

    def finish(self, target: _Target) -> Tensor:
        if target.copied:
            stream = torch.cuda.current_stream(target.tensor.device)
            for event in target.copied:
                stream.wait_event(event)
        tensor = target.tensor
        return tensor if self.cuda is not None or self._device.type == "cpu" else tensor.to(self._device)

    def _read(self, place: TensorPlace, target: _Target, at: int, size: int) -> Sources:
        """One piece, `size` bytes from byte `at` of the tensor on."""
        if self._stop.is_set():
            return 0, 0
        item = place.stored.itemsize
        part, cast = target.flat[at // item : (at + size) // item], place.stored != place.wanted
        file = self._file(place)
        with torch.inference_mode():  # a tensor of inference mode can be written in no other
            if target.ready is not None:
                return self._read_to_gpu(file, place, target, part, at, size)
            if cast:
                raw = self._free_buffer().memory[:size]
                sources = file.fill(raw, place, at)
                part.copy_(raw.view(place.stored))
            else:
                sources = file.fill(part.view(torch.uint8), place, at)
            if place.look is not None and not self._stop.is_set():
                place.look(part)
            return sources

    def _read_to_gpu(
        self, file: _OpenFile, place: TensorPlace, target: _Target, part: Tensor, at: int, size: int
    ) -> Sources:
        lane, buffer = self._lane, self._free_buffer()
        assert lane.stream is not None and target.ready is not None
        raw = buffer.memory[:size]
        sources = file.fill(raw, place, at)
        if lane.ready is not target.ready:
            lane.stream.wait_event(target.ready)
            lane.ready = target.ready
        if place.stored == place.wanted:
            part.view(torch.uint8).copy_(raw, non_blocking=True)
        else:
            if lane.wide is None:
                lane.wide = torch.empty(PIECE, dtype=torch.uint8, device=target.tensor.device)
            wide = lane.wide[:size]
            part.copy_(wide.copy_(raw, non_blocking=True).view(place.stored))
        buffer.copied = torch.cuda.Event()
        buffer.copied.record(lane.stream)
        target.copied.append(buffer.copied)
        return sources

    def _free_buffer(self) -> _Buffer:
        """The buffer of this thread that waits longest; nothing is copied from it any more."""
        buffers = self._buffers()
        buffers.rotate()
        if buffers[0].copied is not None:
            buffers[0].copied.synchronize()
        return buffers[0]

    def _buffers(self) -> deque[_Buffer]:
        """This thread's buffers; two for a GPU, whose stream becomes the thread's current one."""
        lane = self._lane
        if lane.buffers is None:
            if self.cuda is None:
                lane.buffers = deque([_Buffer(torch.empty(PIECE, dtype=torch.uint8))])
            else:
                torch.cuda.set_device(self.cuda)
                lane.stream = torch.cuda.Stream(self.cuda)
                torch.cuda.set_stream(lane.stream)
                self._streams.append(lane.stream)
                # torch keeps pinned memory for the next time.
                pinned = (torch.empty(PIECE, dtype=torch.uint8, pin_memory=True) for _ in range(2))
                lane.buffers = deque(map(_Buffer, pinned))
        return lane.buffers

    def _file(self, place: TensorPlace) -> _OpenFile:
        with self._lock:
            if place.path not in self._files:
                self._files[place.path] = _OpenFile(place.path, self._let_go, self._stop)
            return self._files[place.path]


class _OpenFile:
    """One file that many threads read. With `let_go` the page cache keeps only what it has already."""

    def __init__(self, path: Path, let_go: bool, stop: threading.Event) -> None:
        self._path, self._let_go, self._stop = path, let_go, stop
        self._tells = NO_WAIT is not None
        try:
            self._file = os.open(path, os.O_RDONLY)
        except OSError as error:
            raise CheckpointError(f"{short_path(path)} cannot be read ({error.strerror}).") from None

    def close(self) -> None:
        os.close(self._file)

    def fill(self, target: Tensor, place: TensorPlace, at: int) -> Sources:
        """Fill `target` (bytes in host memory) from byte `at` of the tensor on."""
        view, start = target.numpy().data, place.start + at
        cached = done = self._read_cached(view, start)
        if done < len(view):
            self._advise("POSIX_FADV_WILLNEED", start + done, len(view) - done)  # one large request for the disk
        while done < len(view) and not self._stop.is_set():
            try:
                got = os.preadv(self._file, [view[done : done + STEP]], start + done)
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
        if self._let_go and done > cached:
            self._advise("POSIX_FADV_DONTNEED", start + cached, done - cached)
        return (cached, done - cached) if self._tells else (0, 0)

    def _read_cached(self, view: memoryview, start: int) -> int:
        """Read what the page cache has of these bytes, without waiting for a disk. The number of bytes read."""
        if NO_WAIT is None:
            return 0
        try:
            return os.preadv(self._file, [view], start, NO_WAIT)
        except BlockingIOError:  # nothing of it
            return 0
        except OSError:  # the file system cannot tell
            self._tells = False
            return 0

    def _advise(self, advice: str, start: int, size: int) -> None:
        if hasattr(os, advice):  # Linux
            os.posix_fadvise(self._file, start, size, getattr(os, advice))
