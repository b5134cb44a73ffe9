"""The public endpoints of a launched page, as programs use them.

Covered: errors leak neither paths nor tracebacks; unknown and foreign ids get the same refusal; a job survives the
program that submitted it, until it is cancelled; a failed run does not affect the next one.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from gradio_client import Client, handle_file
from patience import PATIENCE, eventually
from PIL import Image
from studio_app import LEAKS, PRESET, Page, Refused

pytestmark = pytest.mark.multi


def test_there_are_four_named_endpoints_and_no_others(page: Page) -> None:
    info = page.http.get("/gradio_api/info").json()
    assert set(info["named_endpoints"]) == {"/generate", "/status", "/cancel", "/presets"}
    assert not info["unnamed_endpoints"]
    assert set(info["named_endpoints"]["/generate"]["parameters"][0]) >= {"parameter_name", "type"}


def test_presets_have_names_tasks_and_settings(page: Page) -> None:
    presets = page.ask("presets")
    assert [preset["name"] for preset in presets if preset["default"]] == [PRESET]
    chosen = next(preset for preset in presets if preset["name"] == PRESET)
    assert chosen["task"] == "t2v" and chosen["settings"]["denoising_step_list"] == [1000, 750, 500, 250]


def test_a_program_makes_a_video(page: Page) -> None:
    done = page.make("a red ball", seed=11, settings={"frames": 9, "sampler": "lcm"})
    assert (done["report"]["seed"], done["report"]["frames"]) == (11, 9)
    assert next(e["request"]["sampler"] for e in page.painted if e.get("prompt") == "a red ball") == "lcm"
    assert done["report"]["timings"]["total"] > 0 and not LEAKS.search(str(done))
    video = page.http.get(f"/{done['video']}")
    assert video.headers["content-type"] == "video/mp4" and video.content[4:8] == b"ftyp"
    part = page.http.get(f"/{done['video']}", headers={"Range": "bytes=0-9"})
    assert part.status_code == 206 and len(part.content) == 10, "a player seeks"


@pytest.mark.slow
def test_gradios_own_client_sends_a_picture_and_gets_a_video(page: Page, tmp_path: Path) -> None:
    Image.fromarray(np.full((64, 96, 3), 90, np.uint8)).save(tmp_path / "in.png")
    client = Client(page.url, verbose=False, analytics_enabled=False)
    try:
        image = handle_file(tmp_path / "in.png")
        job = client.predict("a client's ball", "demo_i2v_distill_lora", image, api_name="/generate")
        assert page.wait(job["id"])["state"] == "succeeded"
    finally:
        client.close()
    request = next(e["request"] for e in page.painted if e.get("prompt") == "a client's ball")
    assert request["task"] == "i2v" and request["image_path"]


@pytest.mark.slow
def test_a_program_stops_a_run_and_the_next_one_starts(page: Page) -> None:
    slow, after = (page.ask("generate", prompt=prompt)["id"] for prompt in ("an endless ball", "the one behind it"))
    page.wait(slow, "running")
    assert page.ask("cancel", id=slow)["state"] in ("running", "cancelled")
    assert page.wait(slow)["state"] == "cancelled"
    assert page.wait(after)["state"] == "succeeded"
    assert not list(page.folder.glob(f"{slow}*")), "nothing of it is left"
    assert page.ask("cancel", id=slow)["state"] == "cancelled", "again changes nothing"


@pytest.mark.slow
def test_progress_names_stage_step_and_expert(page: Page) -> None:
    prompt = "a star held in mid-run"
    job = page.ask("generate", prompt=prompt)["id"]
    seen = eventually(lambda: (s := page.ask("status", id=job)["progress"]) and s["stage"] == "denoise" and s)
    assert (seen["step"], seen["total"], seen["expert"]) == (1, 4, "high") and seen["seconds"] > 0
    page.let_go(prompt)
    assert page.wait(job)["state"] == "succeeded"


@pytest.mark.slow
def test_a_program_that_goes_away_leaves_its_job_running(page: Page) -> None:
    """The id is all that a program needs to find its job again."""
    with httpx.Client(base_url=page.url, timeout=PATIENCE) as session:
        job = page.ask("generate", session=session, prompt="a slow ball of nobody", settings={"frames": 5})["id"]
    page.wait(job, "running", "succeeded")
    assert page.wait(job)["state"] == "succeeded"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"prompt": ""}, "prompt"),
        ({"prompt": "&nbsp;\u200b"}, "prompt"),
        ({"prompt": "x", "preset": "../../etc/passwd"}, "no preset"),
        ({"prompt": "x", "settings": {"height": 33}}, "multiple of 16"),
        ({"prompt": "x", "settings": {"model_path": "/etc"}}, "settings has no 'model_path'"),
        ({"prompt": "x", "settings": {"loras": [{"path": "/etc/shadow"}]}}, "settings has no 'loras'"),
        ({"prompt": "x", "settings": {"frames": 10**9}}, "frames"),
        ({"prompt": "x", "preset": "demo_i2v_base"}, "image"),
        ({"prompt": "x", "preset": "demo_i2v_base", "image": {"path": "/etc/passwd"}}, "not an uploaded file"),
        ({"prompt": "x", "preset": "demo_i2v_base", "image": {"path": "../../etc/passwd"}}, "not an uploaded file"),
    ],
)
def test_a_bad_request_returns_its_error_and_nothing_else(page: Page, arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(Refused) as caught:
        page.ask("generate", **arguments)
    assert said in str(caught.value)
    assert not LEAKS.search(str(caught.value))


@pytest.mark.parametrize("arguments", [{}, {"prompt": 5}, {"prompt": ["x"]}, {"prompt": {"path": "/etc/passwd"}}])
def test_arguments_of_another_type_are_refused_without_a_traceback(page: Page, arguments: dict[str, Any]) -> None:
    answer = page.http.post("/gradio_api/call/v2/generate", json=arguments)
    text = answer.text
    if answer.status_code == 200:
        text = page.http.get(f"/gradio_api/call/generate/{answer.json()['event_id']}").text
        assert "event: error" in text
    assert not LEAKS.search(text), text


@pytest.mark.parametrize("id", ["x", "0" * 32, "../jobs", "%00", "' OR 1=1 --"])
def test_an_unknown_job_is_unknown(page: Page, id: str) -> None:
    for endpoint in ("status", "cancel"):
        with pytest.raises(Refused, match="no job"):
            page.ask(endpoint, id=id)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("prompt", "type", "said"), [("broken", "RuntimeError", ""), ("too large", "OutOfMemory", "smaller size")]
)
def test_a_run_that_fails_says_what_to_do_and_the_next_one_succeeds(
    page: Page, prompt: str, type: str, said: str
) -> None:
    failed = page.wait(page.ask("generate", prompt=prompt)["id"])
    assert failed["state"] == "failed" and failed["error"]["type"] == type and said in failed["error"]["message"]
    assert not LEAKS.search(str(failed)) and "secret" not in str(failed), "details go to the log only"
    page.make(prompt if prompt == "too large" else "whole", settings={"height": 64, "width": 64, "frames": 5})


def test_internal_errors_are_in_the_log(page: Page) -> None:
    page.wait(page.ask("generate", prompt="broken again")["id"])
    assert "secret detail" in page.said
