"""The report of a finished run: time and memory as figures, a bar and a table; and snippets that repeat the run."""

from collections.abc import Mapping
from typing import Any

from lightx2v.jobs.store import Job
from lightx2v.progress import STAGES

from ..exposure import ADDRESS
from ..strings import Words
from . import numbers
from .html import button, esc, table, tag
from .snippets import snippets
from .stage import departures, went_on

BAR = ("load", "text", "image", "high", "low", "decode", "interpolate", "write")


def report(
    words: Words,
    job: Job | None,
    *,
    predicted: float | None = None,
    address: str = ADDRESS,
    key: bool = False,
    paths: bool = True,
    earlier: bool = False,
) -> str:
    """The panel under the stage for the last finished run; "" before there is one.

    `predicted` is the time predicted for it in seconds. `address`, `key` and `paths` are those of `snippets`. `earlier`
    means that the stage shows something else by now.
    """
    if job is None or job.state != "succeeded" or not job.result:
        return ""
    result, texts = job.result, snippets(job, address=address, key=key, paths=paths)
    title = words("earlier_run" if earlier else "last_run")
    head = tag("h2", esc(title)) + tag("span", esc(_subtitle(words, job)), class_="quiet")
    parts = [
        tag("header", head),
        _chips(words, result, predicted),
        _bar(words, result["timings"]),
        _buttons(words, job),
        *(tag("p", esc(warning), class_="warn") for warning in result.get("warnings", ())),
        tag("details", tag("summary", esc(words("details"))) + _details(words, job)),
        tag("details", tag("summary", esc(words("settings_as"))) + _snippets(words, texts), class_="snippets"),
    ]
    return tag("section", "".join(parts), class_="card report", aria_label=title)


def seed_of(job: Job) -> int:
    """The seed that the run used."""
    return (job.result or {}).get("seed", job.request.seed)


def step_seconds(timings: Mapping[str, Any]) -> float | None:
    """Mean seconds per denoising step, without the first, which warms up."""
    times = [step["seconds"] for step in timings.get("steps", ())]
    times = times[1:] if len(times) > 2 else times
    return sum(times) / len(times) if times else None


def seconds_without_loading(timings: Mapping[str, Any]) -> float:
    """Total seconds without loading, which only the first run of an engine waits for."""
    return timings["total"] - timings["seconds"].get("load", 0.0)


def peak_vram(timings: Mapping[str, Any]) -> tuple[int, int] | None:
    """Highest (allocated, reserved) bytes; None without a GPU."""
    peaks = timings.get("peak_vram")
    if not peaks:
        return None
    return max(p["allocated"] for p in peaks.values()), max(p["reserved"] for p in peaks.values())


def stage_seconds(timings: Mapping[str, Any]) -> dict[str, float]:
    """Seconds per phase of BAR, with denoising split between the experts."""
    seconds = dict(timings.get("seconds", {}))
    experts = timings.get("experts", {})
    denoise = seconds.pop("denoise", 0.0)
    high = experts.get("high", 0.0)
    seconds["high"], seconds["low"] = high, experts.get("low", max(0.0, denoise - high))
    return {phase: seconds[phase] for phase in BAR if seconds.get(phase)}


def attention_line(result: Mapping[str, Any]) -> str:
    """The attention backends that ran, and why."""
    attention = result.get("attention") or {}
    names = " / ".join(dict.fromkeys(attention[part] for part in ("self", "cross") if part in attention))
    reason = attention.get("reason", "")
    return f"{names} ({reason})" if reason else names


def _subtitle(words: Words, job: Job) -> str:
    result = job.result or {}
    frames = words("n_frames", n=result.get("frames", job.request.frames))
    size = f"{result['width']} × {result['height']}"
    return " · ".join([f"{words('seed')} {seed_of(job)}", size, frames, words.preset(job.preset)])


def _chips(words: Words, result: Mapping[str, Any], predicted: float | None) -> str:
    timings = result["timings"]
    step, vram = step_seconds(timings), peak_vram(timings)
    chips = [
        ("total", numbers.seconds(timings["total"])),
        ("a_step_short", numbers.seconds(step) if step is not None else "–"),
        ("phase_decode", numbers.seconds(timings["seconds"].get("decode", 0.0))),
        ("peak_vram", numbers.memory(vram[0])) if vram else ("peak_ram", numbers.memory(timings["peak_rss"])),
        ("predicted", _predicted(words, predicted, timings)),
        ("file", numbers.size(result["file_bytes"]) if result.get("file_bytes") else "–"),
    ]
    cells = (tag("div", tag("dt", esc(words(key))) + tag("dd", esc(value))) for key, value in chips)
    return tag("dl", "".join(cells), class_="chips")


def _predicted(words: Words, predicted: float | None, timings: Mapping[str, Any]) -> str:
    """The predicted seconds. They leave out a load that nobody could predict, and then say so."""
    if predicted is None:
        return "–"
    loading = timings["total"] - seconds_without_loading(timings)
    return numbers.about(predicted) + (f" {words('cost_load')}" if loading >= 0.05 else "")


