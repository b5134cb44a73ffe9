"""The header over several workers: what each does for the owner of the page, how many there are for others."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from fake_replica import FakeReplica
from job_runs import ask, hold
from page_engine import Painter
from patience import PATIENCE, eventually

from app.backend.offer import settings_of
from app.backend.studio import Studio
from app.exposure import Exposure
from app.strings import Words
from app.views import panels

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
def studio(tmp_path: Path) -> Studio:
    return Studio(Painter(), tmp_path, Exposure(), default_preset=PRESET)


def test_one_worker_in_this_process_shows_its_model_as_before(studio: Studio) -> None:
    assert studio.workers is None and chips(studio)[2:] == ["No model loaded"]
    studio.close()


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
    studio.close()


def test_other_people_see_how_many_workers_there_are_and_nothing_else(tmp_path: Path) -> None:
    studio = Studio(Painter(), tmp_path, Exposure(open_to_others=True, password="x"), default_preset=PRESET)
    studio.jobs.add_replica(FakeReplica("node1/gpu-0"))  # type: ignore[union-attr]
    assert chips(studio)[2:] == ["0 of 2 workers busy"]
    studio.close()
