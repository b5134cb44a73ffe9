"""A page over several workers: the header, several running jobs of one visitor, and jobs that no worker can run."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_replica import FakeReplica
from job_runs import ask, hold
from page_engine import Painter
from patience import PATIENCE, eventually
from PIL import Image

from app.backend.offer import settings_of
from app.backend.session import Session
from app.backend.studio import Studio
from app.exposure import Exposure
from app.strings import Words
from app.views import cards, panels, stage
from app.views.view_state import build_view
from lightx2v.jobs.queue import JobManager

PRESET = "demo_t2v_distill_lora"


def chips(studio: Studio, language: str = "en") -> list[str]:
    """The texts of the header's chips."""
    loaded = studio.jobs.loaded
    html = panels.header(
        Words(language), studio.machine(), loaded.preset if loaded else "", studio.exposure, alive=studio.jobs.alive,
        workers=studio.workers,
    )  # fmt: skip
    return [re.sub("<[^>]*>", "", chip) for chip in re.findall(r'<span class="chip">(.*?)</span>', html)]


@pytest.fixture
def open_studio(tmp_path: Path) -> Iterator[Callable[..., Studio]]:
    """Makes a page's Studio on tmp_path and closes it after the test."""
    opened: list[Studio] = []

    def make(open_engine: Any = None, **exposure: Any) -> Studio:
        opened.append(Studio(open_engine, tmp_path, Exposure(**exposure), default_preset=PRESET))
        return opened[-1]

    yield make
    for studio in opened:
        studio.close()


@pytest.fixture
def studio(open_studio: Callable[..., Studio]) -> Studio:
    return open_studio(Painter())


def test_one_worker_in_this_process_shows_its_model_as_before(studio: Studio) -> None:
    assert studio.workers is None and chips(studio)[2:] == ["No model loaded"]


def test_each_of_several_workers_shows_what_it_has_loaded_and_does(studio: Studio) -> None:
    first, second = FakeReplica("node1/gpu-0"), FakeReplica("node2/gpu-0<b>")
    for replica in (first, second):
        studio.jobs.add_replica(replica)  # type: ignore[union-attr]
    studio.jobs.drain("this machine")  # type: ignore[union-attr]
    studio.jobs.drain(second.name)  # type: ignore[union-attr]
    event = hold(first.garage, "held", at=("denoise", 3))
    config = settings_of(PRESET).engine
    request = ask("held", **{**settings_of(PRESET).request, "frames": 5, "seed": 1})
    job = studio.submit(config, request, owner="o" * 40, preset=PRESET)
    assert first.garage.started.wait(PATIENCE)
    words = Words("en")
    shown = chips(studio)[2:]
    assert shown[0] == "1 of 3 workers busy"
    model = re.escape(words.preset(PRESET))
    assert re.fullmatch(rf"node1/gpu-0: {model} · \d\d.% · 5.0.GiB of 8.0.GiB free", shown[1])
    assert shown[2].startswith("node2/gpu-0&lt;b&gt;: No model loaded · out of service")
    assert chips(studio, "zh")[2] == "3 个工作进程中有 1 个忙碌"
    event.set()
    studio.jobs.wait(job.id, PATIENCE)  # type: ignore[union-attr]
    eventually(lambda: chips(studio)[2] == "0 of 3 workers busy")
    prediction = studio.predict(config, request)
    assert prediction is not None and "load" not in prediction.stages, "one of the workers has it"


def test_other_people_see_how_many_workers_there_are_and_nothing_else(open_studio: Callable[..., Studio]) -> None:
    studio = open_studio(Painter(), open_to_others=True, password="x")
    studio.jobs.add_replica(FakeReplica("node1/gpu-0"))  # type: ignore[union-attr]
    assert chips(studio)[2:] == ["0 of 2 workers busy"]


def test_two_running_jobs_of_one_visitor_are_followed_listed_and_previewed_each(
    open_studio: Callable[..., Studio],
) -> None:
    studio = open_studio()
    jobs, words, session = studio.jobs, Words("en"), Session.of(None)
    assert isinstance(jobs, JobManager)
    jobs.more_may_come = True
    device = studio.machine().name
    first, second = (FakeReplica(f"gpu-{number}", device=device) for number in range(2))
    events = {}
    for name, shade in (("a", 40), ("b", 200)):
        picture = np.full((8, 8, 3), shade, np.uint8)
        events[name] = hold(first.garage, name, at=("denoise", 3), preview=lambda picture=picture: picture)
    second.garage.script = first.garage.script
    config = settings_of(PRESET).engine
    quick_to_load = {"load": 0.01, "denoise": 60.0}
    studio.learn(config, ask("x", **{**settings_of(PRESET).request, "frames": 5}), quick_to_load)
    submitted = []
    for number, (name, replica) in enumerate(zip("ab", (first, second), strict=True)):
        request = ask(name, **{**settings_of(PRESET).request, "frames": 5, "seed": number})
        submitted.append(studio.submit(config, request, owner=session.owner, preset=PRESET))
        jobs.add_replica(replica)
        assert replica.garage.started.wait(PATIENCE)
    a, b = submitted

    def shades() -> list[int]:
        previews = [studio.preview_of(job.id) for job in (a, b)]
        return [round(np.asarray(Image.open(io.BytesIO(p))).mean()) for p in previews if isinstance(p, bytes)]

    eventually(lambda: len(shades()) == 2)
    assert shades() == [40, 200], "each job has its own preview"
    view = build_view(studio, session)
    assert view.session.job == a.id and build_view(studio, replace(session, job=b.id)).session.job == b.id
    listed = cards.queue(words, view.runs, "")
    assert listed.count("<li") == 2 and "2 running" in listed and listed.index(a.id) < listed.index(b.id)
    assert listed.count('data-act="show"') == 2 and listed.count('data-act="stop"') == 2
    events["a"].set()
    jobs.wait(a.id, PATIENCE)
    assert build_view(studio, replace(session, job=a.id)).session.job == b.id, "the stage goes on to the other one"
    assert cards.queue(words, build_view(studio, session).runs, "") == "", "the stage shows the only one"
    events["b"].set()


def test_a_job_that_waits_for_a_machine_says_why(open_studio: Callable[..., Studio]) -> None:
    studio = open_studio()
    config = settings_of(PRESET).engine
    studio.jobs.more_may_come = True  # type: ignore[union-attr]
    studio.jobs.add_replica(FakeReplica("gpu-0", refuses={config.model_path: "It has 8 GB <b>."}))  # type: ignore[union-attr]
    request = ask("x", **{**settings_of(PRESET).request, "frames": 5, "seed": 1})
    job = studio.submit(config, request, owner="o" * 40, preset=PRESET)
    eventually(lambda: studio.jobs.get(job.id).note)
    html = stage.status(Words("en"), studio.jobs.get(job.id))
    assert "Waiting for another worker" in html and "gpu-0: It has 8 GB &lt;b&gt;." in html
