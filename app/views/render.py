"""The right side for one visitor, as HTML."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import gradio as gr

from ..backend.studio import Studio
from ..backend.visitor import Scene
from ..strings import Words
from . import cards, panels
from . import compare as comparison
from .report import report
from .retries import remedies
from .stage import stage, status

PARTS = ("top", "stage", "status", "report", "queue", "history", "compare", "benchmark")


@dataclass
class Outputs:
    """The components of the right side and the header."""

    top: Any
    stage: Any
    status: Any
    report: Any
    queue: Any
    history: Any
    compare: Any
    benchmark: Any
    tabs: tuple[Any, Any]
    restore: Any

    @property
    def rendered(self) -> set[Any]:
        """Those that `render` fills."""
        return {getattr(self, name) for name in PARTS}

    def relabel(self, words: Words) -> dict[Any, Any]:
        """What is no HTML of ours, in another language."""
        create, compare = self.tabs
        return {
            create: gr.Tab(label=words("tab_create")),
            compare: gr.Tab(label=words("tab_compare")),
            self.restore: gr.UploadButton(label=words("restore_file")),
        }


def render(studio: Studio, words: Words, scene: Scene) -> dict[str, str]:
    """HTML of every part of PARTS."""
    return {
        "top": _top(studio, words),
        "stage": stage(words, scene.job, sample=studio.sample is not None, shown=scene.visitor.shown),
        "status": _status(studio, words, scene),
        "report": _report(studio, words, scene),
        "queue": cards.queue(words, scene.runs, scene.visitor.editing),
        "history": cards.history(words, _past(scene), scene.visitor.job, scene.visitor.compared),
        "compare": comparison.compare(words, scene.compared),
        "benchmark": comparison.benchmark(words, scene.runs),
    }


def _top(studio: Studio, words: Words) -> str:
    loaded = studio.loaded
    name = words.preset(loaded.preset) if loaded else ""
    return panels.header(words, studio.machine(), name, studio.exposure, alive=studio.jobs.alive)


def _status(studio: Studio, words: Words, scene: Scene) -> str:
    offers = remedies(words, scene.job, offload=studio.exposure.shows_paths and studio.machine().gpu)
    expected = studio.expected_of(scene.job.id) if scene.job is not None else {}
    return status(words, scene.job, offers, ahead=scene.ahead, expected=expected)


def _report(studio: Studio, words: Words, scene: Scene) -> str:
    done = scene.finished
    predicted = studio.predicted_for(done.id) if done else None
    on_stage = done is not None and not scene.visitor.shown and scene.job is not None and scene.job.id == done.id
    return report(
        words, done, predicted=predicted, address=studio.address, key=bool(studio.exposure.password),
        paths=studio.exposure.shows_paths, earlier=not on_stage,
    )  # fmt: skip


def _past(scene: Scene) -> list[Any]:
    return [job for job in scene.runs if job.over]
