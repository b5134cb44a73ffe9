"""The seconds left in a run: measured for the current stage, predicted for later ones, never guessed."""

from __future__ import annotations

import gradio as gr
import pytest

from app.backend.model_files import FilesStatus
from app.gradio_compat import merge_updates
from app.strings import Words
from app.views.panels import TOO_SLOW, PresetOption, cost_line, preset_list
from app.views.stage import time_left
from lightx2v.config.presets import AIMS
from lightx2v.cost.run_time import Prediction
from lightx2v.progress import Progress

EXPECTED = {"load": 10.0, "text": 1.0, "denoise": 40.0, "decode": 8.0, "write": 1.0}


@pytest.mark.parametrize(
    ("event", "elapsed", "left"),
    [
        (None, 0.0, 60.0),
        (Progress(stage="load"), 4.0, 56.0),
        (Progress(stage="load"), 30.0, 50.0),
        (Progress(stage="text", step=1, total=1, eta=0.0), 11.0, 49.0),
        (Progress(stage="denoise", step=0, total=4), 11.0, 49.0),
        (Progress(stage="denoise", step=2, total=4, eta=30.0), 41.0, 39.0),
        (Progress(stage="decode", step=1, total=2, eta=3.0), 60.0, 4.0),
        (Progress(stage="write", step=1, total=2, eta=0.5), 60.0, 0.5),
    ],
)
def test_the_time_left_adds_what_is_to_come(event: Progress | None, elapsed: float, left: float) -> None:
    assert time_left(event, EXPECTED, elapsed) == pytest.approx(left)


@pytest.mark.parametrize(("step", "left"), [(0, 8.0 + 20.0 + 1.0), (1, 3.0 + 10.0 + 1.0), (2, 0.0 + 1.0)])
def test_frames_are_added_while_the_others_are_decoded(step: int, left: float) -> None:
    event = Progress(stage="decode", step=step, total=2, eta={0: None, 1: 3.0, 2: 0.0}[step])
    assert time_left(event, EXPECTED | {"interpolate": 20.0}, 60.0) == pytest.approx(left)


def test_without_a_prediction_only_measured_times_count() -> None:
    assert time_left(Progress(stage="text", step=1, total=1, eta=0.0), {}, 3.0) is None
    assert time_left(Progress(stage="denoise", step=0, total=4), {}, 3.0) is None
    assert time_left(Progress(stage="denoise", step=2, total=4, eta=5.0), {}, 3.0) == 5.0
    assert time_left(None, {}, 3.0) is None


def test_days_are_a_word() -> None:
    ready = FilesStatus(files=(), disk_free=1)
    slow = Prediction(stages={"denoise": TOO_SLOW + 1.0}, source="scaled")
    offer = PresetOption(name="t2v_base", title="Base", about="x", prediction=slow, need=None, files=ready)
    assert "days on this machine" in cost_line(Words("en"), slow, None, ready, None, 1)
    assert ">days<" in preset_list(Words("en"), [offer], "t2v_base", None)


@pytest.mark.parametrize("language", ["en", "zh"])
def test_presets_stand_below_what_they_are_for(language: str) -> None:
    words, ready = Words(language), FilesStatus(files=(), disk_free=1)
    offers = [
        PresetOption(name=aim, title="x", about="x", prediction=None, need=None, files=ready, group=aim)
        for aim in ("own", *AIMS)
    ]
    html = preset_list(words, offers, "best", None)
    headings = [words(key) for key in ("own_presets", *(f"aim_{aim}" for aim in AIMS))]
    places = [html.index(f">{heading}</li>") for heading in headings]
    assert places == sorted(places) and len(set(headings)) == 5


def test_a_label_and_a_value_make_one_update() -> None:
    label = gr.update(label="步数")
    for value in (4, None):
        merged = merge_updates(label, value)
        assert merged["label"] == "步数" and merged["value"] == value
    merged = merge_updates(label, gr.update(choices=[1]))
    assert merged["choices"] == [1] and merged["label"] == "步数" and "value" not in merged
