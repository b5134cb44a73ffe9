"""The stage and the status below it: picture or video, phases, time left, and buttons after a failure."""

import time
from collections.abc import Mapping
from typing import Any

from lightx2v.config.magcache import forwards_of
from lightx2v.config.request import Request
from lightx2v.config.schedule import schedule_of
from lightx2v.jobs.store import Job
from lightx2v.progress import STAGES, Progress

from ..strings import Words
from . import numbers
from .html import button, esc, tag

PHASES = ("download", "load", "text", "image", "high", "low", "decode", "write")
"""The stages of a run in the progress bar: denoising is two phases, one for each expert."""

ACTIVE = ("queued", "running")


def stage(words: Words, job: Job | None, *, sample: bool, uploaded: str = "") -> str:
    """The 16:9 box. Never empty: it shows a sample, a latent preview, a video, or an error.

    `uploaded` is the token of a video that the visitor dropped.
    """
    if job is None:
        return _idle(words, sample=sample, uploaded=uploaded)
    if job.state == "succeeded":
        inner = tag(
            "video", "", src=f"studio/{job.id}/video.mp4", autoplay=True, loop=True, muted=True, playsinline=True,
            controls=True, aria_label=words("video_of", prompt=job.request.prompt[:120]),
        )  # fmt: skip
        return _box(_ambient(f"studio/{job.id}/poster.jpg") + inner, "done", job.id)
    if job.state in ACTIVE:
        return _box(_waiting(words, job), job.state, job.id)
    poster = tag("img", src=f"studio/{job.id}/preview.jpg", alt="", class_="dim") if job.preview else _landscape()
    title = tag("strong", esc(words("state_" + job.state).capitalize()))
    message = tag("p", esc(job.error["message"] if job.error else words("explain_" + job.state)))
    return _box(poster + tag("div", title + message, class_="notice", role="alert"), job.state, job.id)


def status(
    words: Words,
    job: Job | None,
    retry_options: Mapping[str, str] | None = None,
    *,
    ahead: tuple[int, int] = (0, 0),
    expected: Mapping[str, float] | None = None,
) -> str:
    """The progress bar and one line: the current step, elapsed time and time left. Its height never changes.

    `ahead` counts the runs before one that waits, and how many of them are other visitors'. `expected` holds the
    seconds predicted for each stage, as far as known.
    """
    if job is None:
        line = tag("span", esc(words("idle_hint")), class_="quiet")
    elif job.state in ACTIVE:
        stop = button(words("stop"), "stop", kind="stop", id=job.id, key="Escape", **stop_question(words, job))
        line = tag("div", _now(words, job, job.progress, ahead), class_="doing")
        line += tag("div", _times(words, job, expected or {}) + stop, class_="clock")
    else:
        actions = ""
        for act, label in (retry_options or {}).items():
            actions += button(label, act, id=job.id, kind="" if actions else "primary")
        if job.state != "succeeded":  # the report of a video has this button
            actions += button(words("use_settings"), "restore", id=job.id)
        title = words("state_" + job.state).capitalize()
        note = ""
        if job.state == "succeeded":  # the report's total: it counts loading, but not waiting for a download
            result = job.result or {}
            title = words("finished_in", time=numbers.seconds(result["timings"]["total"]))
            note = went_on(words, result.get("resumed_after", 0), job.request.steps)
        said = tag("strong", esc(title)) + (tag("span", esc(note), class_="quiet") if note else "")
        line = tag("div", said, class_="doing") + tag("div", actions, class_="clock")
    return tag("div", _bar(words, job) + tag("div", line, class_="line"), class_="status")


def stop_question(words: Words, job: Job) -> dict[str, Any]:
    """What the page asks before Stop ends a run that has taken more than a few seconds: data-* of the button."""
    if job.started is None:
        return {}
    return {"since": f"{job.started:.2f}", "ask": words("stop_ask"), "yes": words("stop_yes"), "no": words("stop_no")}


def went_on(words: Words, after: int, total: int) -> str:
    """That a restart has interrupted the run after some of its denoising steps; "" if none has."""
    if not after:
        return ""
    return words("went_on", step=after + 1, total=total) if after < total else words("went_on_decoding")


def skipped_line(words: Words, request: Request) -> str:
    """How many forwards a speed-up skips; "" for an exact run."""
    forwards = forwards_of(request)
    return words("skipped", skipped=forwards.skipped, total=forwards.total) if forwards.skipped else ""


