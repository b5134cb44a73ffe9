"""/v1/videos: images in every form, settings, ranges, lists, and the privacy of jobs."""

from __future__ import annotations

import base64
import contextlib
import io
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from bad_http import BadHTTP, Plan
from fake_engine import Garage, Script
from patience import PATIENCE
from PIL import Image, UnidentifiedImageError
from served import BASE, I2V, SIZE, T2V, Served, listening, serve

from lightx2v.media.images import load_image
from lightx2v.media.web_images import ImageFetcher

KEYS = ("alice-has-a-key", "bob-has-another")


def png(colour: str = "red") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (64, 64), colour).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    with serve(tmp_path, presets=(T2V, I2V, BASE)) as served:
        yield served


@pytest.mark.slow
def test_a_video_from_form_to_file(served: Served) -> None:
    answer = served.client.post(
        "/v1/videos", files={"prompt": (None, "a cat"), "size": (None, "64x96"), "seed": (None, "5")}
    )
    assert answer.status_code == 200, answer.text
    video = served.end_of(answer.json()["id"])
    assert (video["status"], video["progress"], video["size"], video["seed"]) == ("completed", 100, "64x96", 5)
    assert video["model"] == T2V and video["error"] is None
    content = served.client.get(f"/v1/videos/{video['id']}/content")
    assert content.headers["content-type"] == "video/mp4" and content.content[4:8] == b"ftyp"


@pytest.mark.slow
def test_settings_in_this_familys_words(served: Served) -> None:
    body = {
        "num_inference_steps": 3,
        "seconds": 1.0,
        "fps": 8,
        "guidance_scale": 4,
        "guidance_scale_2": 2,
        "flow_shift": 3,
        "sampler": "lcm",
    }
    id = served.submit(size="96x64", model=BASE, boundary_ratio=0.5, num_frames=None, **body)
    request = served.jobs.get(id).request
    assert (request.width, request.height, request.frames, request.fps) == (96, 64, 9, 8.0)
    assert (request.steps, request.guidance, request.shift, request.boundary) == (3, (4.0, 2.0), 3.0, 0.5)
    assert request.sampler == "lcm"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("body", "word"),
    [
        ({"num_frames": 18}, "num_frames is 18"),
        ({"model": BASE, "num_inference_steps": 0}, "num_inference_steps is 0"),
        ({"flow_shift": 0}, "flow_shift is 0"),
        ({"model": BASE, "guidance_scale": -1000}, "guidance_scale is -1000"),
        ({"model": BASE, "boundary_ratio": 2}, "boundary_ratio is 2"),
        ({"sampler": "dpm"}, "sampler is 'dpm'; expected null, unipc, euler or lcm"),
        ({"prompt": "&nbsp;\u200b"}, "prompt is '&nbsp;\\u200b'; expected a description of the video"),
    ],
)
def test_errors_use_the_clients_words(served: Served, body: dict, word: str) -> None:
    answer = served.client.post("/v1/videos", json={"prompt": "a cat", **body})
    assert answer.status_code == 422 and answer.json()["error"]["message"].startswith(word)


@pytest.mark.slow
def test_seconds_are_those_of_the_preset_that_the_picture_chose(served: Served) -> None:
    """As text, too: so OpenAI's clients send them."""
    slow = served.service.presets[I2V]
    served.service.presets[I2V] = replace(slow, request=slow.request | {"fps": 8.0})
    shown = "data:image/png;base64," + base64.b64encode(png()).decode()
    for seconds in (1.1, "1.1"):
        body = {"prompt": "a cat", "seconds": seconds, "size": "64x64"}
        with_picture = served.client.post("/v1/videos", json=body | {"input_reference": shown}).json()
        without = served.client.post("/v1/videos", json=body).json()
        assert (with_picture["num_frames"], without["num_frames"]) == (9, 17)


@pytest.mark.slow
def test_a_picture_chooses_a_preset_that_takes_one(served: Served) -> None:
    url = "data:image/png;base64," + base64.b64encode(png()).decode()
    for given in (url, base64.b64encode(png() * 2).decode()):
        id = served.submit(input_reference=given)
        job = served.jobs.get(id)
        assert job.preset == I2V and job.request.task == "i2v"
        assert load_image(job.request.image_path).size == (64, 64)
    assert served.jobs.get(served.submit()).preset == T2V


