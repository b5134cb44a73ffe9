"""Uploads to a launched page: malformed ones get a 4xx and leave nothing; the bytes of each visitor are bounded."""

from __future__ import annotations

import hashlib
import os
import socket
import time
from collections.abc import Iterator
from datetime import datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from gradio import route_utils
from page_events import Keyboard
from patience import PATIENCE, eventually
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route
from starlette.testclient import TestClient
from studio_app import LEAKS, Page

from app.exposure import PUBLIC_LIMITS, Exposure
from app.web.limits import upload_limit
from app.web.uploads import EVERYBODY, Uploads, remove_leftovers

URL = "/gradio_api/upload"
FORM = "multipart/form-data; boundary=b"


def part(head: str, content: str = "x") -> bytes:
    return f"--b\r\n{head}\r\n\r\n{content}\r\n--b--\r\n".encode()


GOOD = part('Content-Disposition: form-data; name="files"; filename="a.txt"')
MALFORMED: dict[str, tuple[str, bytes]] = {
    "no content type": ("", GOOD),
    "no form": ("application/json", b"{}"),
    "no boundary": ("multipart/form-data", GOOD),
    "an empty boundary": ("multipart/form-data; boundary=", GOOD),
    "another boundary": ("multipart/form-data; boundary=c", GOOD),
    "no body": (FORM, b""),
    "no part": (FORM, b"--b--\r\n"),
    "no end": (FORM, GOOD[:-9]),
    "broken parts": (FORM, b"--b\r\nnonsense\r\n\r\n\x00\xff--b--"),
    "a header without a colon": (FORM, part("Content-Disposition")),
    "no name": (FORM, part('Content-Disposition: form-data; filename="a"')),
    "no disposition": (FORM, part("X-Nothing: 1")),
    "no filename": (FORM, part('Content-Disposition: form-data; name="files"')),
    "another field": (FORM, part('Content-Disposition: form-data; name="other"; filename="a.txt"')),
    "a text": (FORM, part('Content-Disposition: form-data; name="other"')),
    "a huge header": (FORM, part(f'Content-Disposition: form-data; name="files"; filename="a"\r\nX-A: {"a" * 20_000}')),
    "a huge filename": (FORM, part(f'Content-Disposition: form-data; name="files"; filename="{"a" * 20_000}"')),
    "an unknown charset": (f"{FORM}; charset=nonsense", part('Content-Disposition: form-data; name="x"')),
    "a file, then another field": (FORM, GOOD[:-7] + part('Content-Disposition: form-data; name="o"; filename="a"')),
}


@pytest.mark.multi
@pytest.mark.parametrize("name", MALFORMED)
@pytest.mark.parametrize("query", ["", "?upload_id=x"])
def test_a_malformed_upload_gets_a_4xx_and_leaves_nothing(page: Page, name: str, query: str) -> None:
    kind, body = MALFORMED[name]
    before, folder = page.said.count("Traceback"), page.folder / "uploads"
    files = {path for path in folder.rglob("*") if path.is_file()}
    headers = {"Content-Type": kind} if kind else {}
    answer = eventually(
        lambda: (r := page.http.post(URL + query, content=body, headers=headers)).status_code != 429 and r
    )
    assert 400 <= answer.status_code < 500, (answer.status_code, answer.text[:200])
    assert answer.text and len(answer.text) < 400 and not LEAKS.search(answer.text)
    assert page.said.count("Traceback") == before
    assert {path for path in folder.rglob("*") if path.is_file()} == files


@pytest.mark.multi
def test_an_upload_that_is_cut_off_leaves_nothing_and_no_traceback(page: Page) -> None:
    before, folder = page.said.count("Traceback"), page.folder / "uploads"
    head = f"POST {URL} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: {FORM}\r\nContent-Length: 100000\r\n\r\n"
    port = httpx.URL(page.url).port
    earlier = set(folder.glob("tmp*"))  # of other tests on this page

    def parts() -> set[Path]:
        return set(folder.glob("tmp*")) - earlier

    def cut_off() -> bool:
        """False where all tests together have sent too many requests."""
        with socket.create_connection(("127.0.0.1", port), PATIENCE) as connection:
            connection.sendall(head.encode() + GOOD[:-9] + b"y" * 50_000)
            for _ in range(20):
                if parts():
                    return True
                time.sleep(0.05)
        return False

    assert eventually(cut_off)
    assert eventually(lambda: not parts())
    assert page.said.count("Traceback") == before


@pytest.mark.multi
def test_good_uploads_of_one_and_of_several_files_are_taken(page: Page) -> None:
    files = [("files", (name, name.encode())) for name in ("a.png", "ü ~.png", "b" * 300 + ".png", "")]
    paths = [Path(path) for path in page.http.post(URL, files=files[:3]).json()]
    assert [path.read_bytes() for path in paths] == [name.encode() for _, (name, _) in files[:3]]


@pytest.mark.multi
def test_a_picture_on_an_open_page_counts_as_used(page: Page, keyboard: Keyboard) -> None:
    image = page.upload(b"no picture, but chosen", "a.png")
    keyboard.press("image_path", "change", session="open page", image_path=image)
    path = Path(image["path"])
    os.utime(path, (1, 1))
    keyboard.press("timer", "tick", session="another page")
    assert path.stat().st_mtime == 1
    keyboard.press("timer", "tick", session="open page")
    assert time.time() - path.stat().st_mtime < 60


