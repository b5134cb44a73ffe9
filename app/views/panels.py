"""The fixed panels: header, preset list, cost line, crop preview, model files."""

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

from PIL import Image

from lightx2v.cost.machine import Machine
from lightx2v.cost.run_time import Prediction
from lightx2v.jobs.pool import WorkerState
from lightx2v.media.framing import Framing
from lightx2v.media.images import jpeg

from ..backend.model_files import FilesStatus
from ..exposure import Exposure
from ..strings import LANGUAGES, Words
from . import numbers
from .html import button, esc, tag
from .workers import worker_chips

TIGHT = 0.9
"""A run that needs more than this share of the free memory is marked as tight: other programs need some too."""

TOO_SLOW = 48 * 3600
"""Above this many seconds the page says "days" instead of a number."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PresetOption:
    """A preset in the list, with its cost on this machine."""

    name: str
    title: str
    about: str
    prediction: Prediction | None
    need: int | None
    files: FilesStatus
    group: str = ""
    """ "found" files, the user's "own" presets, or what one that comes with the program is for (AIMS). "" has no
    heading."""

    @property
    def named(self) -> bool:
        """Whether a person named it."""
        return self.group in ("found", "own")


def header(
    words: Words,
    machine: Machine,
    loaded: str,
    exposure: Exposure,
    *,
    alive: bool,
    workers: Sequence[WorkerState] | None = None,
) -> str:
    """The header: name, machine, loaded model, language and theme. The `workers` where jobs run on several, instead of
    the model; what each does is for the page's owner only."""
    if machine.vram_free is not None and machine.vram_total is not None:
        free = words("memory_free", free=numbers.memory(machine.vram_free), total=numbers.memory(machine.vram_total))
        name = f"{machine.name} · {free}"
    else:
        name = words("cores", name=machine.name, n=machine.cores)
    ram = words("ram_free", free=numbers.memory(machine.ram_free), total=numbers.memory(machine.ram_total))
    state = tag("i", "", class_="dot ok" if alive else "dot bad")
    chips = [
        tag("span", state + esc(name if alive else words("worker_dead")), class_="chip"),
        tag("span", esc(ram), class_="chip"),
    ]
    if workers is None:
        text = words("loaded", name=loaded) if loaded else words("nothing_loaded")
        chips.append(tag("span", esc(text), class_="chip"))
    else:
        chips += worker_chips(words, workers, each=exposure.shows_paths)
    chips.append(
        tag("span", esc(words("connection_lost")), class_="chip badge lost", role="alert")
    )  # shown by the script
    if exposure.open_to_others and not exposure.hosted:
        text = words("shared") if exposure.auth else words("public")
        chips.append(tag("span", esc(text), class_="chip badge", role="status"))
    languages = "".join(_language(name, label, chosen=words.language == name) for name, label in LANGUAGES.items())
    half = '<svg viewBox="0 0 16 16" width="16" height="16" aria-hidden="true"><circle cx="8" cy="8" r="6" fill="none" '
    half += 'stroke="currentColor" stroke-width="1.5"/><path d="M8 2a6 6 0 0 1 0 12z" fill="currentColor"/></svg>'
    theme = tag("button", half, type="button", class_="btn icon", data_act="theme", aria_label=words("theme"))
    tools = tag("div", languages, class_="segment", role="group", aria_label=words("language")) + theme
    title = tag("h1", esc(words("title")) + tag("small", "Wan2.2-A14B"))
    content = title + tag("div", "".join(chips), class_="chips", tabindex=0, role="group", aria_label=words("machine"))
    return tag("header", content + tag("div", tools, class_="tools"), class_="top")


