"""The page's list of model files: which are here, the size of the others, and their download."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from hub_models import BASE, DISTILLED, HIGH, LOW, T5, VAE, merged, point_here, quick, small_hub
from hub_server import Fault, HubServer, serving
from page_engine import Painter
from patience import eventually

from app.backend.model_files import FilesStatus, HubFiles
from app.backend.studio import Studio
from app.exposure import Exposure
from app.strings import Words
from app.views.panels import file_list
from lightx2v.config.model_paths import RIFE
from lightx2v.config.presets import resolve
from lightx2v.config.request import Request
from lightx2v.errors import BadRequest


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    point_here(monkeypatch, tmp_path)
    monkeypatch.chdir(tmp_path)
    with serving(small_hub()) as started:
        yield started


def until(files: HubFiles, condition: Callable[[FilesStatus], bool]) -> FilesStatus:
    return eventually(lambda: condition(status := files.status(merged())) and status)


def test_the_demo_needs_no_network(server: HubServer) -> None:
    status = HubFiles(quick(server)).status(resolve("demo_t2v_distill_lora").engine)
    assert status.ready and not status.can_download and not server.asked
    assert all(file.here > 0 for file in status.files)


def test_sizes_come_from_the_hub_before_any_download(server: HubServer) -> None:
    files = HubFiles(quick(server))
    first = files.status(merged())
    assert not first.ready and first.can_download and first.missing_bytes is None
    status = until(files, lambda status: status.missing_bytes is not None)
    assert status.missing_bytes == 535_029 and not server.sent
    sizes = {file.name: file.bytes for file in status.files}
    assert sizes[f"{DISTILLED}/{HIGH}"] == 200_000 and sizes[f"{BASE}/google/umt5-xxl/"] == 5_000
    assert [path.partition("?")[0] for path in server.asked if "/models/" in path].count(f"/api/models/{BASE}") == 1


def test_the_button_downloads_the_files(server: HubServer) -> None:
    files, looked = HubFiles(quick(server)), threading.Event()
    server.faults[LOW] = [Fault(after=looked.is_set)]
    files.download(merged())
    files.download(merged())  # a second click changes nothing
    running = until(files, lambda status: status.download is not None and 0 < status.download.done)
    assert running.download is not None and running.download.total == 535_029
    assert 'data-act="cancel_download"' in file_list(Words("en"), running)
    looked.set()
    done = until(files, lambda status: status.download is None)
    assert done.ready and not done.can_download
    assert "data-act" not in file_list(Words("en"), done)
    assert server.bytes_of(HIGH) == 200_000 and server.bytes_of(T5) == 90_000


@pytest.mark.slow
def test_a_cancelled_download_resumes_later(server: HubServer) -> None:
    files = HubFiles(quick(server))
    server.faults = {path: [Fault(stall_after=70_000)] for path in (HIGH, LOW)}
    files.download(merged())
    come = 535_029 - 200_000 - 200_001 + 2 * 70_000  # all but what stays away of the two
    until(files, lambda status: status.download is not None and status.download.done == come)
    files.cancel()
    assert files.status(merged()).download is None
    # A download does nothing until the cancelled one has ended.
    eventually(lambda: files.status(merged()).ready or files.download(merged()))
    assert server.bytes_of(HIGH) == 200_000 and server.bytes_of(LOW) == 200_001


def test_a_failed_download_shows_its_error_until_dismissed(server: HubServer) -> None:
    files = HubFiles(quick(server))
    server.gated.add(BASE)
    files.download(merged())
    status = until(files, lambda status: bool(status.download and status.download.error))
    assert status.download is not None and "accept its conditions" in status.download.error
    assert "accept its conditions" in file_list(Words("en"), status)
    files.cancel()
    status = files.status(merged())
    assert status.download is None and 'data-act="download"' in file_list(Words("en"), status)


def test_without_the_hub_files_are_listed_without_sizes(server: HubServer) -> None:
    files = HubFiles(quick(server))
    server.files.clear()
    for _ in range(3):
        status = files.status(merged())
        assert not status.ready and status.missing_bytes is None and status.disk_free > 0
    assert VAE in status.files[-1].name


def test_others_cannot_make_this_machine_download_a_model(server: HubServer, tmp_path: Path) -> None:
    resolved = resolve("t2v_distill_lora")
    request = Request(prompt="a cat", **resolved.request)
    open_page = Exposure(share=True, open_to_others=True, user="studio", password="of the occasion")
    studio = Studio(Painter(), tmp_path / "outputs", open_page, files=HubFiles(quick(server)))
    try:
        with pytest.raises(BadRequest, match=r"not on this machine.*python -m lightx2v.download t2v_distill_lora"):
            studio.submit(resolved.engine, request, owner="somebody", preset="t2v_distill_lora")
    finally:
        studio.close()
    assert not server.sent


def test_others_cannot_make_this_machine_download_rife(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, server: HubServer
) -> None:
    resolved = resolve("demo_t2v_distill_lora")
    request = Request(prompt="a cat", **resolved.request | {"interpolated_fps": 32})
    open_page = Exposure(share=True, open_to_others=True, user="studio", password="of the occasion")
    monkeypatch.chdir(tmp_path)
    studio = Studio(Painter(), tmp_path / "outputs", open_page, files=HubFiles(quick(server)))
    try:
        with pytest.raises(BadRequest, match=r"weights of RIFE.*interpolation ffmpeg.*demo_t2v_distill_lora --rife"):
            studio.submit(resolved.engine, request, owner="somebody", preset="demo_t2v_distill_lora")
        by_ffmpeg = replace(request, interpolation="ffmpeg")
        assert studio.submit(resolved.engine, by_ffmpeg, owner="somebody", preset="demo_t2v_distill_lora")
        (tmp_path / RIFE).parent.mkdir(parents=True)
        (tmp_path / RIFE).write_bytes(b"weights")
        assert studio.submit(resolved.engine, request, owner="somebody", preset="demo_t2v_distill_lora")
    finally:
        studio.close()
