"""The Compare tab: two runs side by side with their differences, and a table of all runs made on this machine."""

import statistics
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from lightx2v.jobs.store import Job

from ..strings import Words
from . import numbers
from .html import button, esc, table, tag
from .report import peak_vram, seconds_without_loading, seed_of, step_seconds
from .stage import departures

SHOWN_ALWAYS = ("prompt", "seed")
NOT_COMPARED = ("image_path", "last_frame_path", "task")
_GUIDED = {
    (False, False): "offload_off", (True, True): "offload_on", (True, False): "phase_high", (False, True): "phase_low"
}  # fmt: skip
"""Which experts use guidance -> the key of its words."""
_COLUMNS = (
    *("preset", "size", "steps", "guidance", "offload", "device"),
    *("total", "a_step_short", "phase_decode", "peak_vram", "peak_ram", "runs"),
)


def compare(words: Words, jobs: Sequence[Job]) -> str:
    """Two chosen runs with their differences, or how to choose them."""
    if len(jobs) < 2:
        text = words("compare_one") if jobs else words("compare_empty")
        return tag("section", tag("p", esc(text), class_="quiet empty"), class_="card")
    left, right = jobs[:2]
    videos = "".join(_video(words, job, side) for job, side in ((left, "A"), (right, "B")))
    play = button("▶", "play", kind="icon", name=words("play_both"))
    seek = tag("input", type="range", min=0, max=1000, value=0, class_="seek", aria_label=words("seek_both"))
    actions = button(words("swap"), "swap") + button(words("clear"), "clear")
    controls = tag("div", play + seek + actions, class_="row controls")
    content = tag("div", videos, class_="pair") + controls + _table(words, left, right)
    return tag("section", content, class_="card compare")


def benchmark(words: Words, jobs: Sequence[Job]) -> str:
    """One row for each kind of finished run: the tutorial's table with this machine's times."""
    groups: dict[tuple[Any, ...], list[Job]] = defaultdict(list)
    for job in jobs:
        if job.state == "succeeded" and job.result:
            request, result = job.request, job.result
            size = f"{result.get('width', request.width)} × {result.get('height', request.height)} × {request.frames}"
            offload = "auto" if job.config.cpu_offload == "auto" else "on" if job.config.cpu_offload else "off"
            preset = f"{words('mode_' + ('t2v' if request.task == 't2v' else 'i2v'))} · {words.preset(job.preset)}"
            how = " · ".join(filter(None, [words(_GUIDED[request.guided]), departures(words, request)]))
            kind = (preset, size, request.steps, how, words("offload_" + offload))
            groups[*kind, str(result.get("device", ""))].append(job)
    head = tag("header", tag("h2", esc(words("benchmark"))) + tag("span", esc(words("benchmark_hint")), class_="quiet"))
    if not groups:
        return tag("section", head + tag("p", esc(words("benchmark_empty")), class_="quiet empty"), class_="card")
    rows = [[*kind, *_figures(group), len(group)] for kind, group in sorted(groups.items(), key=lambda item: item[0])]
    content = table([words(name) for name in _COLUMNS], rows)
    return tag("section", head + tag("div", content, class_="scroll", tabindex=0), class_="card benchmark")


def comparable_settings(job: Job) -> dict[str, str]:
    """The settings in which two runs may differ, as text."""
    data: dict[str, Any] = {**job.request.to_json(), "seed": seed_of(job)}
    shown = {"preset": job.preset, "cpu_offload": job.config.cpu_offload}
    shown |= {name: value for name, value in data.items() if name not in NOT_COMPARED}
    shown["loras"] = [
        f"{lora.expert} {lora.path.rsplit('/', 1)[-1]} × {'/'.join(f'{each:g}' for each in lora.strengths)}"
        for lora in job.config.lora_configs
    ]
    return {name: _plain(value) for name, value in shown.items()}


def _video(words: Words, job: Job, side: str) -> str:
    video = tag(
        "video", "", src=f"studio/{job.id}/video.mp4", loop=True, muted=True, playsinline=True, preload="auto",
        aria_label=f"{side}: {job.request.prompt[:120]}",
    )  # fmt: skip
    timings = (job.result or {})["timings"]
    vram = peak_vram(timings)
    took = numbers.seconds(seconds_without_loading(timings))
    facts = [words.preset(job.preset), took, numbers.memory(vram[0]) if vram else ""]
    caption = tag("strong", side) + tag("span", esc(" · ".join(filter(None, facts))), class_="quiet")
    poster = tag("img", src=f"studio/{job.id}/poster.jpg", alt="", class_="ambient")
    return tag("figure", tag("div", poster + video, class_="stage") + tag("figcaption", caption))


def _table(words: Words, left: Job, right: Job) -> str:
    a, b = comparable_settings(left), comparable_settings(right)
    rows = [(name, a[name], b[name]) for name in a if a[name] != b[name] or name in SHOWN_ALWAYS]
    marks = ["differs" if one != other else "" for _, one, other in rows]
    note = "" if any(marks) else tag("p", esc(words("same_settings")), class_="quiet")
    return table((words("setting"), "A", "B"), rows, marks=marks, class_="diff") + note


def _figures(jobs: Sequence[Job]) -> list[str]:
    timings = [(job.result or {})["timings"] for job in jobs]
    steps = [s for s in map(step_seconds, timings) if s is not None]
    decode = [t["seconds"].get("decode", 0.0) for t in timings]
    vram = [peak[0] for peak in map(peak_vram, timings) if peak]
    return [
        numbers.seconds(statistics.median(map(seconds_without_loading, timings))),
        numbers.seconds(statistics.median(steps)) if steps else "–",
        numbers.seconds(statistics.median(decode)),
        numbers.memory(max(vram)) if vram else "–",
        numbers.memory(max(t["peak_rss"] for t in timings)),
    ]


def _plain(value: object) -> str:
    if isinstance(value, list):
        return ", ".join(map(_plain, value)) or "–"
    if isinstance(value, float):
        return f"{value:g}"
    return "–" if value in (None, "") else str(value)
