"""The task routes speak LightX2V: its clients, and the tutorial's, work unchanged."""

from __future__ import annotations

import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from fake_engine import Garage, Script
from patience import PATIENCE
from served import BASE, Served, listening, serve

from lightx2v.config.request import DEFAULT_NEGATIVE_PROMPT


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    with serve(tmp_path, presets=(BASE,)) as served:
        yield served


def create(served: Served, **body: object) -> str:
    answer = served.client.post("/v1/tasks/video/", json={"prompt": "a cat", **body})
    assert answer.status_code == 200, answer.text
    return answer.json()["task_id"]


@pytest.mark.slow
def test_the_tutorials_post_py_works_unchanged(served: Served) -> None:
    script = (Path(__file__).parents[1] / "data" / "tutorial_post.txt").read_text(encoding="utf-8")
    with listening(served) as client:
        script = script.replace("localhost:8000", f"127.0.0.1:{client.base_url.port}")
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr
    response = done.stderr.split("response: ")[-1]
    assert "'task_status': 'pending'" in response and "'save_result_path': 'cat_boxing_seed42.mp4'" in response
    match = re.search(r"'task_id': '(\w+)'", response)
    assert match is not None
    job = served.jobs.wait(match[1], PATIENCE)
    assert job.state == "succeeded" and job.request.seed == 42 and job.request.negative_prompt.startswith("镜头晃动")
    video = served.client.get("/v1/files/download/cat_boxing_seed42.mp4")
    assert video.status_code == 200 and video.content == job.path.read_bytes()


@pytest.mark.slow
def test_a_task_goes_from_pending_to_completed_and_its_video_can_be_fetched(served: Served) -> None:
    hold = threading.Event()
    served.garage.script["a cat"] = Script(hold=hold)
    id = create(served, seed=7)
    assert served.garage.started.wait(PATIENCE)
    status = served.client.get(f"/v1/tasks/{id}/status").json()
    assert status["status"] == "processing" and status["progress"]["stage"] == "denoise" and status["end_time"] is None
    assert served.client.get(f"/v1/tasks/{id}/result").status_code == 404
    queue = served.client.get("/v1/tasks/queue/status").json()
    assert queue["is_processing"] and queue["current_task"] == id and queue["queue_available"] == 10
    service = served.client.get("/v1/service/status").json()
    assert service["service_status"] == "busy" and service["active_tasks"] == [id]
    hold.set()
    served.jobs.wait(id, PATIENCE)
    status = served.client.get(f"/v1/tasks/{id}/status").json()
    assert status["status"] == "completed" and status["error"] is None and status["end_time"] >= status["start_time"]
    assert status["save_result_path"] == f"{id}.mp4"
    answer = served.client.get(f"/v1/tasks/{id}/result", headers={"Range": "bytes=0-3"})
    assert answer.status_code == 206 and len(answer.content) == 4
    assert list(served.client.get("/v1/tasks/").json()) == [id]


@pytest.mark.slow
def test_every_setting_of_a_request_takes_effect_and_none_stays(served: Served) -> None:
    first = create(
        served,
        infer_steps=3,
        target_video_length=5,
        target_shape=[64, 96],
        target_fps=8,
        sample_shift=7.5,
        sample_guide_scale=[2.0, 1.5],
        sampler="euler",
        seed=11,
        negative_prompt="rain",
        task_id="mine",
    )
    second = create(served, prompt="a dog")
    assert first == "mine"
    a, b = served.jobs.find("mine", owner="api").request, served.jobs.get(second).request
    assert (a.steps, a.frames, a.height, a.width, a.fps, a.shift) == (3, 5, 64, 96, 8.0, 7.5)
    assert (a.guidance, a.seed, a.negative_prompt, a.sampler) == ((2.0, 1.5), 11, "rain", "euler")
    assert b.sampler is None
    assert (b.steps, b.frames, b.height, b.width, b.fps, b.shift, b.guidance) == (
        20,
        17,
        96,
        96,
        16.0,
        12.0,
        (4.0, 3.0),
    )
    assert b.negative_text == DEFAULT_NEGATIVE_PROMPT and b.seed != 11


