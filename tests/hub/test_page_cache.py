"""A model's files that are in the page cache are known to be there, also after the model has left memory."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from lightx2v.hub.page_cache import bytes_in_page_cache

SIZE = 8 << 20


def forget(path: Path) -> None:
    """Have the system drop a file from its page cache."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "model.safetensors"
    path.write_bytes(os.urandom(SIZE))
    forget(path)
    if bytes_in_page_cache(path):
        pytest.skip("this file system keeps its files in memory")
    return path


def test_a_file_that_was_read_is_cached_until_the_system_drops_it(file: Path) -> None:
    file.read_bytes()
    assert bytes_in_page_cache(file) == SIZE
    forget(file)
    assert bytes_in_page_cache(file) == 0, "and asking has read nothing"


def test_a_file_that_was_read_in_part_is_cached_in_part(file: Path) -> None:
    with file.open("rb", buffering=0) as opened:
        os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_RANDOM)  # nothing is read ahead
        for _ in range(SIZE // 2 >> 16):
            opened.read(1 << 16)
    assert 0.4 * SIZE < bytes_in_page_cache(file) < 0.6 * SIZE


def test_folders_are_summed_and_files_that_are_gone_or_empty_count_nothing(file: Path, tmp_path: Path) -> None:
    file.read_bytes()
    (tmp_path / "empty").touch()
    (tmp_path / "deeper").mkdir()
    (tmp_path / "deeper" / "other").write_bytes(bytes(SIZE))
    assert bytes_in_page_cache(tmp_path) == 2 * SIZE


def test_nothing_is_said_of_a_file_that_others_own(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Linux would say that it is all in memory."""
    file.read_bytes()
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert bytes_in_page_cache(file) == 0