@pytest.mark.slow
def test_pictures_as_uploads_one_for_the_start_and_one_for_the_end(served: Served) -> None:
    files = {"input_reference": ("a.png", png()), "last_frame_reference": ("a.png", png("blue"))}
    answer = served.client.post("/v1/videos", files={"prompt": (None, "a cat"), "size": (None, "64x64"), **files})
    request = served.jobs.get(answer.json()["id"]).request
    assert request.task == "flf2v"
    assert Path(request.image_path).read_bytes() == png() and Path(request.last_frame_path).read_bytes() == png("blue")


@pytest.mark.slow
def test_a_picture_by_its_address(tmp_path: Path) -> None:
    with BadHTTP({"/cat.png": Plan(body=png(), headers={"Content-Type": "image/png"})}) as web:
        fetcher = ImageFetcher(is_allowed=lambda address: True, seconds=PATIENCE)
        with serve(tmp_path, presets=(I2V,), fetcher=fetcher) as served:
            id = served.submit(input_reference=web.url("/cat.png"))
            assert Path(served.jobs.get(id).request.image_path).read_bytes() == png()


@pytest.mark.slow
def test_the_servers_own_files_are_read_from_the_input_folder_only(tmp_path: Path) -> None:
    folder = tmp_path / "inputs"
    folder.mkdir()
    (folder / "cat.png").write_bytes(png())
    (tmp_path / "secret.png").write_bytes(png())
    (folder / "link.png").symlink_to(tmp_path / "secret.png")
    with serve(tmp_path / "out", presets=(I2V,), input_dir=folder) as served:
        assert served.submit(input_reference="cat.png") and served.submit(input_reference=str(folder / "cat.png"))
        for path in ("../secret.png", str(tmp_path / "secret.png"), "link.png", "a\0b", "x" * 5000, "/dev/zero"):
            answer = served.client.post("/v1/videos", json={"prompt": "a cat", **SIZE, "input_reference": path})
            assert answer.status_code == 422, path
    with serve(tmp_path / "other", presets=(I2V,)) as served:
        answer = served.client.post("/v1/videos", json={"prompt": "a cat", **SIZE, "input_reference": "cat.png"})
        assert answer.status_code == 422 and "--input_dir" in answer.json()["error"]["message"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "given",
    [
        "data:image/png;base64,!!!!",
        "data:text/html;base64,AAAA",
        "data:image/png;base64",
        base64.b64encode(b"not a picture" * 10).decode(),
        "file:///etc/passwd",
        "ftp://example.org/a.png",
        "http://127.0.0.1:1/a.png",
    ],
)
def test_what_is_no_picture_is_refused_before_a_job_exists(served: Served, given: str) -> None:
    answer = served.client.post("/v1/videos", json={"prompt": "a cat", **SIZE, "input_reference": given})
    assert answer.status_code == 422, answer.text
    assert not served.jobs.list()


@pytest.mark.slow
def test_loras_come_from_the_servers_folder_and_add_to_the_presets(tmp_path: Path) -> None:
    folder = tmp_path / "loras"
    folder.mkdir()
    (folder / "style.safetensors").write_bytes(b"x")
    (tmp_path / "secret.safetensors").write_bytes(b"x")
    (folder / "link.safetensors").symlink_to(tmp_path / "secret.safetensors")
    names = ("../style.safetensors", "../secret.safetensors", "other.safetensors", "link.safetensors", "..", "")
    with serve(tmp_path / "out", lora_dir=folder) as served:
        id = served.submit(loras=[{"path": "style.safetensors", "name": "low_noise_model", "strength": 0.5}])
        job = served.jobs.get(id)
        assert job.request.loras[:-1] == job.config.lora_configs
        added = job.request.loras[-1]
        assert (added.expert, Path(added.path).name, added.strength) == ("low", "style.safetensors", 0.5)
        assert served.jobs.get(served.submit("again")).request.loras is None
        for path in (*names, str(folder / "style.safetensors"), "style.safetensors\0", "./style.safetensors"):
            body = {"prompt": "a cat", **SIZE, "loras": [{"path": path}]}
            assert served.client.post("/v1/videos", json=body).status_code == 422, path


@pytest.mark.slow
def test_ranges(served: Served) -> None:
    id = served.submit()
    served.end_of(id)
    whole = served.client.get(f"/v1/videos/{id}/content").content
    for wanted, part in (("bytes=2-5", whole[2:6]), ("bytes=-4", whole[-4:]), ("bytes=10-", whole[10:])):
        answer = served.client.get(f"/v1/videos/{id}/content", headers={"Range": wanted})
        assert answer.status_code == 206 and answer.content == part
    assert served.client.get(f"/v1/videos/{id}/content", headers={"Range": "bytes=999999-"}).status_code == 416