def preset_list(words: Words, presets: Sequence[PresetOption], chosen: str, room: int | None, *, more: int = 0) -> str:
    """A button with the chosen preset, and the list of all presets with time, memory and download size.

    `room` is the VRAM in bytes that a run may use, None without a GPU. `more` found models are not in the list.
    """
    current = next((option for option in presets if option.name == chosen), presets[0])
    options = ""
    for group, members in groupby(presets, key=lambda option: option.group):
        if group:
            key = {"found": "my_files", "own": "own_presets"}.get(group, f"aim_{group}")
            options += tag("li", esc(words(key)), role="presentation", class_="group")
        options += "".join(_option(words, option, room, chosen=option is current) for option in members)
        if group == "found" and more:
            options += tag("li", esc(words("found_more", n=more)), role="presentation", class_="group")
    label = tag("span", esc(words("preset")), class_="label", id="preset-label")
    face = tag("span", esc(current.title), class_="name") + tag("span", "", class_="caret", aria_hidden="true")
    combo = tag(
        "button", face, type="button", class_="select", role="combobox", aria_haspopup="listbox", aria_expanded="false",
        aria_controls="preset-options", aria_labelledby="preset-label", id="preset-button",
    )  # fmt: skip
    box = tag("ul", options, role="listbox", id="preset-options", hidden=True, aria_labelledby="preset-label")
    return tag("div", label + combo + box, class_="picker")


def cost_line(
    words: Words,
    prediction: Prediction | None,
    need: int | None,
    files: FilesStatus,
    room: int | None,
    count: int,
    *,
    unknown: Sequence[str] = (),
    reserve: int | None = None,
    departs: str = "",
) -> str:
    """The line under the button: time, memory needed of the `room` there is, and bytes to download.

    `count` videos are to be made. The time leaves out the stages in `unknown`. `reserve`: ZeroGPU seconds. `departs`
    names what changes the result.
    """
    parts = [_time(words, prediction, count, unknown)]
    if departs:
        parts.append(esc(departs))
    if need is not None and room is not None:
        level, key = _level(need, room)
        text = words(key, need=numbers.memory(need), free=numbers.memory(room))
        parts.append(tag("span", esc(text), class_=level))
    parts.append(esc(words("zerogpu_reserves", n=reserve) if reserve is not None else _download_size(words, files)))
    return tag("p", " · ".join(parts), class_="cost", role="status")


def demo_note(words: Words, unknown: Sequence[str]) -> str:
    """Names the words of a prompt that the demo model does not know. Without any the line stays, empty."""
    text = words("demo_unknown", words=", ".join(unknown)) if unknown else ""
    return tag("p", esc(text), class_="cost one-line", role="status", title=text or None)


def notice(words: Words, key: str, act: str, label: str, **values: object) -> str:
    """A line beside Generate that says what it will do besides the obvious, and a button with the way out."""
    text = tag("span", esc(words(key, **values)))
    return tag("p", text + button(words(label), act, kind="small"), class_="notice-line", role="status")


def problem(message: str) -> str:
    """An error in place of the cost line."""
    return tag("p", esc(message), class_="cost problem", role="alert")


def crop_preview(words: Words, picture: Image.Image | None, framing: Framing | None) -> str:
    """The picture, with everything dimmed that the model does not see."""
    if picture is None or framing is None:
        return tag("p", esc(words("crop_none")), class_="quiet crop-empty")
    data = base64.b64encode(jpeg(picture, max_side=320)).decode()
    left, top, right, bottom = framing.box
    width, height = picture.size
    shares = (left / width, top / height, (right - left) / width, (bottom - top) / height)
    names = ("left", "top", "width", "height")
    style = ";".join(f"{name}:{100 * share:.3f}%" for name, share in zip(names, shares, strict=True))
    image = tag("img", src=f"data:image/jpeg;base64,{data}", alt="")
    figure = tag("div", image + tag("i", "", class_="window", style=style), class_="crop")
    sizes = words("crop_sizes", from_size=f"{width} × {height}", to_size=f"{framing.width} × {framing.height}")
    whole = framing.box == (0, 0, width, height)
    text = tag("strong", esc(sizes)) + tag("p", esc(words("crop_whole" if whole else "crop_part")), class_="quiet")
    return tag("div", figure + tag("div", text), class_="crop-row")