@pytest.mark.slow
def test_without_a_seed_each_task_draws_its_own(served: Served) -> None:
    seeds = {served.jobs.get(create(served)).request.seed for _ in range(4)}
    assert len(seeds) == 4


@pytest.mark.slow
def test_a_task_id_sent_twice_is_one_task_even_without_a_seed(served: Served) -> None:
    assert create(served, task_id="twice") == create(served, task_id="twice") == "twice"
    assert len(served.jobs.list()) == 1
    other = served.client.post("/v1/tasks/video/", json={"prompt": "something else", "task_id": "twice"})
    assert other.status_code == 422 and "another job" in other.json()["error"]["message"]


@pytest.mark.slow
def test_stopping_one_and_all(tmp_path: Path) -> None:
    garage = Garage(script={"hold": Script(hold=threading.Event())})
    with serve(tmp_path, garage) as served:
        running, waiting, last = create(served, prompt="hold"), create(served), create(served)
        assert garage.started.wait(PATIENCE)
        stop = served.client.delete(f"/v1/tasks/{waiting}").json()
        assert stop["stop_status"] == "success"
        assert served.client.delete(f"/v1/tasks/{waiting}").json()["stop_status"] == "do_nothing"
        assert served.client.delete("/v1/tasks/all/running").json()["stop_status"] == "success"
        assert {served.jobs.wait(id, PATIENCE).state for id in (running, waiting, last)} == {"cancelled"}
        assert served.client.delete("/v1/tasks/all/running").json()["stop_status"] == "do_nothing"
        assert not list(tmp_path.glob("*.mp4"))


@pytest.mark.slow
@pytest.mark.parametrize("path", ["/v1/tasks/video/", "/v1/tasks/video", "/v1/tasks/", "/v1/tasks/video/form"])
def test_every_route_for_tasks_accepts_forms(served: Served, path: str) -> None:
    answer = served.client.post(path, files={"prompt": (None, "a cat"), "target_shape": (None, "[64, 64]")})
    assert answer.status_code == 200, answer.text
    assert served.jobs.get(answer.json()["task_id"]).request.width == 64


@pytest.mark.slow
@pytest.mark.parametrize(
    ("body", "word"),
    [
        ({"target_video_length": 6}, "target_video_length"),
        ({"infer_steps": 0}, "infer_steps"),
        ({"target_shape": [480]}, "target_shape"),
        ({"seed": 2**40}, "seed"),
        ({"audio_path": "song.mp3"}, "audio_path"),
        ({"num_fragments": 3}, "num_fragments"),
        ({"inferstep": 4}, "inferstep"),
        ({"lora_name": "style.safetensors"}, "--lora_dir"),
        ({"image_path": "/etc/passwd"}, "t2v"),
    ],
)
def test_errors_use_the_clients_own_words(served: Served, body: dict, word: str) -> None:
    answer = served.client.post("/v1/tasks/video/", json={"prompt": "a cat", **body})
    assert answer.status_code == 422
    assert word in answer.json()["error"]["message"]
    assert not served.jobs.list()


@pytest.mark.slow
def test_a_distilled_model_says_that_its_steps_are_fixed(tmp_path: Path) -> None:
    with serve(tmp_path) as served:
        assert create(served, infer_steps=4)
        answer = served.client.post("/v1/tasks/video/", json={"prompt": "a cat", "infer_steps": 5})
        assert answer.status_code == 422 and "4 steps" in answer.json()["error"]["message"]


def test_metadata_names_the_model_and_no_folder(served: Served) -> None:
    told = served.client.get("/v1/service/metadata").json()
    assert told["model_cls"] == "wan2.2_moe" and told["task"] == "t2v"
    assert told["model_path"] == "Wan2.2-T2V-Demo"