@pytest.mark.slow
def test_head_has_the_headers_of_get_and_no_body_wherever_a_file_is_served(served: Served) -> None:
    """As players, download managers and link previews ask first."""
    id = served.submit(file_name="cat.mp4")
    served.end_of(id)
    paths = [f"/v1/videos/{id}/content", f"/v1/tasks/{id}/result", "/v1/files/download/cat.mp4"]
    paths += [f"/v1/videos/{id}/content?variant={variant}" for variant in ("video", "thumbnail", "spritesheet")]
    with listening(served) as client:
        for path in paths:
            for headers in ({}, {"Range": "bytes=2-5"}, {"Range": "bytes=999999-"}):
                head, get = (client.request(method, path, headers=headers) for method in ("HEAD", "GET"))
                assert head.status_code == get.status_code in (200, 206, 416) and not head.content
                for name in ("content-length", "content-type", "accept-ranges", "etag", "content-disposition"):
                    assert head.headers.get(name) == get.headers.get(name), (path, name)
                assert int(head.headers["content-length"]) == len(get.content)
        for path in (f"/v1/videos/{'0' * 32}/content", f"/v1/videos/{id}/content?variant=x", "/v1/tasks/no/result"):
            head, get = (client.request(method, path) for method in ("HEAD", "GET"))
            assert head.status_code == get.status_code in (404, 422) and not head.content


@pytest.mark.slow
def test_head_of_every_answer_in_json_or_text_is_that_of_get_without_a_body(served: Served) -> None:
    id = served.submit()
    served.end_of(id)
    paths = ["/v1/videos", f"/v1/videos/{id}", "/v1/models", "/v1/loras", f"/v1/tasks/{id}/status", "/health", "/ready"]
    paths += ["/metrics", "/v1/service/status", f"/v1/videos/{'0' * 32}", "/v1/videos?limit=0", "/absent"]
    with listening(served) as client:
        for path in paths:
            head, get = (client.request(method, path) for method in ("HEAD", "GET"))
            assert (head.status_code, head.content) == (get.status_code, b""), path
            assert head.headers["content-type"] == get.headers["content-type"]
    document = served.client.get("/openapi.json").json()
    assert not [path for path, methods in document["paths"].items() if "head" in methods]


@pytest.mark.slow
def test_a_query_parameter_is_given_once(served: Served) -> None:
    id = served.submit()
    served.end_of(id)
    for path in (f"/v1/videos/{id}/content?variant=thumbnail&variant=video", "/v1/videos?limit=2&limit=3",
                 "/v1/videos?order=asc&after=&order=asc", "/v1/models?x=1&x=1"):  # fmt: skip
        answer = served.client.get(path)
        assert answer.status_code == 422 and "is given 2 times; expected once" in answer.json()["error"]["message"]
    assert served.client.get("/v1/videos?limit=2&order=asc").status_code == 200


@pytest.mark.slow
def test_a_variant_is_what_it_says_and_named_after_the_video(served: Served) -> None:
    id = served.submit(file_name="cat.mp4")
    path = f"/v1/videos/{id}/content"
    served.end_of(id)
    for variant, kind in (("video", "video/mp4"), ("thumbnail", "image/jpeg"), ("spritesheet", "image/jpeg")):
        answer = served.client.get(path, params={"variant": variant})
        assert answer.status_code == 200 and answer.headers["content-type"] == kind
        name = "cat.mp4" if variant == "video" else f"cat.{variant}.jpg"
        assert f'filename="{name}"' in answer.headers["content-disposition"]
        with contextlib.suppress(UnidentifiedImageError):
            assert (Image.open(io.BytesIO(answer.content)).format == "JPEG") == (variant != "video")
    for wrong in ("nonsense", "", "THUMBNAIL", "video,thumbnail", "x" * 5000):
        answer = served.client.get(path, params={"variant": wrong})
        message = answer.json()["error"]["message"]
        assert answer.status_code == 422 and "expected one of video, original, thumbnail, spritesheet" in message
        assert message.startswith("variant is '") and len(message) < 300
    waiting = served.client.get(f"/v1/videos/{'0' * 32}/content", params={"variant": "thumbnail"})
    assert waiting.status_code == 404


