"""How much of a model's files the system has in memory, its page cache: then loading reads no disk."""

import ctypes
import mmap
import os
from pathlib import Path

SAMPLES = 64
"""Places of a file that are asked about."""


def bytes_in_page_cache(place: Path) -> int:
    """The bytes of a file or folder that are in memory, about; 0 where the system does not tell. Reads nothing."""
    files = [path for path in place.rglob("*") if path.is_file()] if place.is_dir() else [place]
    return sum(int(_share(file) * file.stat().st_size) for file in files)


def _share(path: Path) -> float:
    try:
        with path.open("rb") as file:
            stat = os.fstat(file.fileno())
            # Of a file that one may neither own nor write, Linux says that all of it is in memory.
            if not stat.st_size or not (stat.st_uid == os.geteuid() or os.access(path, os.W_OK)):
                return 0.0
            return _asked(file.fileno(), stat.st_size)
    except (OSError, AttributeError):  # not there any more, or not Linux
        return 0.0


def _asked(file: int, size: int) -> float:
    libc, page = ctypes.CDLL(None, use_errno=True), mmap.PAGESIZE
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    address = libc.mmap(None, size, mmap.PROT_READ, mmap.MAP_PRIVATE, file, 0)
    if address in (None, ctypes.c_void_p(-1).value):
        return 0.0
    try:
        pages = -(-size // page)
        some = range(0, pages, -(-pages // SAMPLES))
        answer = ctypes.c_ubyte()
        found = 0
        for index in some:
            if libc.mincore(ctypes.c_void_p(address + index * page), ctypes.c_size_t(1), ctypes.byref(answer)):
                return 0.0
            found += answer.value & 1
        return found / len(some)
    finally:
        libc.munmap(ctypes.c_void_p(address), ctypes.c_size_t(size))
