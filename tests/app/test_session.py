"""A session is what a browser stored, if it is well-formed; its view follows its own runs."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from page_engine import Painter
from patience import PATIENCE, eventually

from app.backend.offer import settings_of
from app.backend.session import Session
from app.backend.studio import Studio
from app.events.clicks import act_on_job
from app.exposure import Exposure
from app.page import _storage_secret
from app.views.view_state import build_view
from lightx2v.config.request import Request
from lightx2v.errors import BadRequest
from lightx2v.jobs.replica import Outcome
from lightx2v.jobs.store import Job

PRESET = "demo_t2v_distill_lora"


@pytest.fixture
def studio(tmp_path: Path) -> Iterator[Studio]:
    opened = Studio(Painter(), tmp_path, Exposure())
    yield opened
    opened.close()


def submit(studio: Studio, owner: str, prompt: str) -> Job:
    settings = settings_of(PRESET)
    request = Request(prompt=prompt, **{**settings.request, "seed": 3, "frames": 5})
    return studio.submit(settings.engine, request, owner=owner, preset=PRESET)


def begin(studio: Studio, job: Job) -> None:
    """Waits until the run is no longer queued."""
    eventually(lambda: studio.jobs.get(job.id).state != "queued")


@pytest.mark.parametrize(
    "stored", [None, [], "x", {"owner": "short"}, {"owner": "x" * 40 + "\n"}, {"owner": 5}, {"owner": ["a"]}], ids=str
)
def test_forged_browser_storage_starts_a_new_session(stored: Any) -> None:
    assert re.fullmatch(r"[\w-]{43}", Session.of(stored).owner)


def test_stored_values_are_used_only_if_well_formed() -> None:
    owner = Session.of(None).owner
    kept = {
        "owner": owner, "job": "../x", "language": "xx", "compared": ["a/b", 5, "c"], "pinned": "yes",
        "uploaded": "/etc",
    }  # fmt: skip
    assert Session.of(kept, "zh") == Session(owner=owner, language="zh")
    session = Session(owner=owner, language="zh", job="a" * 32, pinned=True, compared=("b" * 32,))
    assert Session.of(json.loads(json.dumps(session.to_json()))) == session


@pytest.mark.slow
def test_the_stage_follows_the_run_unless_one_was_chosen(studio: Studio) -> None:
    session = Session.of(None)
    first = studio.jobs.wait(submit(studio, session.owner, "one").id, PATIENCE)
    second = submit(studio, session.owner, "an endless one")
    begin(studio, second)
    assert build_view(studio, replace(session, job=first.id)).session.job == second.id
    assert build_view(studio, replace(session, job=first.id, pinned=True)).session.job == first.id
    assert build_view(studio, replace(session, job=first.id)).finished == first


@pytest.mark.slow
def test_a_run_that_started_and_ended_between_two_ticks_is_shown(studio: Studio) -> None:
    session = Session.of(None)
    first, second = (studio.jobs.wait(submit(studio, session.owner, prompt).id, PATIENCE) for prompt in ("one", "two"))
    assert build_view(studio, replace(session, job=first.id)).session.job == second.id
    assert build_view(studio, replace(session, job=first.id, pinned=True)).session.job == first.id
    assert build_view(studio, session).session.job == "", "a page does not show a run that was not started on it"


def test_a_started_run_is_no_longer_edited(studio: Studio) -> None:
    session = Session.of(None)
    first, second = (submit(studio, session.owner, prompt) for prompt in ("an endless one", "waits"))
    begin(studio, first)
    assert build_view(studio, replace(session, editing=second.id)).session.editing == second.id
    assert build_view(studio, replace(session, editing=first.id)).session.editing == ""
    studio.jobs.cancel(second.id)
    assert build_view(studio, replace(session, editing=second.id)).session.editing == ""


def test_a_session_sees_its_own_runs_only(studio: Studio) -> None:
    alice, bob = Session.of(None), Session.of(None)
    job = studio.jobs.wait(submit(studio, alice.owner, "alice's secret garden").id, PATIENCE)
    assert [run.id for run in build_view(studio, alice).runs] == [job.id]
    for guess in (bob, replace(bob, job=job.id), replace(bob, compared=(job.id, job.id), editing=job.id)):
        view = build_view(studio, guess)
        assert view.runs == () and view.job is None and view.compared == () and view.finished is None
    assert studio.job_of(bob.owner, job.id) is None and studio.job_of("", job.id) is None
    assert studio.runs("") == []


def test_reordering_a_sessions_queue_moves_no_other_run(studio: Studio) -> None:
    running = submit(studio, "a" * 40, "an endless one")
    mine = submit(studio, "a" * 40, "mine")
    others = submit(studio, "b" * 40, "somebody else's")
    last = submit(studio, "a" * 40, "mine, later")
    begin(studio, running)
    get = studio.jobs.get
    studio.swap(get(last.id), get(mine.id))
    assert [get(id).position for id in (last.id, others.id, mine.id)] == [1, 2, 3]


def test_a_finished_run_improves_later_predictions(studio: Studio) -> None:
    first = studio.jobs.wait(submit(studio, "o" * 40, "x").id, PATIENCE)
    assert studio.prediction_of(first.id) is None
    prediction = studio.predict(first.config, first.request)
    assert prediction is not None and prediction.source == "measured"
    job = submit(studio, "o" * 40, "x")
    assert studio.prediction_of(job.id) == prediction
    assert set(prediction.stages) >= {"text", "denoise", "decode"} and "load" not in prediction.stages


def test_the_steps_that_a_restart_has_left_teach_nothing_about_whole_runs(studio: Studio) -> None:
    first = studio.jobs.wait(submit(studio, "o" * 40, "x").id, PATIENCE)
    before = studio.predict(first.config, first.request)
    assert first.result is not None and before is not None
    took = {"denoise": before.stages["denoise"] / 20, "decode": before.stages["decode"]}
    part = first.result | {"resumed_after": 3, "timings": first.result["timings"] | {"seconds": took}}
    studio._on_finished(first.config, first.request, Outcome(report=part))
    after = studio.predict(first.config, first.request)
    assert after is not None and after.stages["denoise"] == before.stages["denoise"]


def test_an_edited_run_gets_a_new_prediction(studio: Studio) -> None:
    owner = "o" * 40
    running = submit(studio, owner, "an endless one")
    begin(studio, running)
    took = {"text": 0.01, "denoise": 1.0, "decode": 0.5, "write": 0.1}
    studio.learn(running.config, running.request, took)
    job = submit(studio, owner, "x")
    before = studio.prediction_of(job.id)
    studio.edit(job, job.config, replace(job.request, frames=49), preset=job.preset)
    after = studio.prediction_of(job.id)
    assert before is not None and after is not None and after.seconds > 2 * before.seconds


@pytest.mark.slow
def test_loading_counts_only_after_a_run_of_another_model(studio: Studio) -> None:
    for preset in ("demo_t2v_fp8", PRESET):
        settings = settings_of(preset)
        request = Request(prompt="x", **{**settings.request, "frames": 5, "seed": 1})
        studio.jobs.wait(studio.submit(settings.engine, request, owner="o" * 40, preset=preset).id, PATIENCE)
    mine, other = settings_of(PRESET).engine, settings_of("demo_t2v_fp8").engine
    request = Request(prompt="an endless one", **settings_of(PRESET).request)

    def stages(config: Any) -> set[str]:
        prediction = studio.predict(config, request)
        assert prediction is not None
        return set(prediction.stages)

    assert "load" not in stages(mine) and "load" in stages(other)
    studio.submit(other, replace(request, prompt="an endless one"), owner="o" * 40, preset="demo_t2v_fp8")
    assert "load" in stages(mine) and "load" not in stages(other), "the other model will be in memory by then"


def test_stages_without_a_prediction_are_named(studio: Studio) -> None:
    mine, other = settings_of(PRESET).engine, settings_of("demo_i2v_distill_lora")
    request = Request(prompt="x", **settings_of(PRESET).request)
    pictured = Request(prompt="x", image_path="a.png", **other.request)

    def unknown(config: Any, request: Request) -> list[str]:
        prediction = studio.predict(config, request)
        assert prediction is not None
        return studio.not_predicted(config, request, prediction)

    studio.jobs.wait(submit(studio, "o" * 40, "x").id, PATIENCE)
    assert unknown(mine, request) == []
    assert unknown(other.engine, pictured) == ["load", "image"]


def test_on_zerogpu_the_one_model_is_always_loaded(tmp_path: Path) -> None:
    preset = settings_of("demo_i2v_distill_lora")
    request = Request(prompt="x", image_path="a.png", **preset.request)
    lent: Any = lambda duration: lambda run: run  # noqa: E731
    studio = Studio(Painter(), tmp_path, Exposure(), default_preset="demo_i2v_distill_lora", lend_gpu=lent)
    studio.learn(preset.engine, replace(request, image_path="a.png"), {"text": 0.1, "denoise": 1.0})
    prediction = studio.predict(preset.engine, request)
    assert prediction is not None
    assert studio.not_predicted(preset.engine, request, prediction) == ["image"]


def test_a_request_that_does_not_fit_its_engine_is_refused(studio: Studio) -> None:
    request = Request(prompt="x", **settings_of(PRESET).request)
    with pytest.raises(BadRequest):
        studio.submit(settings_of("demo_i2v_base").engine, request, owner="o" * 40, preset="demo_i2v_base")


def test_the_storage_key_is_private_and_kept(tmp_path: Path) -> None:
    key = _storage_secret(tmp_path)
    assert len(key) == 32 and _storage_secret(tmp_path) == key
    assert (tmp_path / "browser.key").stat().st_mode & 0o777 == 0o600
    (tmp_path / "browser.key").write_text("")  # what a crash in between leaves
    assert len(_storage_secret(tmp_path)) == 32


@pytest.mark.parametrize("act", ["up", "down"])
def test_a_run_that_starts_before_its_click_arrives_is_not_moved(studio: Studio, act: str) -> None:
    running = submit(studio, "alice", "endless")
    waiting = submit(studio, "alice", "another")
    begin(studio, running)
    event: Any = SimpleNamespace(session=Session(owner="alice"), studio=studio)
    act_on_job(event, act, replace(running, state="queued", position=1))
    assert studio.jobs.get(waiting.id).position == 1
    studio.jobs.cancel(running.id)


@pytest.mark.parametrize("open_to_others", [False, True])
def test_runs_that_came_back_from_their_videos_are_shown_on_ones_own_machine(
    tmp_path: Path, open_to_others: bool
) -> None:
    """After the list of jobs was lost nobody knows whose a video is, so visitors of an open page do not see it."""
    first = Studio(Painter(), tmp_path, Exposure())
    made = submit(first, "o" * 43, "a red ball")
    eventually(lambda: first.jobs.get(made.id).state == "succeeded")
    first.close()
    for file in tmp_path.glob("jobs.sqlite*"):
        file.unlink()
    again = Studio(Painter(), tmp_path, Exposure(open_to_others=open_to_others))
    visitor = "v" * 43
    assert [job.id for job in again.runs(visitor)] == ([] if open_to_others else [made.id])
    assert (again.job_of(visitor, made.id) is None) == open_to_others
    again.close()
