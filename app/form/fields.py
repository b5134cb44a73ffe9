"""The fields of the page as a `Form`, and the conversion of a Form to Requests and back.

A `Form` holds the values of the fields, in gradio's types. `submit_plan` checks them and makes one click's requests.
`fields_of` converts a run from the history, a dropped video or an edited job back to fields.
"""

import json
import re
import secrets
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from itertools import product
from pathlib import Path, PureWindowsPath
from typing import Any, Self

from lightx2v.config.engine_config import EngineConfig
from lightx2v.config.lora_names import expert_of, partner_names
from lightx2v.config.lora_spec import LoraSpec
from lightx2v.config.phases import phases_from
from lightx2v.config.presets import Resolved, resolve
from lightx2v.config.prompt_cleaning import is_blank
from lightx2v.config.recorded_settings import PICTURES
from lightx2v.config.request import Request
from lightx2v.config.request_settings import SETTINGS, PhaseList, Setting, StepList
from lightx2v.errors import BadRequest, one_line, quoted
from lightx2v.hub import find_lora

from ..backend.offer import FILE_FIELDS, Offer
from ..exposure import Exposure
from ..strings import Words

LORA_ROWS = 4
MAX_MISSING = 300
"""Letters of the names of what is missing."""
OFFLOAD: dict[str, bool | str] = {"auto": "auto", "on": True, "off": False}
EXACT = "fixed_shape"
"""The resize mode of a video that ignores the shape of its first frame."""
CACHING = ("feature_caching", *(name for name in SETTINGS if name.startswith("magcache_")))
SPEEDS: dict[str, float | None] = {"exact": 1.0, "1.5x": 1.5, "2x": 2.0, "preset": None}
"""The choices of the field `speed_up`. The last one is for settings of MagCache in a preset's own numbers."""
OTHERS = ("seed", "guidance", "resize_mode", "speed_up", *CACHING)
CONTROLS = {name: row for name, row in SETTINGS.items() if name not in OTHERS}
"""Settings with one control each. The others: `seed` numbers the videos of a click, `guidance` has two fields,
`match_image` chooses the resize mode, and the choice `speed_up` all of MagCache."""


ZERO_IS_NONE = ("boundary", "interpolated_fps")
"""Numbers that a Request may lack. gradio's field shows 0 for them, and 0 stands for that."""


class Unfilled(BadRequest):
    """A required field is empty. `key` names the message in assets/strings.json."""

    def __init__(self, key: str) -> None:
        super().__init__(Words("en")(key))
        self.key = key


def to_field(row: Setting, value: Any) -> Any:
    """Convert a setting of a Request to the value that its control on the page holds."""
    if row.type is StepList:
        return ", ".join(map(str, value or ()))
    if row.type is PhaseList:
        return json.dumps([phase.to_json() for phase in phases_from(value) or ()]) if value else ""
    if row.name in ZERO_IS_NONE:
        return value or 0
    return value or "" if row.choices else value


def from_field(row: Setting, value: Any) -> Any:
    """Convert a control's value back to the setting. Request checks it: its error names the nearest valid value."""
    if row.type is StepList:
        return _step_list(value or "")
    if row.type is PhaseList:
        return _phase_list(value or "")
    if row.name in ZERO_IS_NONE:
        return value or None
    return _whole(row.name, value) if row.type is int else value or None if row.choices else value