class InAnHour(datetime):
    """The clock of gradio in 3700 seconds."""

    @classmethod
    def now(cls, tz: Any = None) -> datetime:
        return datetime.now(tz) + timedelta(seconds=3700)


def test_unused_uploads_are_removed_after_an_hour(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By gradio, which the page tells to look every ten minutes for files that nobody touched for an hour."""
    source = (Path(__file__).parents[2] / "app" / "page.py").read_text()
    assert "delete_cache=(600, 3600)" in source
    monkeypatch.setattr(route_utils, "datetime", InAnHour)
    unused = tmp_path / "unused.png"
    unused.write_bytes(b"x")
    blocks: Any = SimpleNamespace(blocks={}, temp_file_sets=[{str(unused)}])
    route_utils.delete_files_created_by_app(blocks, 4000)
    assert unused.exists()
    route_utils.delete_files_created_by_app(blocks, 3600)
    assert not unused.exists()


# ---- the bound ----------------------------------------------------------------------------------------------------


def stored(folder: Path, content: bytes) -> Path:
    """A file as gradio stores an upload."""
    path = folder / hashlib.sha256(content).hexdigest() / "a.png"
    path.parent.mkdir()
    path.write_bytes(content)
    return path


def test_the_oldest_uploads_of_a_visitor_go_when_new_ones_exceed_the_bound(tmp_path: Path) -> None:
    uploads = Uploads(1000)
    others = stored(tmp_path, b"other" * 100)
    uploads.keep("bob", [others])
    mine = [stored(tmp_path, bytes([number]) * 300) for number in range(12)]
    for path in mine:
        uploads.keep("alice", [path])
    assert [path.exists() for path in mine] == [False] * 9 + [True] * 3 and others.exists()
    assert not mine[0].parent.exists(), "its folder goes, too"
    uploads.keep("alice", [large := stored(tmp_path, b"l" * 5000)])
    assert large.exists() and not any(path.exists() for path in mine), "the newest always stays"


def test_all_visitors_together_are_bounded_too(tmp_path: Path) -> None:
    """A visitor may have as many names as addresses, and behind a share link makes them up."""
    uploads = Uploads(1000)
    paths = [stored(tmp_path, b"%03d" % number * 300) for number in range(40)]
    for number, path in enumerate(paths):
        uploads.keep(f"visitor {number}", [path])
    kept = [path.stat().st_size for path in paths if path.exists()]
    assert sum(kept) <= EVERYBODY * 1000 < sum(kept) + 900 and paths[-1].exists()


def test_a_file_that_gradio_has_removed_no_longer_counts(tmp_path: Path) -> None:
    uploads = Uploads(1000)
    first, second = stored(tmp_path, b"a" * 600), stored(tmp_path, b"b" * 600)
    uploads.keep("alice", [first])
    first.unlink()
    uploads.keep("alice", [second])
    third = stored(tmp_path, b"c" * 300)
    uploads.keep("alice", [third])
    assert second.exists() and third.exists()


@pytest.fixture
def client(tmp_path: Path) -> Iterator[TestClient]:
    """The middleware over a route that stores what it is sent, on a page for everybody."""

    async def upload(request: Request) -> JSONResponse:
        return JSONResponse([str(stored(tmp_path, await request.body()))])

    app = Starlette(
        routes=[Route(URL, upload, methods=["POST"])],
        middleware=[upload_limit(Exposure(share=True, open_to_others=True, limits=PUBLIC_LIMITS))],
    )
    with TestClient(app) as client:
        yield client


@pytest.mark.slow
def test_twelve_uploads_of_31_mb_to_a_public_page_keep_128_mb(client: TestClient, tmp_path: Path) -> None:
    for number in range(12):
        assert client.post(URL, content=bytes([number]) * 31_000_000).status_code == 200
    kept = sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file())
    assert 97_000_000 < kept <= PUBLIC_LIMITS.kept == 128_000_000


def test_uploads_at_the_same_time_are_bounded_before_they_are_stored() -> None:
    uploads = Uploads(1000)
    assert uploads.begin("alice", 2000), "one always may, whatever its size"
    assert not uploads.begin("alice", 1) and uploads.begin("bob", 1000)
    uploads.end("alice", 2000)
    assert uploads.begin("alice", 500) and uploads.begin("alice", 500) and not uploads.begin("alice", 1)
    taken = sum(uploads.begin(f"visitor {number}", 1000) for number in range(20))
    assert taken == EVERYBODY - 2, "all together"


def test_what_a_killed_page_has_left_is_removed_at_the_next_start_and_nothing_else(tmp_path: Path) -> None:
    left = [stored(tmp_path, b"left"), tmp_path / "tmpab12_cd3"]
    own = [tmp_path / "notes.txt", tmp_path / "holiday" / "a.png", tmp_path / "tmp-mine.txt"]
    for path in (left[1], *own):
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"x")
    remove_leftovers(tmp_path)
    assert not any(path.exists() for path in left) and all(path.exists() for path in own)
    assert not left[0].parent.exists()
    remove_leftovers(tmp_path / "nothing")