@pytest.mark.slow
def test_lists_are_in_pages_the_newest_first(served: Served) -> None:
    ids = [served.submit(f"number {n}") for n in range(5)]
    first = served.client.get("/v1/videos?limit=2").json()
    assert [video["id"] for video in first["data"]] == ids[:2:-1] and first["has_more"]
    rest = served.client.get(f"/v1/videos?limit=10&after={first['last_id']}").json()
    assert [video["id"] for video in rest["data"]] == ids[2::-1] and not rest["has_more"]
    assert served.client.get("/v1/videos?after=").json()["data"][0]["id"] == ids[-1]
    unknown = served.client.get("/v1/videos?after=nothing")
    assert unknown.status_code == 404 and "no job 'nothing'" in unknown.json()["error"]["message"]


@pytest.mark.slow
def test_delete_cancels_what_runs_and_removes_what_is_over(tmp_path: Path) -> None:
    garage = Garage(script={"hold": Script(hold=threading.Event())})
    with serve(tmp_path, garage) as served:
        id = served.submit("hold")
        assert garage.started.wait(PATIENCE)
        first = served.client.delete(f"/v1/videos/{id}").json()
        assert first["deleted"] is False
        assert served.end_of(id)["status"] == "cancelled"
        assert served.client.delete(f"/v1/videos/{id}").json()["deleted"] is True
        assert served.client.get(f"/v1/videos/{id}").status_code == 404
        done = served.submit(file_name="cat")
        served.end_of(done)
        assert len(list(tmp_path.glob(f"{done}.*"))) == 2
        served.client.delete(f"/v1/videos/{done}")
        assert not list(tmp_path.glob(f"{done}.*"))


@pytest.mark.slow
def test_jobs_belong_to_the_key_that_sent_them(tmp_path: Path) -> None:
    with serve(tmp_path, keys=KEYS) as served:
        alice, bob = ({"Authorization": f"Bearer {key}"} for key in KEYS)
        body = {"prompt": "a secret", **SIZE, "client_id": "same", "file_name": "same.mp4"}
        one, two = (served.client.post("/v1/videos", json=body, headers=who).json()["id"] for who in (alice, bob))
        assert one != two
        served.jobs.wait(one, PATIENCE)
        for path in (
            f"/v1/videos/{one}",
            f"/v1/videos/{one}/content",
            f"/v1/videos/{one}/events",
            f"/v1/tasks/{one}/status",
        ):
            assert served.client.get(path, headers=alice).status_code == 200
            assert served.client.get(path, headers=bob).status_code == 404
        for method, path in (
            ("DELETE", f"/v1/videos/{one}"),
            ("POST", f"/v1/videos/{one}/requeue"),
            ("DELETE", f"/v1/tasks/{one}"),
        ):
            assert served.client.request(method, path, headers=bob).status_code == 404
        for path in ("/v1/videos", "/v1/tasks/", "/v1/service/status"):
            assert one not in served.client.get(path, headers=bob).text
        assert served.client.get("/v1/videos/same", headers=alice).json()["id"] == one
        assert served.client.get("/v1/videos/same", headers=bob).json()["id"] == two


def test_models_are_the_presets(served: Served) -> None:
    assert [model["id"] for model in served.client.get("/v1/models").json()["data"]] == [T2V, I2V, BASE]
    answer = served.client.post("/v1/videos", json={"prompt": "a cat", "model": "gpt"})
    assert answer.status_code == 422 and T2V in answer.json()["error"]["message"]


def test_the_video_without_interpolation_is_served_where_it_was_kept(served: Served) -> None:
    id = served.submit("a cat", file_name="cat.mp4", interpolated_fps=32, keep_original=True)
    job = served.end_of(id)
    assert (job["fps"], job["num_frames"], job["seconds"]) == (32.0, 10, "0.3125")
    missing = served.client.get(f"/v1/videos/{id}/content", params={"variant": "original"})
    assert missing.status_code == 404 and "Send keep_original" in missing.json()["error"]["message"]
    (served.jobs.folder / f"{id}.original.mp4").write_bytes(b"original")
    answer = served.client.get(f"/v1/videos/{id}/content", params={"variant": "original"})
    assert answer.content == b"original" and "cat.original.mp4" in answer.headers["content-disposition"]
    assert served.client.delete(f"/v1/videos/{id}").json()["deleted"]
    assert not (served.jobs.folder / f"{id}.original.mp4").exists()