def departures(words: Words, request: Request) -> str:
    """What of the request makes another video than the model's own rules would; "" for nothing."""
    nag = words("nag_on", scale=f"{request.nag_scale:g}") if request.nag else ""
    moves = request.motion_amplitude
    motion = words("motion_on", amplitude=f"{moves:g}") if moves != 1 else ""
    return " · ".join(filter(None, [skipped_line(words, request), nag, motion]))


def phases_of(request: Request, event: Progress | None) -> list[str]:
    """The phases of this run. "download" is one of them only while files download."""
    high = schedule_of(request).high_noise_steps
    absent = {
        "download": event is None or event.stage != "download",
        "image": request.task == "t2v",
        "high": high == 0,
        "low": high == request.steps,
    }
    return [phase for phase in PHASES if not absent.get(phase, False)]


def phase_fill(request: Request, event: Progress | None) -> tuple[str, float]:
    """The phase of an event, and how much of it is done, from 0 to 1."""
    if event is None:
        return "load", 0.0
    if event.stage != "denoise":
        return event.stage, event.step / event.total if event.total else 0.0
    high = schedule_of(request).high_noise_steps
    if event.step < high:
        return "high", event.step / high
    return "low", (event.step - high) / max(1, request.steps - high)


def overall(request: Request, event: Progress | None) -> float:
    """How much of the run is done, from 0 to 1, for screen readers. A denoising phase weighs as much as four others."""
    phases = phases_of(request, event)
    weight = {phase: 4.0 if phase in ("high", "low") else 1.0 for phase in phases}
    phase, fill = phase_fill(request, event)
    if phase not in weight:
        return 0.0
    before = sum(weight[p] for p in phases[: phases.index(phase)])
    return (before + fill * weight[phase]) / sum(weight.values())


def time_left(event: Progress | None, expected: Mapping[str, float], elapsed: float) -> float | None:
    """Seconds until the video is done: measured for the current stage, predicted for the later ones."""
    later = sum(expected.get(name, 0.0) for name in STAGES[STAGES.index(event.stage) + 1 :]) if event else 0.0
    if event is not None and event.stage == "decode" and event.total:  # frames are added as they are decoded
        later -= expected.get("interpolate", 0.0) * event.step / event.total
    if event is not None and event.stage in ("denoise", "decode", "write"):
        current = event.eta if event.eta is not None else expected.get(event.stage)
        return None if current is None else current + later
    return max(later, sum(expected.values()) - elapsed) if expected else None


def _bar(words: Words, job: Job | None) -> str:
    state, event = (job.state, job.progress) if job is not None else ("", None)
    phases, current, fill = [p for p in PHASES if p not in ("download", "image")], "", 0.0
    if job is not None:
        phases = phases_of(job.request, event)
        current, fill = phase_fill(job.request, event)
    done = state == "succeeded"
    begun = state == "running" or state != "queued" and event is not None
    at = phases.index(current) if begun and current in phases else -1
    cells = []
    for index, phase in enumerate(phases):
        mark = "done" if done or index < at else "now" if index == at else "todo"
        share = 100 if mark == "done" else round(fill * 100) if mark == "now" else 0
        bar = tag("i", tag("b", "", style=f"width:{share}%"))
        cells.append(tag("div", bar + tag("span", esc(words("phase_" + phase))), class_=mark))
    percent = 100 if done else round(100 * overall(job.request, event)) if job and state == "running" else 0
    failed = state in ("failed", "cancelled", "interrupted")
    return tag(
        "div", "".join(cells), class_="phases failed" if failed else "phases", role="progressbar",
        aria_label=words("progress"), aria_valuemin=0, aria_valuemax=100, aria_valuenow=percent,
        aria_valuetext=_plain_now(words, job, event) if job is not None else words("idle_hint"),
    )  # fmt: skip


def _now(words: Words, job: Job, event: Progress | None, ahead: tuple[int, int]) -> str:
    if job.cancelling:
        return tag("strong", esc(words("stopping")))
    if job.state == "queued":
        return _queued(words, job, *ahead)
    if event is None:
        return tag("strong", esc(words("starting")))
    if event.stage == "denoise":
        # An event counts finished steps; the page names the step in progress.
        number = min(event.step + 1, event.total)
        expert = words("expert_high" if number <= schedule_of(job.request).high_noise_steps else "expert_low")
        pace = _pace(event)
        went = went_on(words, event.resumed_after, event.total)
        skips = skipped_line(words, job.request)
        step = words("a_step", time=numbers.seconds(pace)) if pace else ""
        rest = " · ".join(filter(None, [expert, step, skips, went]))
        title = tag("strong", esc(words("step_of", step=number, total=event.total)))
        return title + tag("span", esc(rest), class_="quiet")
    note = event.message or (words("part_of", step=event.step, total=event.total) if event.total > 1 else "")
    return tag("strong", esc(words("doing_" + event.stage))) + (tag("span", esc(note), class_="quiet") if note else "")