def file_list(words: Words, status: FilesStatus) -> str:
    """The model's files with their sizes and whether they are here; the download; free disk space."""
    rows = []
    for file in status.files:
        state = tag("span", esc(words("have" if file.ready else "lacks")), class_="ok" if file.ready else "over")
        size = numbers.size(file.bytes or file.here) if file.bytes or file.here else ""
        name = esc(words("part_" + part_of(file.name))) + tag("span", esc(file.name))
        rows.append(tag("tr", tag("th", name, scope="row") + tag("td", esc(size)) + tag("td", state)))
    table = tag("table", tag("tbody", "".join(rows)), class_="files")
    line = tag("span", esc(words("disk_free", size=numbers.size(status.disk_free))), class_="quiet")
    download = status.download
    if download is not None and (download.error or not status.ready):
        share = 100 * download.done / download.total if download.total else 0
        left = words("left", time=numbers.about(download.eta)) if download.eta is not None else words("estimating")
        text = words(
            "download_speed", done=numbers.size(download.done), all=numbers.size(download.total),
            speed=numbers.size(download.per_second), left=left,
        )  # fmt: skip
        bar = tag("i", tag("b", "", style=f"width:{share:.1f}%"), class_="bar")
        line = bar + tag("span", esc(download.error or text)) + button(words("cancel"), "cancel_download") + line
    elif status.can_download and not status.ready:
        line = button(words("download"), "download", kind="primary") + line
    return tag("div", table + tag("div", line, class_="row"), class_="files-panel")


def part_of(name: str) -> str:
    """The part of the model that a file is, from its name."""
    known = (
        ("lora", "lora"), ("config.json", "config"), ("high_noise", "high"), ("low_noise", "low"), ("t5_umt5", "text"),
        ("umt5-xxl", "tokenizer"), ("VAE", "vae"),
    )  # fmt: skip
    return next((part for mark, part in known if mark in name), "other")


def files_title(words: Words, status: FilesStatus) -> str:
    have = sum(file.ready for file in status.files)
    size = sum(file.bytes or file.here for file in status.files)
    return f"{words('files')} — " + words("files_state", have=have, all=len(status.files), size=numbers.size(size))


def _language(name: str, label: str, *, chosen: bool) -> str:
    return tag(
        "button", esc(label), type="button", class_="btn flat", data_act="language", data_name=name, lang=name,
        aria_pressed="true" if chosen else "false",
    )  # fmt: skip


def _option(words: Words, option: PresetOption, room: int | None, *, chosen: bool) -> str:
    need, time = "", "–"
    if option.need is not None:
        level = _level(option.need, room)[0] if room is not None else ""
        need = tag("span", esc(numbers.memory(option.need)), class_=f"need {level}")
    if option.prediction is not None:
        seconds = option.prediction.seconds
        time = words("days") if seconds > TOO_SLOW else f"≈ {numbers.about(seconds)}"
    size = esc(_download_size(words, option.files, short=True))
    disk = tag("span", size, class_="disk ok" if option.files.ready else "disk")
    name = tag("span", esc(option.title), class_="name") + tag("span", esc(option.about), class_="about")
    cells = name + tag("span", esc(time), class_="time") + need + disk
    selected = "true" if chosen else "false"
    return tag(
        "li", cells, role="option", id=f"option-{option.name}", data_name=option.name, aria_selected=selected,
        class_=option.group if option.named else None, title=option.name if option.named else None,
    )  # fmt: skip


def _level(need: int, free: int) -> tuple[str, str]:
    """CSS class and text key for a need of memory and what is free."""
    if need > free:
        return "over", "cost_over"
    return ("tight", "cost_tight") if need > TIGHT * free else ("ok", "cost_fits")


def _time(words: Words, prediction: Prediction | None, count: int, unknown: Sequence[str]) -> str:
    if prediction is None:
        return esc(words("cost_unknown"))
    if prediction.seconds > TOO_SLOW:
        return tag("strong", esc(words("cost_days")))
    load = prediction.stages.get("load", 0.0) if count > 1 else 0.0  # several videos load only once
    key = "cost_assumed" if prediction.source == "assumed" else "cost_time"
    text = words(key, time=numbers.about(prediction.seconds - load))
    more = [words(f"cost_{stage}") for stage in dict.fromkeys([*(["load"] if load else []), *unknown])]
    return tag("strong", esc(" ".join([text if count == 1 else f"{count} × {text}", *more])))


def _download_size(words: Words, files: FilesStatus, *, short: bool = False) -> str:
    if files.ready:
        return words("ready" if short else "cost_cached" if files.cached else "cost_ready")
    if files.missing_bytes is None:
        return words("missing")
    size = numbers.size(files.missing_bytes)
    return f"{size} ↓" if short else words("cost_download", size=size)
