"""Renders the right side and the header of the page for one session."""

from ..backend.studio import Studio
from ..strings import Words
from . import cards, panels
from . import compare as comparison
from .report import report
from .retries import retry_labels, retry_options
from .stage import stage, status
from .view_state import ViewState


def render(studio: Studio, words: Words, view: ViewState) -> dict[str, str]:
    """{part: HTML} of every part of the header and the right side."""
    past = [job for job in view.runs if job.over]
    loaded = words.preset(studio.jobs.loaded.preset) if studio.jobs.loaded else ""
    return {
        "top": panels.header(
            words, studio.machine(), loaded, studio.exposure, alive=studio.jobs.alive, workers=studio.workers
        ),
        "stage": stage(words, view.job, sample=studio.sample is not None, uploaded=view.session.uploaded),
        "status": _status(studio, words, view),
        "report": _report(studio, words, view),
        "queue": cards.queue(words, view.runs, view.session.editing),
        "history": cards.history(
            words, past, view.session.job, view.session.compared, deleted=studio.deleted(view.session.owner)
        ),
        "compare": comparison.compare(words, view.compared),
        "benchmark": comparison.benchmark(words, view.runs),
    }


def _status(studio: Studio, words: Words, view: ViewState) -> str:
    options = retry_options(view.job, offload=studio.exposure.shows_paths and studio.machine().gpu)
    prediction = studio.prediction_of(view.job.id) if view.job is not None else None
    return status(
        words,
        view.job,
        retry_labels(words, options),
        ahead=view.ahead,
        expected=prediction.stages if prediction else {},
    )


def _report(studio: Studio, words: Words, view: ViewState) -> str:
    done = view.finished
    prediction = studio.prediction_of(done.id) if done else None
    on_stage = done is not None and not view.session.uploaded and view.job is not None and view.job.id == done.id
    return report(
        words, done, predicted=prediction.seconds if prediction else None, address=studio.address,
        key=bool(studio.exposure.password), paths=studio.exposure.shows_paths, earlier=not on_stage,
    )  # fmt: skip