def setting_fields(request: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a Request, by the names of the page's fields."""
    values = {name: to_field(row, request[name]) for name, row in CONTROLS.items()}
    high, low = request["guidance"]
    values |= {"guidance_high": high, "guidance_low": low, "match_image": request["resize_mode"] is None}
    return values | {"speed_up": speed_of(request)}


def speed_of(request: Mapping[str, Any]) -> str:
    """The choice of SPEEDS for a Request, the nearest one if it asks for another speed-up."""
    if request["feature_caching"] == "NoCaching":
        return "exact"
    if (asked := request["speed_up"]) is None:
        return "preset"
    return min(SPEEDS, key=lambda name: abs((SPEEDS[name] or 100) - asked))


@dataclass(frozen=True, slots=True, kw_only=True)
class Form:
    """The fields of the page, as gradio gives them. `settings` are those of CONTROLS."""

    task: str
    preset: str
    prompt: str = ""
    negative_prompt: str = ""
    image_path: str | None = None
    last_frame_path: str | None = None
    match_image: bool = True
    seed: int = -1
    videos: int = 1
    per_line: bool = False
    settings: Mapping[str, Any]
    guidance_high: float
    guidance_low: float
    speed_up: str = "exact"
    offload: str = "auto"
    vram_gb: float | None = None
    """0 and None: all that is free."""
    attention: str = "auto"
    loras: tuple[Mapping[str, Any], ...] = ()
    """Arguments of one LoraSpec each; a path may be the name of a found LoRA's file."""
    files: Mapping[str, str] = field(default_factory=dict)
    """The names of single files, by the fields of FILE_FIELDS."""
    missing: str = ""
    """Files of the restored run that the form cannot name; "" once the visitor goes on without them."""

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Self:
        """From component values: numbers come as float or None, rows of LoRAs as lora_0_high and so on."""
        known = {field.name for field in fields(cls)}
        data = {name: value for name, value in values.items() if name in known}
        data |= {name: data.get(name) or "" for name in ("prompt", "negative_prompt", "missing")}
        data |= {name: _whole(name, data.get(name), empty) for name, empty in (("seed", -1), ("videos", 1))}
        loras = []
        for row, expert in product(range(LORA_ROWS), ("high", "low")):
            if path := str(values.get(f"lora_{row}_{expert}") or "").strip():
                strength = values.get(f"lora_{row}_strength_{expert}")
                loras.append({"expert": expert, "path": path, "strength": 1.0 if strength is None else float(strength)})
        files = {name: str(text) for name in FILE_FIELDS if (text := values.get(name))}
        settings = {name: values.get(name) for name in CONTROLS}
        return cls(**data, loras=tuple(loras), settings=settings, files=files)


@dataclass(frozen=True, slots=True, kw_only=True)
class SubmitPlan:
    """The jobs of one click on Generate: the same engine for all its requests."""

    preset: str
    config: EngineConfig
    requests: tuple[Request, ...]


def submit_plan(form: Form, offer: Offer, exposure: Exposure) -> SubmitPlan:
    """The requests of a form. Raises errors that a user can fix."""
    if offer.tasks.get(form.preset) != form.task:
        raise BadRequest(f"There is no preset {form.preset[:60]!r} for {form.task}. Choose one from the list.")
    if form.task == "i2v" and not form.image_path:
        raise Unfilled("image_missing")
    if form.missing:
        raise BadRequest(
            f"This run used what is not here, or has no field here: {one_line(form.missing[:MAX_MISSING])}. Put the "
            "files into a folder of models and fill the run in again, choose a preset, or go on without."
        )
    content = offer.content(form.preset, form.files if exposure.shows_paths else None)
    resolved = resolve(content, _overrides(form, exposure, resolve(content)))
    if loras := _loras(form, offer, exposure, resolved.engine):
        resolved.request["loras"] = loras
    pictures = {name: getattr(form, name) for name in PICTURES} if form.task == "i2v" else {}
    requests = []
    for number, prompt in enumerate(_prompts(form, exposure.limits.batch)):
        seed = new_seed() if form.seed == -1 else form.seed + number
        own = {"prompt": prompt, "negative_prompt": form.negative_prompt, "seed": seed, **pictures}
        request = Request(**{**resolved.request, **own})
        exposure.limits.check(request)
        resolved.engine.check_request(request)
        requests.append(request)
    return SubmitPlan(preset=form.preset, config=resolved.engine, requests=tuple(requests))


def fields_of(preset: str, config: EngineConfig, request: Request, offer: Offer) -> dict[str, Any]:
    """The field values with which Generate repeats this run. The preset's own LoRAs stay out of the LoRA rows."""
    shown = ("prompt", "negative_prompt", "image_path", "last_frame_path", "seed")
    loras = config.lora_configs if request.loras is None else request.loras
    added = [lora for lora in loras if lora not in offer.settings(preset).engine.lora_configs]
    added = [replace(each, path=offer.lora_name(each.path)) for lora in added for each in offer.placed(lora)]
    rows, absent = _lora_rows(added)
    files, not_found = offer.files_of(preset, config)
    if not offer.private:
        absent += [lora.path for lora in added if lora.path not in offer.lora_files]
    return {
        **setting_fields(request.to_json()),
        **{name: getattr(request, name) for name in shown},
        "task": "t2v" if request.task == "t2v" else "i2v",
        "preset": preset,
        "offload": next(name for name, value in OFFLOAD.items() if value == config.cpu_offload),
        "vram_gb": config.vram_gb or 0,
        "attention": config.self_attn_1_type,
        "videos": 1,
        "per_line": False,
        "missing": missing_names([*not_found, *absent]),
        **files,
        **rows,
    }


def low_noise_partner(path: str) -> str:
    """The low-noise file that belongs to a high-noise one, by its name; "" if the name follows no known pattern."""
    return next(iter(partner_names(path)), "") if expert_of(path) == "high" else ""


def mixed_pair(high: str, low: str) -> bool:
    """Whether the names say that a row's two files belong to two different LoRAs."""
    return (
        bool(high and low) and expert_of(high) == "high" and expert_of(low) == "low" and low not in partner_names(high)
    )


def file_name(path: str) -> str:
    """The last part of a path of any system, or of a Hub name."""
    return PureWindowsPath(path).name


def size_of(tier: int, shape: str) -> tuple[int, int]:
    """(height, width) for an area of about `tier` x `tier` and a shape such as "16:9", in whole tokens.

    The tiers 632 (480p) and 960 (720p) give the official sizes of Wan2.2.
    """
    official = {632: (480, 832), 960: (720, 1280)}
    if tier in official and shape != "1:1":
        short, long = official[tier]
        return (short, long) if shape == "16:9" else (long, short)
    across, down = map(int, shape.split(":"))
    ratio = (across / down) ** 0.5
    return max(32, round(tier / ratio / 16) * 16), max(32, round(tier * ratio / 16) * 16)


def frames_for(seconds: float, fps: float) -> int:
    """The number of frames, of the form 4n + 1, whose duration is nearest to `seconds`."""
    return max(1, round((seconds * fps - 1) / 4) * 4 + 1)


def _overrides(form: Form, exposure: Exposure, preset: Resolved) -> dict[str, Any]:
    schedule = "shift" if preset.request["denoising_step_list"] is None else "list"
    used = {name: row for name, row in CONTROLS.items() if row.schedule in ("", schedule)}
    values: dict[str, Any] = {name: from_field(row, form.settings[name]) for name, row in used.items()}
    values["guidance"] = [form.guidance_high, form.guidance_low]
    if schedule == "shift":
        if form.speed_up not in SPEEDS:
            raise BadRequest(f"speed_up is {form.speed_up[:40]!r}; expected {', '.join(SPEEDS)}.")
        values["speed_up"] = SPEEDS[form.speed_up]
    if form.task != "i2v":
        del values["motion_amplitude"]
    else:
        values["task"] = "flf2v" if form.last_frame_path else "i2v"
        values["resize_mode"] = None if form.match_image else EXACT
    if not exposure.shows_paths:
        return values
    if form.offload not in OFFLOAD:
        raise BadRequest(f"offload is {form.offload[:40]!r}; expected auto, on or off.")
    values["cpu_offload"] = OFFLOAD[form.offload]
    if form.vram_gb:
        values["vram_gb"] = form.vram_gb
    if form.attention != "auto":
        values |= {"self_attn_1_type": form.attention, "cross_attn_1_type": form.attention}
    return values


def _loras(form: Form, offer: Offer, exposure: Exposure, engine: EngineConfig) -> tuple[LoraSpec, ...]:
    """The preset's own LoRAs and those of the form; none if the form has none. Changing them loads nothing again.

    Others can name only what the page offers them; what else their form holds is no field of theirs.
    """
    files = offer.lora_files
    named = [lora for lora in form.loras if exposure.shows_paths or lora["path"] in files]
    specs = [LoraSpec(**{**lora, "path": str(files.get(lora["path"], lora["path"]))}) for lora in named]
    for lora in specs:
        find_lora(lora.path, engine)  # raises now, and not when the job starts
    return (*engine.lora_configs, *specs) if specs else ()


def missing_names(names: Iterable[str]) -> str:
    """The field `missing`: what a run used and the form cannot name."""
    return ", ".join(dict.fromkeys(filter(None, names)))[:MAX_MISSING]


def _lora_rows(loras: list[LoraSpec]) -> tuple[dict[str, Any], list[str]]:
    """The fields of the rows, and what they cannot hold: more LoRAs than rows, a strength for each phase."""
    values: dict[str, Any] = {}
    left = [f"{Path(lora.path).name}: a strength for each phase" for lora in loras if lora.varies]
    for expert in ("high", "low"):
        rows = [(lora.path, lora.strengths[-1]) for lora in loras if lora.expert == expert]
        left += [Path(path).name for path, _ in rows[LORA_ROWS:]]
        for row, (path, strength) in enumerate([*rows, *[("", 1.0)] * LORA_ROWS][:LORA_ROWS]):
            values |= {f"lora_{row}_{expert}": path, f"lora_{row}_strength_{expert}": strength}
    return values, left


def _prompts(form: Form, most: int) -> list[str]:
    lines = [line.strip() for line in form.prompt.splitlines()] if form.per_line else [form.prompt]
    lines = [line for line in lines if not is_blank(line)]
    if not lines:
        raise Unfilled("prompt_empty")
    if not 1 <= form.videos <= most:
        raise BadRequest(f"videos is {form.videos}; expected a number from 1 to {most}.")
    if len(lines) * form.videos > most:
        raise BadRequest(f"That is {len(lines) * form.videos} videos; one click can queue {most}. Ask for fewer.")
    return [line for line in lines for _ in range(form.videos)]


def new_seed() -> int:
    """A random seed, drawn when a job is queued, so that even an interrupted run has a known seed."""
    return secrets.randbelow(2**31)


def _step_list(text: str) -> list[int]:
    parts = [part for part in re.split(r"[\s,;，]+", text.strip("[] \n")) if part]
    if not all(part.isascii() and part.isdecimal() and len(part) <= 4 for part in parts):
        raise BadRequest(f"denoising_step_list is {text[:60]!r}; expected timesteps such as 1000, 750, 500, 250.")
    return [int(part) for part in parts]


def _phase_list(text: str) -> Any:
    """The phases that the text says in JSON; None if it is empty."""
    try:
        return json.loads(text) if text.strip() else None
    except (ValueError, RecursionError):
        example = '[{"expert": "high"}, {"expert": "low", "from_step": 2}]'
        raise BadRequest(f"phases is {quoted(text)}; expected JSON such as {example}.") from None


def _whole(name: str, value: Any, empty: int | None = None) -> Any:
    """An integral float, which is what a number field gives, as int. `empty` is the value of an empty field."""
    if value is None and empty is None:
        raise BadRequest(f"{name} is empty; enter a number.")
    return empty if value is None else int(value) if isinstance(value, float) and value.is_integer() else value
