"""From the fields of the page to requests, and back.

A `Form` holds what the fields say, in the types that they give. `plan` checks all of it and makes the requests of one
click; `fields_of` is the way back, for a run from the history, a dropped video or an edited job.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Self

from lightx2v.config.engine_config import EngineConfig
from lightx2v.config.lora_names import expert_of, partner_names
from lightx2v.config.presets import resolve
from lightx2v.config.request import LoraSpec, Request
from lightx2v.errors import BadRequest
from lightx2v.hub import find_lora

from ..exposure import Exposure
from ..strings import Words

LORA_ROWS = 4
OFFLOAD: dict[str, bool | str] = {"auto": "auto", "on": True, "off": False}
EXACT = "fixed_shape"
"""The resize mode of a video that is not to follow the shape of its first frame."""


class Unfilled(BadRequest):
    """A field that has to be filled in and is not; `key` names the words for it."""

    def __init__(self, key: str) -> None:
        super().__init__(Words("en")(key))
        self.key = key


@dataclass(frozen=True, slots=True, kw_only=True)
class Form:
    """The fields of the page by the names of their components; beyond these, names are those of Request."""

    task: str
    preset: str
    prompt: str = ""
    offload: str = "auto"
    image_path: str | None = None
    last_frame_path: str | None = None
    match_image: bool = True
    height: int
    width: int
    frames: int
    fps: float
    seed: int = -1
    videos: int = 1
    per_line: bool = False
    negative_prompt: str = ""
    steps: int
    shift: float
    guidance_high: float
    guidance_low: float
    enable_cfg: bool
    boundary: float | None = None
    denoising_step_list: str = ""
    boundary_step_index: int | None = None
    attention: str = "auto"
    loras: tuple[tuple[str, str, float, float], ...] = ()
    """Rows of high-noise file, low-noise file and their strengths."""

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Self:
        """From component values: numbers come as float or None, rows of LoRAs as lora_0_high and so on."""
        known = {field.name for field in fields(cls)}
        data = {name: value for name, value in values.items() if name in known}
        for name in ("prompt", "negative_prompt", "denoising_step_list"):
            data[name] = data.get(name) or ""
        for name in ("height", "width", "frames", "videos", "steps", "seed", "boundary_step_index"):
            data[name] = _whole(data.get(name), name)
        rows = []
        for row in range(LORA_ROWS):
            high, low = (str(values.get(f"lora_{row}_{part}") or "").strip() for part in ("high", "low"))
            if high or low:
                strengths = (values.get(f"lora_{row}_strength_{part}") for part in ("high", "low"))
                first, second = (1.0 if s is None else float(s) for s in strengths)
                rows.append((high, low, first, second))
        data["loras"] = tuple(rows)
        return cls(**data)


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What one click asks for: the same engine for all its requests."""

    preset: str
    config: EngineConfig
    requests: tuple[Request, ...]


def plan(form: Form, presets: Mapping[str, str], exposure: Exposure) -> Plan:
    """The requests of a form. `presets` (name -> task) are those on offer. Raises what a person can mend."""
    if form.preset not in presets or presets[form.preset] != form.task:
        raise BadRequest(f"There is no preset {form.preset[:60]!r} for {form.task}. Choose one from the list.")
    if form.task == "i2v" and not form.image_path:
        raise Unfilled("image_missing")
    resolved = resolve(form.preset, _overrides(form, exposure))
    pictures: dict[str, Any] = (
        {"image_path": form.image_path, "last_frame_path": form.last_frame_path} if form.task == "i2v" else {}
    )
    requests = []
    for number, prompt in enumerate(_prompts(form, exposure.limits.batch)):
        settings = {
            **resolved.request,
            "seed": new_seed() if form.seed == -1 else form.seed + number,
            "negative_prompt": form.negative_prompt,
        }
        request = Request(prompt=prompt, **settings, **pictures)
        exposure.limits.check(request)
        resolved.engine.check_request(request)
        requests.append(request)
    return Plan(preset=form.preset, config=resolved.engine, requests=tuple(requests))


def fields_of(preset: str, config: EngineConfig, request: Request) -> dict[str, Any]:
    """Values for the components that give this run again. Pictures and LoRAs of the preset itself are left alone."""
    offload = {True: "on", False: "off"}.get(config.cpu_offload, "auto")  # type: ignore[call-overload]
    values: dict[str, Any] = {
        "task": "t2v" if request.task == "t2v" else "i2v",
        "preset": preset,
        "offload": offload,
        "match_image": request.resize_mode is None,
        "videos": 1,
        "per_line": False,
        "guidance_high": request.guidance[0],
        "guidance_low": request.guidance[1],
        "denoising_step_list": ", ".join(map(str, request.denoising_step_list or ())),
        "attention": config.self_attn_1_type,
        "boundary": request.boundary,
        "boundary_step_index": request.boundary_step_index,
    }
    for name in ("prompt", "negative_prompt", "image_path", "last_frame_path", "height", "width", "frames", "fps"):
        values[name] = getattr(request, name)
    for name in ("seed", "steps", "shift", "enable_cfg"):
        values[name] = getattr(request, name)
    asked = config.lora_configs if request.loras is None else request.loras
    own = [lora for lora in asked if lora not in resolve(preset).engine.lora_configs]
    return values | _lora_rows(own)


