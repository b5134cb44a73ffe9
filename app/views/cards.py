"""Cards of runs: the history and the queue."""

from collections.abc import Sequence

from lightx2v.jobs.store import Job

from ..strings import Words
from . import numbers
from .html import button, esc, icon_button, tag
from .report import peak_vram
from .stage import overall, stop_question


def history(words: Words, jobs: Sequence[Job], current: str, compared: Sequence[str], *, deleted: int = 0) -> str:
    """Past runs, newest first. A card shows its run; its small buttons compare and delete it. `deleted` runs can still
    be brought back."""
    hint = tag("span", esc(words("drop_hint")), class_="quiet")
    if deleted:
        text = tag("span", esc(words("deleted", n=deleted)))
        hint = tag("span", text + button(words("undo"), "undo_delete", kind="small"), class_="undo", role="status")
    head = tag("header", tag("h2", esc(words("history"))) + hint)
    if not jobs:
        return tag("section", head + tag("p", esc(words("history_empty")), class_="quiet empty"), class_="card history")
    cards = "".join(_card(words, job, current=job.id == current, compared=job.id in compared) for job in jobs)
    strip = tag("ul", cards, class_="strip", tabindex=0, aria_label=words("history"))
    return tag("section", head + strip, class_="card history")


def queue(words: Words, jobs: Sequence[Job], editing: str) -> str:
    """The running jobs and those that wait, in order; "" for less than two: the stage shows the one that there is."""
    waiting = sorted((job for job in jobs if job.state == "queued"), key=lambda job: job.position or 0)
    running = [job for job in jobs if job.state == "running"]
    if len(waiting) + len(running) < 2:
        return ""
    rows = [_running(words, job, several=len(running) > 1) for job in reversed(running)]
    rows += [_waiting(words, job, i, len(waiting), editing=job.id == editing) for i, job in enumerate(waiting)]
    text = words("n_waiting", n=len(waiting)) if waiting else words("n_running", n=len(running))
    count = tag("span", esc(text), class_="quiet")
    head = tag("header", tag("h2", esc(words("queue"))) + count)
    return tag("section", head + tag("ol", "".join(rows), class_="queue"), class_="card", aria_label=words("queue"))


def _card(words: Words, job: Job, *, current: bool, compared: bool) -> str:
    prompt = job.request.prompt
    done = job.state == "succeeded"
    picture = tag("span", esc(words("state_" + job.state)), class_="nopicture")
    if done:
        picture = tag("img", src=f"studio/{job.id}/poster.jpg", alt="", loading="lazy")
    texts = tag("span", esc(prompt), class_="prompt") + tag("span", esc(_summary(words, job)), class_="quiet")
    main = tag(
        "button", picture + texts, type="button", class_="open", data_act="show", data_id=job.id,
        aria_label=words("show_run", prompt=prompt[:80]), title=prompt[:300],
        aria_current="true" if current else None,
    )  # fmt: skip
    tools = icon_button("trash", "delete", words("delete_run", prompt=prompt[:40]), id=job.id)
    if done:
        name = words("compare_run", prompt=prompt[:40])
        tools = icon_button("compare", "compare", name, id=job.id) + tools
    classes = " ".join(filter(None, ["run", "current" if current else "", "compared" if compared else ""]))
    return tag("li", main + tag("span", tools, class_="tools"), class_=classes)


def _summary(words: Words, job: Job) -> str:
    name = words.preset(job.preset)
    if job.state != "succeeded" or not job.result:
        return f"{name} · {words('state_' + job.state)}"
    timings = job.result["timings"]
    vram = peak_vram(timings)
    return " · ".join(filter(None, [numbers.seconds(timings["total"]), numbers.memory(vram[0]) if vram else "", name]))


def _running(words: Words, job: Job, *, several: bool) -> str:
    """With `several`, each says how far it is, and how to see it on the stage."""
    tools = tag("span", esc(words("state_running")), class_="quiet")
    if several:
        share = f"{100 * overall(job.request, job.progress):.0f}{numbers.NARROW}%"
        name = words("show_run", prompt=job.request.prompt[:80])
        tools = button(share, "show", kind="small", name=f"{name}, {share}", id=job.id)
    tools += icon_button("close", "stop", words("stop"), id=job.id, **stop_question(words, job))
    return _row(words, job, "▸", tools, "running")


def _waiting(words: Words, job: Job, place: int, count: int, *, editing: bool) -> str:
    prompt = job.request.prompt[:40]
    tools = [
        icon_button("up", "up", words("move_up", prompt=prompt), disabled=place == 0, id=job.id),
        icon_button("down", "down", words("move_down", prompt=prompt), disabled=place == count - 1, id=job.id),
        icon_button("edit", "edit", words("edit_run", prompt=prompt), id=job.id),
        icon_button("close", "cancel", words("cancel_run", prompt=prompt), id=job.id),
    ]
    return _row(words, job, str(place + 1), "".join(tools), "editing" if editing else "")


def _row(words: Words, job: Job, number: str, tools: str, class_: str) -> str:
    request = job.request
    facts = f"{words.preset(job.preset)} · {request.width} × {request.height} · {words('n_frames', n=request.frames)}"
    texts = tag("span", esc(request.prompt), class_="prompt") + tag("span", esc(facts), class_="quiet")
    number = tag("span", number, class_="place", aria_hidden="true")
    return tag("li", number + tag("span", texts, class_="text") + tag("span", tools, class_="tools"), class_=class_)