def _bar(words: Words, timings: Mapping[str, Any]) -> str:
    parts = stage_seconds(timings)
    whole = sum(parts.values()) or 1.0
    spans, legend = [], []
    for phase, seconds in parts.items():
        label = f"{words('phase_' + phase)} {numbers.seconds(seconds)}"
        spans.append(tag("i", "", class_=f"c-{phase}", style=f"flex-grow:{seconds / whole:.4f}", title=label))
        legend.append(tag("li", tag("i", "", class_=f"c-{phase}") + esc(label)))
    return tag("div", "".join(spans), class_="stack", aria_hidden="true") + tag("ul", "".join(legend), class_="legend")


def _buttons(words: Words, job: Job) -> str:
    row = [
        button(words("again_new_seed"), "again", id=job.id),
        button(words("use_settings"), "restore", id=job.id),
        button(words("same_seed"), "same_seed", id=job.id, seed=seed_of(job)),
        button(words("continue_last"), "last_frame", id=job.id),
        button(words("compare"), "compare", id=job.id),
        tag("a", esc(words("download")), class_="btn", href=f"studio/{job.id}/video.mp4?download", download=True),
    ]
    if (job.result or {}).get("original_path"):
        address = f"studio/{job.id}/original.mp4?download"
        row.append(tag("a", esc(words("download_original")), class_="btn", href=address, download=True))
    return tag("div", "".join(row), class_="row actions")


def _details(words: Words, job: Job) -> str:
    result = job.result or {}
    timings = result["timings"]
    peaks = timings.get("peak_vram") or {}
    head = [words("stage"), words("time")] + ([words("allocated"), words("reserved")] if peaks else [])
    rows = []
    for stage in STAGES:
        if stage in timings["seconds"]:
            cells = [words("phase_" + stage), numbers.seconds(timings["seconds"][stage])]
            if peaks:
                peak = peaks.get(stage)
                cells += [numbers.memory(peak["allocated"]), numbers.memory(peak["reserved"])] if peak else ["–", "–"]
            rows.append(cells)
            if stage == "denoise":
                rows += _expert_rows(words, timings)
    stages = table(head, rows)
    guidance = " / ".join(f"{scale:g}" for scale in job.request.guidance)
    facts = [
        (words("device"), result.get("device", "")),
        (words("attention"), attention_line(result)),
        (words("peak_ram"), numbers.memory(timings["peak_rss"])),
        (words("prompt_tokens"), ", ".join(f"{words(k)} {v}" for k, v in (result.get("text_tokens") or {}).items())),
        ("LoRA", _lora_line(words, result)),
        (words("files"), _file_lines(result)),
        (words("weights"), _read_line(words, result.get("load") or {})),
        (words("memory"), str((result.get("plan") or {}).get("reason", ""))),
        (words("shift"), f"{job.request.shift:g}"),
        (words("guidance"), guidance if any(job.request.guided) else words("off")),
        (words("departs"), departures(words, job.request)),
        (words("restart"), went_on(words, result.get("resumed_after", 0), job.request.steps)),
        (words("run"), job.id),
    ]
    items = (tag("dt", esc(name)) + tag("dd", esc(value)) for name, value in facts if value)
    return tag("div", stages + tag("dl", "".join(items), class_="facts"), class_="details")


def _expert_rows(words: Words, timings: Mapping[str, Any]) -> list[list[str]]:
    rows = []
    for expert in ("high", "low"):
        times = [step["seconds"] for step in timings.get("steps", ()) if step.get("expert") == expert]
        if times:
            mean = numbers.seconds(sum(times) / len(times))
            rows.append([words("each_expert", expert=words("expert_" + expert)), f"{len(times)} × {mean}"])
    return rows


READ_FROM = {
    "page cache": "read_from_cache",
    "disk": "read_from_disk",
    "both": "read_from_both",
    "unknown": "read_from_unknown",
}


def _read_line(words: Words, load: Mapping[str, Any]) -> str:
    """How fast the weights came into place, and where from."""
    if not load.get("bytes"):
        return ""
    size, time = numbers.size(load["bytes"]), numbers.seconds(load["seconds"])
    return words(READ_FROM[load["source"]], size=size, time=time)


def _lora_line(words: Words, result: Mapping[str, Any]) -> str:
    """How many tensors of each LoRA matched, and how its expert and its scale were found."""
    return "; ".join(
        " · ".join(
            [
                words("lora_match", name=lora["path"].rsplit("/", 1)[-1], matched=lora["applied"], total=lora["total"]),
                *lora.get("notes", ()),  # none in reports from before there were any
            ]
        )
        for lora in result.get("loras", ())
    )


def _file_lines(result: Mapping[str, Any]) -> str:
    """Name, size and the beginning of the hash of each file."""
    return "; ".join(
        " ".join([file["name"], numbers.size(file["size"]), (file["sha256"] or "")[:12]]).rstrip()
        for file in result.get("files", ())
    )


def _snippets(words: Words, texts: Mapping[str, str]) -> str:
    blocks = []
    for name, text in texts.items():
        copy = button(words("copy"), "copy", kind="small", name=words("copy_what", what=name))
        code = tag("pre", tag("code", esc(text)), tabindex=0)
        blocks.append(tag("figure", tag("figcaption", esc(name) + copy) + code))
    return "".join(blocks)