def _queued(words: Words, job: Job, ahead: int, others: int) -> str:
    """How many runs a waiting one has before it, whose they are, and when it starts."""
    if job.note:
        return tag("strong", esc(words("waits_for_worker"))) + tag("span", esc(job.note), class_="quiet")
    if not ahead:
        return tag("strong", esc(words("starting")))
    title = tag("strong", esc(words("queued_behind", n=ahead)))
    rest = [words("queued_others", n=others)] if others else []
    rest += [words("queued_starts", time=numbers.about(job.starts_in))] if job.starts_in is not None else []
    return title + (tag("span", esc(" · ".join(rest)), class_="quiet") if rest else "")


def _plain_now(words: Words, job: Job, event: Progress | None) -> str:
    if job.state != "running" or event is None:
        return words("state_" + job.state)
    step = words("step_of", step=min(event.step + 1, event.total), total=event.total)
    return step if event.stage == "denoise" else words("doing_" + event.stage)


def _pace(event: Progress) -> float | None:
    """Seconds per step, from the time left in the engine's event. None until a step is done."""
    if event.step <= event.resumed_after or event.eta is None or event.step >= event.total:
        return None
    return event.eta / (event.total - event.step)


def _times(words: Words, job: Job, expected: Mapping[str, float]) -> str:
    """Time elapsed and time left. The page's script counts the elapsed time from the start time in this HTML."""
    if job.state != "running" or job.started is None:
        return ""
    seconds = time_left(job.progress, expected, time.time() - job.started)
    left = words("left", time=numbers.about(seconds)) if seconds is not None else words("estimating")
    elapsed = tag("span", "0:00", class_="elapsed", data_since=f"{job.started:.2f}")
    return tag("span", elapsed + tag("span", " · " + esc(left)), class_="times")


def _waiting(words: Words, job: Job) -> str:
    event = job.progress
    if job.state == "running" and job.preview is not None:
        step = event.step if event is not None and event.stage == "denoise" else job.request.steps
        label = words("preview_step", step=step, total=job.request.steps)
        source = f"studio/{job.id}/preview.jpg?step={step}"
        picture = tag("img", src=source, alt=words("preview_alt"), class_="preview")
        return _ambient(source) + picture + tag("span", esc(label), class_="tag")
    label = words("doing_" + event.stage) if event else words("starting" if job.state == "running" else "state_queued")
    return _landscape("breathing") + tag("span", esc(label), class_="tag")


def _idle(words: Words, *, sample: bool, uploaded: str) -> str:
    if uploaded:
        video = tag(
            "video", "", src=f"studio/{uploaded}/shown.mp4", autoplay=True, loop=True, muted=True, playsinline=True,
            controls=True, aria_label=words("dropped_video"),
        )  # fmt: skip
        return _box(video, "shown", "")
    hint = tag("div", tag("strong", esc(words("idle_title"))) + tag("p", esc(words("idle_text"))), class_="invite")
    if sample:
        playing = {"src": "studio/sample.mp4", "autoplay": True, "loop": True, "muted": True, "playsinline": True}
        video = tag("video", "", **playing, class_="ambient", aria_hidden="true", tabindex=-1)
        video += tag("video", "", **playing, aria_label=words("sample_alt"))
        return _box(video + tag("span", esc(words("sample")), class_="tag") + hint, "sample", "")
    return _box(_landscape() + hint, "sample", "")


def _ambient(source: str) -> str:
    """The same picture again, blurred by the style sheet, behind one that does not fill the box."""
    return tag("img", src=source, alt="", class_="ambient")


def _box(inner: str, state: str, job_id: str) -> str:
    return tag("div", inner, class_="stage", data_state=state, data_job=job_id)


def _landscape(extra: str = "") -> str:
    """A drawn landscape for an empty box. Its colours come from the style sheet."""
    return (
        f'<svg class="scene {extra}" viewBox="0 0 320 180" preserveAspectRatio="xMidYMid slice" aria-hidden="true">'
        '<rect class="sky" width="320" height="180"/><circle class="sun" cx="228" cy="74" r="22"/>'
        '<path class="far" d="M0 122C40 100 78 96 118 108s76 22 116 4 60-18 86-10v78H0z"/>'
        '<path class="mid" d="M0 140c36-14 70-16 108-6s84 18 128 4 62-12 84-8v50H0z"/>'
        '<path class="near" d="M0 160c48-10 92-8 140-2s112 8 180-6v28H0z"/></svg>'
    )