def pair_of(high: str) -> str:
    """The low-noise file that belongs to a high-noise one, by its name; "" where the name does not tell."""
    return next(iter(partner_names(high)), "") if expert_of(high) == "high" else ""


def size_of(tier: int, shape: str) -> tuple[int, int]:
    """(height, width) for an area of about `tier` x `tier` and a shape such as "16:9", in whole tokens.

    The official sizes of Wan2.2 come out for the tiers 632 (480p) and 960 (720p).
    """
    official = {
        (632, "16:9"): (480, 832),
        (632, "9:16"): (832, 480),
        (960, "16:9"): (720, 1280),
        (960, "9:16"): (1280, 720),
    }
    if (tier, shape) in official:
        return official[tier, shape]
    across, down = map(int, shape.split(":"))
    ratio = (across / down) ** 0.5
    return max(32, round(tier / ratio / 16) * 16), max(32, round(tier * ratio / 16) * 16)


def frames_for(seconds: float, fps: float) -> int:
    """The count of the form 4n + 1 nearest to that many seconds."""
    return max(1, round((seconds * fps - 1) / 4) * 4 + 1)


def _overrides(form: Form, exposure: Exposure) -> dict[str, Any]:
    preset = resolve(form.preset)
    distilled = preset.request["denoising_step_list"] is not None
    values: dict[str, Any] = {name: getattr(form, name) for name in ("height", "width", "frames", "fps", "shift")}
    values |= {"enable_cfg": form.enable_cfg, "guidance": [form.guidance_high, form.guidance_low]}
    if distilled:
        values["denoising_step_list"] = _step_list(form.denoising_step_list)
        values["boundary_step_index"] = form.boundary_step_index
    else:
        values |= {"steps": form.steps, "boundary": form.boundary}
    if form.task == "i2v":
        values["task"] = "flf2v" if form.last_frame_path else "i2v"
        values["resize_mode"] = None if form.match_image else EXACT
    if not exposure.shows_paths:
        return values
    if form.offload not in OFFLOAD:
        raise BadRequest(f"offload is {form.offload[:40]!r}; expected auto, on or off.")
    values["cpu_offload"] = OFFLOAD[form.offload]
    if form.attention != "auto":
        values |= {"self_attn_1_type": form.attention, "cross_attn_1_type": form.attention}
    if specs := _lora_specs(form.loras):  # on top of the preset's own; exchanged between runs without loading again
        for lora in specs:
            find_lora(lora.path, preset.engine)  # said now, and not when its turn has come
        values["loras"] = [*preset.engine.lora_configs, *specs]
    return values


def _lora_specs(rows: tuple[tuple[str, str, float, float], ...]) -> list[LoraSpec]:
    specs = []
    for high, low, strength_high, strength_low in rows:
        specs += [LoraSpec(expert="high", path=high, strength=strength_high)] if high else []
        specs += [LoraSpec(expert="low", path=low, strength=strength_low)] if low else []
    return specs


def _lora_rows(loras: list[LoraSpec]) -> dict[str, Any]:
    highs, lows = ([lora for lora in loras if lora.expert == expert] for expert in ("high", "low"))
    values: dict[str, Any] = {}
    for row in range(LORA_ROWS):
        for part, found in (("high", highs), ("low", lows)):
            lora = found[row] if row < len(found) else None
            values[f"lora_{row}_{part}"] = lora.path if lora else ""
            values[f"lora_{row}_strength_{part}"] = lora.strength if lora else 1.0
    return values


def _prompts(form: Form, most: int) -> list[str]:
    lines = [line.strip() for line in form.prompt.splitlines() if line.strip()] if form.per_line else [form.prompt]
    if not any(line.strip() for line in lines):
        raise Unfilled("prompt_empty")
    if not 1 <= form.videos <= most:
        raise BadRequest(f"videos is {form.videos}; expected a number from 1 to {most}.")
    if len(lines) * form.videos > most:
        raise BadRequest(f"That is {len(lines) * form.videos} videos; one click can queue {most}. Ask for fewer.")
    return [line for line in lines for _ in range(form.videos)]


def new_seed() -> int:
    """Drawn when a job is queued, so that no run, not even an interrupted one, has an unknown seed."""
    return secrets.randbelow(2**31)


def _step_list(text: str) -> list[int]:
    parts = [part for part in re.split(r"[\s,;，]+", text.strip("[] \n")) if part]
    if not all(part.isdecimal() and len(part) <= 4 for part in parts):
        raise BadRequest(f"denoising_step_list is {text[:60]!r}; expected timesteps such as 1000, 750, 500, 250.")
    return [int(part) for part in parts]


def _whole(value: Any, name: str) -> Any:
    """A number field gives float; what is no whole number stays, for Request to refuse with its nearest valid one."""
    if value is None:
        if name in ("boundary_step_index", "seed", "videos"):
            return {"seed": -1, "videos": 1}.get(name)
        raise BadRequest(f"{name} is empty; enter a number.")
    return int(value) if isinstance(value, float) and value.is_integer() else value
