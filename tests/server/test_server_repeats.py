"""The same submission again with the same client id is the same job: at once, later, through every door."""

from __future__ import annotations

import base64
import io
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from fake_engine import Garage, Script
from patience import PATIENCE
from PIL import Image
from served import BASE, I2V, T2V, Served, listening, serve

GOOD = {"prompt": "a cat", "size": "64x64", "num_frames": 5, "client_id": "mine"}


def png(colour: str = "red") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (64, 64), colour).save(buffer, "PNG")
    return buffer.getvalue()


def as_form(body: dict[str, Any], **files: bytes) -> dict[str, Any]:
    texts = {name: (None, str(value)) for name, value in body.items()}
    return {"files": {**texts, **{name: (f"{name}.png", data) for name, data in files.items()}}}


def answer_of(served: Served, **how: Any) -> httpx.Response:
    return served.client.post("/v1/videos", **how)


@pytest.mark.slow
@pytest.mark.parametrize("more", [{}, {"seed": 7}, {"seed": -1}, {"input_reference": "png"}], ids=str)
def test_twenty_at_once_all_get_the_one_job(tmp_path: Path, more: dict[str, Any]) -> None:
    """In a queue with room for one: nobody hears that it is full."""
    if "input_reference" in more:
        more = {"input_reference": base64.b64encode(png()).decode()}
    garage = Garage(script={"held": Script(hold=threading.Event())})
    with serve(tmp_path, garage, presets=(T2V, I2V), max_queue=1) as served, listening(served) as client:
        served.submit("held")
        assert garage.started.wait(PATIENCE)
        together = threading.Barrier(20)

        def post(_: int) -> httpx.Response:
            together.wait(PATIENCE)
            return client.post("/v1/videos", json=GOOD | more)

        with ThreadPoolExecutor(20) as pool:
            answers = list(pool.map(post, range(20)))
        assert {answer.status_code for answer in answers} == {200}, {answer.text for answer in answers}
        assert len({answer.json()["id"] for answer in answers}) == len({a.json()["seed"] for a in answers}) == 1
        assert len(served.jobs.list()) == 2
        job = served.jobs.find("mine", owner="api")
        assert {file.name.partition(".")[0] for file in tmp_path.glob("*.image-*")} <= {job.id}, "no copy stays behind"


@pytest.mark.slow
def test_a_form_and_json_of_the_same_content_are_the_same_through_both_families_of_routes(tmp_path: Path) -> None:
    with serve(tmp_path, presets=(BASE, I2V)) as served:
        settings = {"guidance_scale": 4, "fps": 16}
        first = answer_of(served, json=GOOD | settings).json()["id"]
        assert answer_of(served, **as_form(GOOD | {"guidance_scale": "4.0", "fps": "16.0"})).json()["id"] == first
        same = {"prompt": "a cat", "width": 64, "height": 64, "num_frames": 5, "client_id": "mine", "seed": -1}
        assert answer_of(served, json=same | settings).json()["id"] == first
        task = {"prompt": "a cat", "target_shape": [64, 64], "target_video_length": 5, "task_id": "mine"}
        task |= {"sample_guide_scale": [4, 4], "target_fps": 16}
        assert served.client.post("/v1/tasks/video/", json=task).status_code == 200
        assert len(served.jobs.list()) == 1

        picture = GOOD | {"client_id": "with a picture"}
        url = "data:image/png;base64," + base64.b64encode(png()).decode()
        ids = {
            answer_of(served, **as_form(picture, input_reference=png())).json()["id"],
            answer_of(served, json=picture | {"input_reference": url}).json()["id"],
            answer_of(served, json=picture | {"input_reference": {"image_url": url}}).json()["id"],
            answer_of(served, **as_form(picture | {"input_reference[image_url]": url})).json()["id"],
        }
        assert len(ids) == 1


@pytest.mark.slow
def test_a_repeat_after_a_restart_is_the_same_job_whatever_became_of_it(tmp_path: Path) -> None:
    picture = GOOD | {"client_id": "picture"}
    with serve(tmp_path, presets=(T2V, I2V)) as served:
        first = answer_of(served, json=GOOD).json()
        second = answer_of(served, **as_form(picture, input_reference=png())).json()
        served.end_of(first["id"])
    with serve(tmp_path, presets=(T2V, I2V)) as served:
        again = answer_of(served, json=GOOD).json()
        assert (again["id"], again["seed"], again["status"]) == (first["id"], first["seed"], "completed")
        assert answer_of(served, **as_form(picture, input_reference=png())).json()["id"] == second["id"]
        assert answer_of(served, json=GOOD | {"prompt": "a dog"}).status_code == 422
        assert answer_of(served, **as_form(picture, input_reference=png("blue"))).status_code == 422


@pytest.mark.slow
@pytest.mark.parametrize(
    "change",
    [{"prompt": "a dog"}, {"negative_prompt": "rain"}, {"num_frames": 9}, {"fps": 8}, {"seed": 1}, {"model": I2V}],
    ids=str,
)
def test_different_content_with_the_same_id_is_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    with serve(tmp_path, presets=(T2V, I2V)) as served:
        first = answer_of(served, json=GOOD).json()["id"]
        refused = answer_of(served, json=GOOD | change)
        assert refused.status_code == 422, refused.text
        assert change.get("model") or "another job" in refused.json()["error"]["message"]
        assert [job.id for job in served.jobs.list()] == [first]


@pytest.mark.slow
def test_another_picture_with_the_same_id_is_refused(tmp_path: Path) -> None:
    with serve(tmp_path, presets=(I2V,)) as served:
        pictures = {"input_reference": png(), "last_frame_reference": png("blue")}
        assert answer_of(served, **as_form(GOOD, **pictures)).status_code == 200
        assert answer_of(served, **as_form(GOOD, **pictures)).status_code == 200
        for change in ({"input_reference": png("green")}, {"last_frame_reference": png()}):
            assert answer_of(served, **as_form(GOOD, **pictures | change)).status_code == 422, change
        assert answer_of(served, **as_form(GOOD, input_reference=png())).status_code == 422, "without the last frame"
        assert len(served.jobs.list()) == 1


@pytest.mark.slow
def test_without_a_seed_two_jobs_have_two_and_a_queued_one_knows_its_own(tmp_path: Path) -> None:
    garage = Garage(script={"held": Script(hold=threading.Event())})
    with serve(tmp_path, garage) as served:
        served.submit("held")
        seeds = [served.client.get(f"/v1/videos/{served.submit(f'number {n}')}").json()["seed"] for n in range(4)]
        assert len(set(seeds)) == 4 and all(0 <= seed < 2**32 for seed in seeds)
