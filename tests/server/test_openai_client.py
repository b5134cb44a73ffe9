"""OpenAI's own Python package against a listening server: every method of its video client that the server has."""

from __future__ import annotations

import base64
import io
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import openai
import pytest
from fake_engine import Garage, Script
from patience import PATIENCE
from PIL import Image
from served import BASE, I2V, T2V, Served, listening, serve

from lightx2v.media.images import load_image

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:The Sora API is scheduled:DeprecationWarning")]

KEY = "0123456789abcdef0123456789abcdef"
QUICK = {"extra_body": {"num_frames": 5, "width": 64, "height": 64}}


@contextmanager
def client_of(served: Served, key: str = KEY) -> Iterator[openai.OpenAI]:
    with listening(served) as http, openai.OpenAI(api_key=key, base_url=f"{http.base_url}/v1", max_retries=0) as client:
        yield client


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    with serve(tmp_path, presets=(T2V, I2V, BASE), keys=[KEY], max_queue=100) as served:
        yield served


@pytest.fixture
def client(served: Served) -> Iterator[openai.OpenAI]:
    with client_of(served) as client:
        yield client


def png(colour: str = "red") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (64, 64), colour).save(buffer, "PNG")
    return buffer.getvalue()


def test_create_and_poll_then_download_each_variant_and_delete(client: openai.OpenAI, tmp_path: Path) -> None:
    video = client.videos.create_and_poll(prompt="a cat", seconds="4", poll_interval_ms=20, **QUICK)
    assert (video.status, video.progress, video.object, video.model) == ("completed", 100, "video", T2V)
    assert (video.size, video.prompt, video.remixed_from_video_id, video.error) == ("64x64", "a cat", None, None)
    assert video.completed_at is not None and video.created_at <= video.completed_at
    assert client.videos.retrieve(video.id) == video

    whole = client.videos.download_content(video.id).content
    assert whole == client.videos.download_content(video.id, variant="video").content
    assert whole == (tmp_path / f"{video.id}.mp4").read_bytes()
    for variant in ("thumbnail", "spritesheet"):
        image = Image.open(io.BytesIO(client.videos.download_content(video.id, variant=variant).content))  # type: ignore[arg-type]
        assert image.format == "JPEG" and image.load()
    with pytest.raises(
        openai.UnprocessableEntityError,
        match="variant is 'poster'; expected one of video, original, thumbnail, spritesheet",
    ):
        client.videos.download_content(video.id, variant="poster")  # type: ignore[arg-type]

    gone = client.videos.delete(video.id)
    assert (gone.id, gone.deleted, gone.object) == (video.id, True, "video.deleted")
    with pytest.raises(openai.NotFoundError):
        client.videos.retrieve(video.id)
    assert not list(tmp_path.glob(f"{video.id}*")), "the pictures go with the video"


def test_lists_in_both_orders_go_through_all_pages(served: Served, client: openai.OpenAI) -> None:
    ids = [client.videos.create(prompt=f"number {number}", **QUICK).id for number in range(7)]
    assert [video.id for video in client.videos.list()] == ids[::-1]
    assert [video.id for video in client.videos.list(limit=2)] == ids[::-1]
    assert [video.id for video in client.videos.list(limit=3, order="asc")] == ids
    page = client.videos.list(limit=2, order="asc", after=ids[1])
    assert [video.id for video in page.data] == ids[2:4] and page.has_more and page.last_id == ids[3]
    last = client.videos.list(limit=3, after=ids[3])
    assert [video.id for video in last.data] == ids[2::-1] and last.has_more is False
    with client_of(served, KEY) as same:
        assert same.videos.list(limit=1).data[0].id == ids[-1]


@pytest.mark.parametrize("order", ["asc", "desc"])
def test_a_list_goes_on_after_jobs_that_were_removed_meanwhile(
    order: Any, served: Served, client: openai.OpenAI
) -> None:
    ids = [client.videos.create(prompt=f"number {number}", **QUICK).id for number in range(7)]
    for id in ids:
        served.jobs.wait(id, PATIENCE)
    found = []
    for video in client.videos.list(limit=2, order=order):
        found.append(video.id)
        assert client.videos.delete(video.id).deleted
    assert found == (ids if order == "asc" else ids[::-1])


