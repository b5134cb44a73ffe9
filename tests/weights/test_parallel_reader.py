"""Many threads read tensors: the right bytes, bounded memory, and a clear error where a file fails."""

from __future__ import annotations

import errno
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lightx2v.errors import Cancelled, CheckpointError
from lightx2v.progress import CancelToken, LoadWatch
from lightx2v.weights import parallel_reader
from lightx2v.weights.parallel_reader import PIECE, TensorPlace, read_tensors

Places = list[TensorPlace]


@pytest.fixture(scope="module")
def bytes_(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three pieces of random bytes, and a little more."""
    path = tmp_path_factory.mktemp("bytes") / "random.bin"
    path.write_bytes(np.random.default_rng(0).bytes(3 * PIECE + 10_000))
    return path


def place(path: Path, start: int, count: int, stored: torch.dtype, wanted: torch.dtype | None = None) -> TensorPlace:
    return TensorPlace(f"at {start}", path, start, stored, (count,), wanted or stored)


def expected(path: Path, start: int, count: int, stored: torch.dtype) -> torch.Tensor:
    data = path.read_bytes()[start : start + count * stored.itemsize]
    return torch.frombuffer(bytearray(data), dtype=stored) if count else torch.empty(0, dtype=stored)


@pytest.mark.slow
@pytest.mark.parametrize("stored", [torch.uint8, torch.bfloat16, torch.float32, torch.float64, torch.float8_e4m3fn])
@pytest.mark.parametrize("start", [0, 8, 4095, 12_345])
def test_every_byte_arrives_at_its_place(bytes_: Path, stored: torch.dtype, start: int) -> None:
    """Tensors of none, one and several pieces, at starts that are aligned to nothing."""
    counts = [0, 1, 100, PIECE // stored.itemsize, (2 * PIECE + 1000) // stored.itemsize]
    places = [place(bytes_, start, count, stored) for count in counts]
    for count, (name, tensor) in zip(counts, read_tensors(places), strict=True):
        right = expected(bytes_, start, count, stored)
        assert name == f"at {start}" and tensor.dtype == stored and tensor.shape == (count,)
        assert torch.equal(tensor.view(torch.uint8), right.view(torch.uint8))


@pytest.mark.parametrize("start", [0, 4095, 12_345])
def test_casting_on_the_way_is_casting_afterwards(tmp_path: Path, start: int) -> None:
    values = torch.randn(PIECE // 4 + 70_001)
    path = tmp_path / "floats.bin"
    path.write_bytes(bytes(start) + values.numpy().tobytes())
    [(_, tensor)] = read_tensors([place(path, start, len(values), torch.float32, torch.bfloat16)])
    assert torch.equal(tensor, values.bfloat16())


def test_tensors_are_read_into_the_memory_that_is_given(bytes_: Path) -> None:
    with torch.inference_mode():  # as a run is
        whole = torch.zeros(300)
    target = whole[100:200]
    given = TensorPlace("w", bytes_, 4, torch.float32, (100,), torch.float32, target)
    with torch.inference_mode():
        assert next(read_tensors([given]))[1] is target
    right = expected(bytes_, 4, 100, torch.float32)
    assert torch.equal(whole.view(torch.uint8)[400:800], right.view(torch.uint8))
    assert not whole[:100].any() and not whole[200:].any()


def test_a_tensor_read_in_inference_mode_can_be_changed_outside_of_it(bytes_: Path) -> None:
    with torch.inference_mode():
        [(_, tensor)] = read_tensors([place(bytes_, 0, 8, torch.uint8)])
    tensor.add_(1)


def test_the_bytes_that_have_arrived_are_counted(bytes_: Path) -> None:
    seen: list[int] = []
    places = [place(bytes_, 0, 10, torch.float32), place(bytes_, 0, 2 * PIECE, torch.uint8)]
    for _ in read_tensors(places, watch=LoadWatch(on_bytes=seen.append)):
        pass
    assert seen == [40, 2 * PIECE]


def test_what_waits_to_be_used_is_bounded(bytes_: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A user that takes no more tensors stops the reading soon, whatever the model's size."""
    monkeypatch.setattr(parallel_reader, "HOST_AHEAD", 2 * PIECE)
    made: list[TensorPlace] = []
    monkeypatch.setattr(
        parallel_reader._Reading,
        "_submit",
        lambda self, place, target: made.append(place) or [],  # type: ignore[func-returns-value]
    )
    reading = read_tensors([place(bytes_, 0, PIECE, torch.uint8)] * 50)
    next(reading)
    assert len(made) <= 4
    reading.close()
    assert parallel_reader.MAX_STAGING <= 512 << 20


def reading_threads() -> set[threading.Thread]:
    return {thread for thread in threading.enumerate() if thread.name.startswith("lightx2v-read")}


def test_threads_and_files_end_with_the_reading(bytes_: Path) -> None:
    before, files = reading_threads(), len(os.listdir("/proc/self/fd"))
    reading = read_tensors([place(bytes_, 0, 3 * PIECE, torch.uint8)] * 20)
    next(reading)
    assert reading_threads() - before
    reading.close()
    assert not reading_threads() - before and len(os.listdir("/proc/self/fd")) == files


# ---- what fails while it is read -----------------------------------------------------------------------------------


def disk(monkeypatch: pytest.MonkeyPatch, preadv: Callable[..., int]) -> None:
    """Every read that goes to the disk is `preadv`."""
    real = os.preadv
    monkeypatch.setattr(parallel_reader._OpenFile, "_read_cached", lambda *_: 0)
    monkeypatch.setattr(os, "preadv", lambda *arguments: preadv(real, *arguments))


def test_a_disk_that_returns_little_at_a_time_is_read_to_the_end(bytes_: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk(monkeypatch, lambda real, file, buffers, at: real(file, [buffers[0][: 1 + at % 90_000]], at))
    [(_, tensor)] = read_tensors([place(bytes_, 17, PIECE + 5, torch.uint8)])
    assert torch.equal(tensor, expected(bytes_, 17, PIECE + 5, torch.uint8))


@pytest.mark.parametrize("size", [100, PIECE * 3 // 2])
def test_a_file_that_became_shorter_is_named(tmp_path: Path, size: int) -> None:
    path = tmp_path / "short.bin"
    path.write_bytes(bytes(size - 1))
    with pytest.raises(CheckpointError, match=r"short\.bin became shorter while at 0 was read.*download it again"):
        list(read_tensors([place(path, 0, size, torch.uint8)]))


@pytest.mark.parametrize("count", [10, PIECE * 3])
def test_a_failing_disk_is_reported_with_the_tensor(bytes_: Path, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> int:
        raise OSError(errno.EIO, "Input/output error")

    disk(monkeypatch, fail)
    with pytest.raises(CheckpointError, match=r"random\.bin cannot be read at tensor at 3 \(Input/output error\)"):
        list(read_tensors([place(bytes_, 3, count, torch.uint8)]))


@pytest.mark.parametrize("large", [False, True])
def test_a_model_too_large_for_the_page_cache_leaves_it_as_it_is(
    tmp_path: Path, large: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was cached before stays; the rest is cached afterwards only if all of the model can be."""
    path = tmp_path / "half.bin"
    path.write_bytes(np.random.default_rng(1).bytes(2 * PIECE))
    file = os.open(path, os.O_RDONLY)
    os.fsync(file)
    os.posix_fadvise(file, PIECE, PIECE, os.POSIX_FADV_DONTNEED)
    if cached(file, PIECE):
        pytest.skip("this file system keeps its files in memory")
    monkeypatch.setattr(parallel_reader, "PARTS", 10**9 if large else 0)
    monkeypatch.setattr(parallel_reader, "LARGE", PIECE)
    [(_, tensor)] = read_tensors([place(path, 0, 2 * PIECE, torch.uint8)])
    assert cached(file, 0) and cached(file, PIECE) != large
    os.close(file)
    assert torch.equal(tensor, expected(path, 0, 2 * PIECE, torch.uint8))


def cached(file: int, at: int) -> bool:
    try:
        return os.preadv(file, [bytearray(4096)], at + PIECE // 2, os.RWF_NOWAIT) == 4096
    except BlockingIOError:
        return False


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"gone\.bin cannot be read"):
        list(read_tensors([place(tmp_path / "gone.bin", 0, 5, torch.uint8)]))


@pytest.mark.slow
def test_cancelling_ends_a_slow_read_at_once(bytes_: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk of 10 MB a second, on which one tensor takes many seconds."""

    def slow(real: Any, file: int, buffers: Any, at: int) -> int:
        time.sleep(len(buffers[0]) / 10e6)
        return real(file, buffers, at)

    disk(monkeypatch, slow)
    cancel = CancelToken()
    timer = threading.Timer(0.3, cancel.cancel)
    timer.start()
    started = time.perf_counter()
    with pytest.raises(Cancelled):
        list(read_tensors([place(bytes_, 0, 3 * PIECE, torch.uint8)] * 4, watch=LoadWatch(cancel)))
    assert time.perf_counter() - started < 0.8
    timer.join()
    assert not reading_threads()
