"""Files that a launched page serves: results under their unguessable id, and nothing else.

Covered: gradio's file routes for system files, the working folder, presets, models, the database, URLs and `..`;
results of another id, path traversal in ids, and files outside the output folder.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
from studio_app import LEAKS, ROOT, Page

pytestmark = pytest.mark.multi

NOBODY = "0" * 32


@pytest.fixture(scope="module")
def result(page: Page) -> str:
    return str(page.make("a file", settings={"frames": 5})["id"])


@pytest.mark.parametrize(
    "path",
    [
        "/gradio_api/file=/etc/passwd",
        "/gradio_api/file=/ETC/passwd",
        "/gradio_api/file={root}/app.py",
        "/gradio_api/file={root}/presets/t2v_base.json",
        "/gradio_api/file={root}/assets/demo/world.json",
        "/gradio_api/file=app.py",
        "/gradio_api/file={output}/jobs.sqlite",
        "/gradio_api/file={output}/browser.key",
        "/gradio_api/file={output}/rates.json",
        "/gradio_api/file={output}/{result}.mp4",
        "/gradio_api/file={output}/uploads/../jobs.sqlite",
        "/gradio_api/file=http://169.254.169.254/latest/meta-data/",
        "/gradio_api/proxy=http://127.0.0.1:1/",
        "/file=/etc/passwd",
        "/static/../app.py",
        "/assets/..%2f..%2fapp.py",
        "/studio/../../etc/passwd",
        "/studio/%2e%2e%2f%2e%2e%2fetc%2fpasswd/video.mp4",
        "/studio/{output}/jobs.sqlite/video.mp4",
        "/studio/{result}%2f..%2fjobs.sqlite",
        "/studio/00000000000000000000000000000000/video.mp4",
        "/studio/00000000000000000000000000000000/poster.jpg",
        "/studio/examples/..%2fworld.png",
        "/studio/examples/secret.png",
        "/studio/jobs.sqlite",
    ],
)
def test_no_route_serves_a_file_that_is_not_a_result(page: Page, result: str, path: str) -> None:
    answer = page.http.get(path.format(root=ROOT, output=page.folder, result=result))
    assert answer.status_code in (400, 403, 404), (answer.status_code, answer.text[:200])
    assert b"root:" not in answer.content and b"SQLite" not in answer.content
    assert "Traceback" not in answer.text


def test_a_run_serves_its_video_and_poster(page: Page, result: str) -> None:
    video, poster = (page.http.get(f"/studio/{result}/{name}") for name in ("video.mp4", "poster.jpg"))
    assert video.content[4:8] == b"ftyp" and poster.content[:2] == b"\xff\xd8"
    for answer in (video, poster):
        assert answer.headers["x-content-type-options"] == "nosniff" and "private" in answer.headers["cache-control"]
    download = page.http.get(f"/studio/{result}/video.mp4?download")
    name = download.headers["content-disposition"]
    assert re.search(r'filename="\d{8}-\d{4}-demo_t2v_distill_lora-seed\d+-[a-z_]+\.mp4"', name), name
    assert page.http.get(f"/studio/{NOBODY}/preview.jpg").status_code == 204


def test_head_has_the_headers_of_get_and_no_body(page: Page, result: str) -> None:
    paths = [f"/studio/{result}/{name}" for name in ("video.mp4", "video.mp4?download", "poster.jpg", "preview.jpg")]
    for path in [*paths, "/studio/sample.mp4", f"/v1/videos/{result}/content", f"/studio/{NOBODY}/video.mp4"]:
        head, get = page.http.head(path), page.http.get(path)
        assert head.status_code == get.status_code and not head.content, path
        for name in ("content-length", "content-type", "accept-ranges", "etag", "cache-control"):
            assert head.headers.get(name) == get.headers.get(name), (path, name)


def test_a_link_out_of_the_output_folder_is_not_served(page: Page) -> None:
    """As if an attacker had replaced a result with a link to a system file."""
    id = str(page.make("a link", settings={"frames": 5})["id"])
    assert page.http.get(f"/studio/{id}/video.mp4").status_code == 200
    video = page.folder / f"{id}.mp4"
    video.unlink()
    video.symlink_to("/etc/passwd")
    answer = page.http.get(f"/studio/{id}/video.mp4")
    assert answer.status_code == 404 and not LEAKS.search(answer.text)


def test_secret_files_are_readable_by_their_owner_only(page: Page) -> None:
    assert (page.folder / "browser.key").stat().st_mode & 0o077 == 0


def test_ids_cannot_be_guessed(page: Page, result: str) -> None:
    other = str(page.make("another file", settings={"frames": 5})["id"])
    assert all(re.fullmatch("[0-9a-f]{32}", id) for id in (result, other))
    assert sum(a == b for a, b in zip(result, other, strict=True)) < 16, "ids contain no counter and no time"


def test_uploads_have_their_own_folder(page: Page) -> None:
    upload = Path(page.upload(b"x", "../../evil.png")["path"])
    assert upload.is_relative_to(page.folder / "uploads") and upload.name == "evil.png"
    assert os.path.commonpath([upload.resolve(), page.folder]) == str(page.folder)