def test_a_picture_as_a_file_as_an_object_and_by_its_data_url(served: Served, client: openai.OpenAI) -> None:
    """The package refuses an object as `input_reference` itself, so people send it in `extra_body`."""
    address = "data:image/png;base64," + base64.b64encode(png()).decode()
    quick = QUICK["extra_body"]
    videos = [client.videos.create(prompt="a cat", input_reference=("a.png", png(), "image/png"), **QUICK)]
    for reference in ({"image_url": address}, {"image_url": {"url": address}}, address):
        videos.append(client.videos.create(prompt="a cat", extra_body={**quick, "input_reference": reference}))
    for video in videos:
        request = served.jobs.get(video.id).request
        assert video.model == I2V and load_image(request.image_path).size == (64, 64)
        assert Path(request.image_path).read_bytes() == png()
    with pytest.raises(openai.UnprocessableEntityError, match="file_id"):
        client.videos.create(prompt="a cat", extra_body={**quick, "input_reference": {"file_id": "file-1"}})


def test_lists_among_the_settings_arrive_as_the_package_writes_them_into_a_form(
    served: Served, client: openai.OpenAI
) -> None:
    more = {"guidance_scale": [4.0, 2.5], "boundary_ratio": 0.5, "enable_cfg": True, **QUICK["extra_body"]}
    video = client.videos.create(prompt="a cat", model=BASE, extra_body=more)
    request = served.jobs.get(video.id).request
    assert (request.guidance, request.boundary, request.enable_cfg) == ((4.0, 2.5), 0.5, True)


def test_a_remix_has_the_settings_of_the_old_job_and_a_new_prompt(
    served: Served, client: openai.OpenAI, tmp_path: Path
) -> None:
    first = client.videos.create_and_poll(
        prompt="a cat", input_reference=("a.png", png()), poll_interval_ms=20, extra_body={"num_frames": 9, "seed": 7}
    )
    remix = client.videos.remix(first.id, prompt="a dog")
    assert (remix.prompt, remix.remixed_from_video_id, remix.seconds) == ("a dog", first.id, first.seconds)
    assert client.videos.poll(remix.id, poll_interval_ms=20).status == "completed"
    old, new = served.jobs.get(first.id).request, served.jobs.get(remix.id).request
    assert new.to_json() == old.to_json() | {"prompt": "a dog", "image_path": new.image_path}
    client.videos.delete(first.id)
    assert new.image_path != old.image_path and Path(new.image_path).read_bytes() == png(), "a copy of its own"
    assert client.videos.retrieve(remix.id).remixed_from_video_id == first.id
    with pytest.raises(openai.NotFoundError):
        client.videos.remix(first.id, prompt="a bird")
    with pytest.raises(openai.UnprocessableEntityError, match="prompt"):
        client.videos.remix(remix.id, prompt=" ")
    with pytest.raises(openai.UnprocessableEntityError, match="seconds"):
        client.videos.remix(remix.id, prompt="a bird", extra_body={"seconds": "8"})


def test_where_a_remix_comes_from_survives_a_restart(tmp_path: Path) -> None:
    with serve(tmp_path) as served:
        first = served.submit("a cat")
        made = served.client.post(f"/v1/videos/{first}/remix", json={"prompt": "a dog"}).json()
        served.end_of(made["id"])
    with serve(tmp_path) as served:
        assert served.client.get(f"/v1/videos/{made['id']}").json()["remixed_from_video_id"] == first
    with serve(tmp_path, presets=(BASE,)) as served:
        answer = served.client.post(f"/v1/videos/{first}/remix", json={"prompt": "a bird"})
        assert answer.status_code == 422 and T2V in answer.json()["error"]["message"], "it never loads another model"


def test_a_failure_has_the_code_and_message_that_the_package_reads(tmp_path: Path) -> None:
    garage = Garage(script={"burst": Script(error=RuntimeError("x")), "held": Script(hold=threading.Event())})
    with serve(tmp_path, garage, keys=[KEY]) as served:
        with client_of(served) as client:
            video = client.videos.create_and_poll(prompt="burst", poll_interval_ms=20, **QUICK)
            assert video.status == "failed" and video.error is not None
            assert video.error.code == "RuntimeError" and "Internal error" in video.error.message
            held = client.videos.create(prompt="held", **QUICK)
            assert garage.started.wait(PATIENCE)
            assert client.videos.delete(held.id).deleted is False, "the first DELETE cancels"
            assert client.videos.poll(held.id, poll_interval_ms=20).status == "cancelled"
            with pytest.raises(openai.UnprocessableEntityError) as refused:
                client.videos.create(prompt="a cat", model="sora-2")
            assert T2V in refused.value.message and refused.value.code == "BadRequest"
        with client_of(served, "f" * 32) as stranger, pytest.raises(openai.AuthenticationError):
            stranger.videos.list()
