"""Images in the text of a body: data URLs as RFC 2397 writes them, against hand-made bytes, and OpenAI's objects."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from PIL import Image
from served import I2V, SIZE, Served, serve

from lightx2v.errors import BadRequest
from lightx2v.media.work_folder import WORK_PREFIX
from lightx2v.server.input_images import InputImages

_FILE = io.BytesIO()
Image.linear_gradient("L").resize((64, 64)).save(_FILE, "PNG")
PNG = _FILE.getvalue()
B64 = base64.b64encode(PNG).decode()


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with serve(tmp_path_factory.mktemp("images"), presets=(I2V,), max_queue=100) as served:
        yield served


@pytest.mark.parametrize(
    "url",
    [
        f"data:image/png;base64,{B64}",
        f"data:image/png;charset=utf-8;base64,{B64}",
        f"data:image/png;name=a.png;base64,{B64}",
        f"data:image/png;name=a%20b.png;charset=US-ASCII;base64,{B64}",
        f'data:image/png;name="a.png";base64,{B64}',
        f'data:image/png;name="a,b;c.png";base64,{B64}',
        f"data:image%2Fpng;base64,{B64}",
        f"DATA:image/png;BASE64,{B64}",
        f"DATA:IMAGE/PNG;BASE64,{B64}",
        f"Data:Image/Png;Name=A.png;Base64,{B64}",
        f"data:image/png; charset=utf-8; base64,{B64}",
        f"data:image/jpeg;base64,{B64}",
        f"data:application/octet-stream;base64,{B64}",
        f"data:;base64,{B64}",
        f"data:;charset=utf-8;base64,{B64}",
        f"data:image/png;base64,{B64.rstrip('=')}",
        f"data:image/png;base64,{quote(B64, safe='')}",
        "data:image/png;base64," + "\n".join(B64[at : at + 76] for at in range(0, len(B64), 76)),
        f"data:image/png;base64,{base64.urlsafe_b64encode(PNG).decode()}",
        f"  data:image/png;base64,{B64}\n",
        f"data:image/png,{quote(PNG)}",
        f"data:image/png;name=a.png,{quote(PNG)}",
        f"data:,{quote(PNG)}",
        "data:image/png," + "".join(f"%{byte:02X}" for byte in PNG),
    ],
    ids=lambda url: url[:44],
)
def test_a_data_url_holds_its_bytes_however_it_is_written(url: str) -> None:
    assert InputImages().read(url) == PNG


@pytest.mark.parametrize(
    ("url", "word"),
    [
        ("data:image/png;base64", "no comma"),
        (f"data:text/html;base64,{B64}", "'text/html'; expected an image"),
        (f"data:video/mp4;base64,{B64}", "'video/mp4'; expected an image"),
        (f"data:image;base64,{B64}", "'image'; expected an image"),
        ("data:image/png;base64,!!!!", "not valid base64"),
        ("data:image/png;base64,AAAA%", "not valid base64"),
        (f"data:{'x' * 5000};base64,{B64}", "…"),
    ],
    ids=lambda text: text[:30],
)
def test_a_data_url_without_an_image_is_refused_with_a_reason(url: str, word: str) -> None:
    with pytest.raises(BadRequest) as refused:
        InputImages().read(url)
    assert word in str(refused.value) and len(str(refused.value)) < 300


@pytest.mark.parametrize(
    "given",
    [
        {"image_url": f"data:image/png;base64,{B64}"},
        {"image_url": {"url": f"data:image/png;base64,{B64}"}},
        {"image_url": {"url": f"data:image/png;base64,{B64}", "detail": "high"}},
        {"type": "input_image", "image_url": f"data:image/png;base64,{B64}"},
        {"type": "image_url", "image_url": {"url": B64}},
    ],
    ids=lambda given: str(given)[:50],
)
@pytest.mark.parametrize("field", ["input_reference", "image_reference"])
def test_openais_objects_hold_an_image(served: Served, field: str, given: dict[str, Any]) -> None:
    answer = served.client.post("/v1/videos", json={"prompt": "a cat", **SIZE, field: given})
    assert answer.status_code == 200, answer.text
    assert Path(served.jobs.get(answer.json()["id"]).request.image_path).read_bytes() == PNG


def test_the_last_frame_and_lightx2vs_body_take_the_same_objects(served: Served) -> None:
    given = {"image_url": f"data:image/png;base64,{B64}"}
    body = {"prompt": "a cat", **SIZE, "reference_url": given["image_url"], "last_frame_reference": given}
    request = served.jobs.get(served.client.post("/v1/videos", json=body).json()["id"]).request
    assert request.task == "flf2v" and Path(request.last_frame_path).read_bytes() == PNG
    task = served.client.post("/v1/tasks/video/", json={"prompt": "a cat", "image_path": given}).json()["task_id"]
    assert Path(served.jobs.get(task).request.image_path).read_bytes() == PNG


@pytest.mark.parametrize(
    ("given", "word"),
    [
        ({"file_id": "file-1"}, "'file_id'"),
        ({"image_url": B64, "file_id": "file-1"}, "'file_id'"),
        ({}, "expected"),
        ({"image_url": {}}, "expected"),
        ({"image_url": {"image_url": B64}}, "'image_url'"),
        ({"image_url": 7}, "string"),
        ({"image_url": [B64]}, "string"),
        ({"x" * 5000: 1}, "…"),
        ([B64], "string"),
        (7, "string"),
    ],
    ids=lambda given: str(given)[:30],
)
def test_other_objects_are_refused_by_name(served: Served, given: Any, word: str) -> None:
    answer = served.client.post("/v1/videos", json={"prompt": "a cat", **SIZE, "input_reference": given})
    message = answer.json()["error"]["message"]
    assert answer.status_code == 422 and message.startswith("input_reference") and word in message
    assert len(message) < 300


def test_the_first_frame_is_given_once(served: Served) -> None:
    url = f"data:image/png;base64,{B64}"
    body = {"prompt": "a cat", **SIZE, "input_reference": url, "image_reference": {"image_url": url}}
    message = served.client.post("/v1/videos", json=body).json()["error"]["message"]
    assert "input_reference and image_reference" in message and "Keep one" in message


def test_pictures_wait_in_the_folder_of_the_jobs_where_leftovers_are_removed(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    places: list[Path] = []
    submit = served.jobs.submit

    def noted(config: Any, request: Any, **more: Any) -> Any:
        places.append(Path(request.image_path))
        return submit(config, request, **more)

    monkeypatch.setattr(served.jobs, "submit", noted)
    served.submit(input_reference=f"data:image/png;base64,{B64}")
    assert places[0].parent.parent == served.jobs.folder and places[0].parent.name.startswith(WORK_PREFIX)
    assert not [path for path in served.jobs.folder.iterdir() if path.name.startswith(WORK_PREFIX)]
