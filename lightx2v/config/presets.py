"""Presets: a JSON file, a shipped name or a mapping becomes an EngineConfig and the settings of a Request.

The only reader of JSON settings. Overrides win over the preset, and the preset wins over the dataclass defaults. Preset
files are LightX2V's flat JSON, and its files load unchanged; ours have one more key, "preset", with title and summary.
`lightx2v_keys.py` lists the keys; `engine_config.py` and `request.py` check the values.
"""

import json
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, NoReturn

from ..errors import BadRequest, ConfigError, LightX2VError, quoted, short_path
from .checks import Checks, did_you_mean
from .engine_config import EngineConfig, ParallelConfig
from .environment import Environment
from .folders import expand
from .gguf_formats import is_gguf
from .lightx2v_keys import PER_VIDEO, Keys, sort_keys
from .model_paths import PROJECT
from .request import IMAGES, TASKS, Request
from .user_presets import user_preset, user_presets

log = logging.getLogger("lightx2v.config")

PRESETS = PROJECT / "presets"
MAX_JSON_BYTES = 1 << 20
VARIANTS = ("base", "hybrid", "three_phase", "distill_lora", "distill_merged", "distill_gguf", "distill_fp8")
"""From slow to fast."""
AIMS = ("draft", "fast", "balanced", "best")
"""What a person may want of a preset, from the fewest seconds to the best video."""
_AIM_OF = {"base": "best", "hybrid": "balanced", "three_phase": "balanced", "distill_lora": "fast"}
_AIM_OF |= {"distill_merged": "fast", "distill_gguf": "draft", "distill_fp8": "draft"}
BOUNDARIES = ("boundary", "boundary_step_index")
"""The short ways to say where the low-noise expert takes over. Phases stand in their place."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PresetInfo:
    """A preset as a list shows it. `lightx2v` is the path of LightX2V's own file with these settings, `gpus` the number
    of processes that it is for."""

    name: str
    title: str
    summary: str = ""
    task: str = "t2v"
    variant: str = "base"
    lightx2v: str | None = None
    offload: bool = False
    gpus: int = 1

    @property
    def aim(self) -> str:
        """What it is for, one of AIMS."""
        return _AIM_OF[self.variant]

    @property
    def demo(self) -> bool:
        """Whether it runs the small bundled model."""
        return self.name.startswith("demo_")


@dataclass(frozen=True, slots=True, kw_only=True)
class Resolved:
    """`request` has every field of Request except PER_VIDEO: Request(prompt=…, image_path=…, **resolved.request).

    `warnings` name the accepted keys that have no effect.
    """

    preset: PresetInfo
    engine: EngineConfig
    request: dict[str, Any]
    warnings: tuple[str, ...] = ()


def resolve(
    preset: str | Path | Mapping[str, Any],
    overrides: Mapping[str, Any] | None = None,
    *,
    environment: Environment | None = None,
) -> Resolved:
    """Resolve a preset, with `overrides` over its values.

    `preset` is the name of a shipped preset, a JSON file, or an object like one. An override key is a field of Request
    or EngineConfig, or any key of a preset file. With an `environment`, a missing models_dir is filled in, and the
    layout must fit torchrun's processes. Raises ConfigError if the preset or the combination is wrong, BadRequest if an
    override is.
    """
    overrides = {} if overrides is None else overrides
    name, data, warnings = _open(preset)
    source = short_path(name, 1) if name else "settings"
    about = data.pop("preset", {})
    # A script whose $model_path is not set passes an empty one, which must not replace the preset's.
    overrides = {key: value for key, value in overrides.items() if not (key == "model_path" and value == "")}
    base, override = sort_keys(data, source), sort_keys(overrides, "override")
    engine_values, request_values = base.engine | override.engine, _replaced(base, override) | override.request
    _match_model_class(source, engine_values, request_values, override)
    if environment is not None and environment.models_dir and not engine_values.get("models_dir"):
        engine_values["models_dir"] = environment.models_dir
    try:
        engine = EngineConfig(**engine_values)
    except ConfigError as error:
        message = str(error)
        by_override = message.split(" ", 1)[0] in override.spelled
        raise ConfigError(message if by_override else f"{source}: {message}") from None
    request = _check_together(source, engine, request_values, base, override)
    if environment is not None and environment.world_size is not None:
        guided = any(request.guided)
        if engine.parallel is None and environment.world_size > 1:
            layout = ParallelConfig.for_world(environment.world_size, enable_cfg=guided)
            engine = replace(engine, parallel=layout)
        engine.check_world(environment.world_size, enable_cfg=guided)
    info = _describe(name, about, engine, request, moved="model_path" in override.spelled)
    warnings = (*warnings, *base.warnings, *override.warnings)
    for warning in warnings:
        log.info("%s", warning)
    kept = {field.name: getattr(request, field.name) for field in fields(Request) if field.name not in PER_VIDEO}
    return Resolved(preset=info, engine=engine, request=kept, warnings=warnings)


def shipped_names() -> set[str]:
    return {path.stem for path in PRESETS.glob("*.json")}


def list_user_presets() -> list[PresetInfo]:
    """Every preset that the user saved. One that no longer resolves is left out, with a line in the log."""
    found = []
    for name in sorted(user_presets().keys() - shipped_names()):
        try:
            found.append(resolve(name).preset)
        except LightX2VError as error:
            log.warning("The preset %s is left out: %s", name, error)
    return found


def list_presets() -> list[PresetInfo]:
    """Every shipped preset: demo presets first, then by task, from the slowest variant to the fastest."""
    found = [resolve(name).preset for name in shipped_names()]
    order = lambda info: (not info.demo, info.gpus, info.offload, info.task != "t2v", VARIANTS.index(info.variant))  # noqa: E731
    return sorted(found, key=lambda info: (order(info), info.name))


def preset_content(title: str, engine: EngineConfig, request: Request) -> dict[str, Any]:
    """The content of a preset file with which `resolve` gives this engine and these settings; defaults stay out."""
    variant = _variant(engine, request)
    content: dict[str, Any] = {"preset": {"title": title, "task": engine.task, "variant": variant}}
    content |= {"model_cls": engine.model_cls, "task": engine.task}
    standard = EngineConfig(task=engine.task).to_json()
    content |= {key: value for key, value in engine.to_json().items() if value != standard[key] and key not in content}
    pictures: dict[str, Any] = dict.fromkeys(IMAGES[engine.task], "picture.png")
    usual = Request(task=engine.task, prompt="prompt", **pictures).to_json()
    left_out = {*PER_VIDEO, *content, "seed"}
    content |= {key: value for key, value in request.to_json().items() if value != usual[key] and key not in left_out}
    return content


def is_preset(name: str | Path) -> bool:
    """Whether `resolve` finds a preset under this name or path."""
    try:
        _open(name)
    except ConfigError:
        return False
    return True


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Anything else, or a key given twice, is a ConfigError that names file and line."""
    name = short_path(path)
    try:
        raw = path.read_bytes() if path.stat().st_size <= MAX_JSON_BYTES else None
    except OSError as error:
        raise ConfigError(f"{name} cannot be read: {error.strerror}. Check the path.") from None
    if raw is None:
        raise ConfigError(f"{name} is larger than {MAX_JSON_BYTES} bytes, so it is not a preset.")
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{name} is not UTF-8 text (byte {error.start}). Save it as UTF-8.") from None

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        keys = [key for key, _ in items]
        for key in keys:
            if keys.count(key) > 1:
                raise ConfigError(f"{name}: the key {quoted(key)} is given twice. Keep one of them.")
        return dict(items)

    def constant(word: str) -> NoReturn:
        raise ConfigError(f"{name}: {word} is not a number in JSON. Write a finite number.")

    try:
        data = json.loads(text, object_pairs_hook=pairs, parse_constant=constant)
    except json.JSONDecodeError as error:
        raise ConfigError(
            f"{name} is not valid JSON: line {error.lineno}, column {error.colno}: {error.msg}."
        ) from None
    except RecursionError:
        raise ConfigError(f"{name} is nested too deeply to be a preset.") from None
    except ValueError:  # an integer of more digits than Python converts
        raise ConfigError(f"{name}: a number in it is too long.") from None
    if not isinstance(data, dict):
        raise ConfigError(f"{name} holds a {type(data).__name__}; expected one object: {{…}}.")
    return data


def _open(preset: str | Path | Mapping[str, Any]) -> tuple[str, dict[str, Any], tuple[str, ...]]:
    """(name, content, warnings) of a preset in any of its forms. An object has no name."""
    if isinstance(preset, Mapping):
        return "", dict(preset), ()
    if not isinstance(preset, (str, Path)) or not str(preset).strip() or "\0" in str(preset):
        raise ConfigError(f"preset is {quoted(preset)}; expected a name, a JSON file or an object.")
    path = expand(preset)
    shipped = PRESETS / f"{preset}.json"
    # os.path.isfile is False where the name is impossible; Path.is_file raises.
    if isinstance(preset, str) and path.name == preset and os.path.isfile(shipped):
        return preset, read_json(shipped), ()
    if isinstance(preset, str) and (own := user_preset(preset)) is not None:
        return preset, read_json(own), ()
    if os.path.isfile(path):
        return path.name, read_json(path), ()
    if (same := _same_as(path)) is not None:
        warning = (
            f"{short_path(path)} is not there; the preset {same.stem} has the settings of LightX2V's file of that name."
        )
        return same.stem, read_json(same), (warning,)
    names = sorted(shipped_names() | user_presets().keys())
    hint = did_you_mean(path.stem, names)
    shown = ", ".join(name for name in names if not name.endswith(("_offload", "_cfg_ulysses")))
    raise ConfigError(
        f"There is no preset and no file {short_path(path)}. {hint} Presets: {shown}, and some of these with "
        "_offload or _cfg_ulysses."
    )


def _same_as(path: Path) -> Path | None:
    """The shipped preset for the path of one of LightX2V's own files, e.g. configs/wan22/wan_moe_t2v.json."""
    if path.suffix != ".json" or "configs" not in path.parts:
        return None
    after = len(path.parts) - path.parts[::-1].index("configs") - 1
    wanted = "/".join(path.parts[after:])
    for candidate in sorted(PRESETS.glob("*.json")):
        about = read_json(candidate).get("preset")
        if isinstance(about, dict) and about.get("lightx2v") == wanted:
            return candidate
    return None


def _replaced(base: Keys, override: Keys) -> dict[str, Any]:
    """The preset's values, without those in whose place an override stands: phases or a boundary."""
    said = {name for name, value in override.request.items() if value is not None}
    gone = set(BOUNDARIES) if "phases" in said else {"phases"} if said & set(BOUNDARIES) else set()
    return {name: value for name, value in base.request.items() if name not in gone}


def _match_model_class(source: str, engine: dict[str, Any], request: dict[str, Any], override: Keys) -> None:
    """The model class must agree with the step list. If the class is missing, the step list decides it."""
    steps = request.get("denoising_step_list")
    distilled = steps is not None
    named = engine.get("model_cls")
    if named is None:
        engine["model_cls"] = "wan2.2_moe_distill" if distilled else "wan2.2_moe"
    elif named == "wan2.2_moe_distill" and not distilled:
        raise ConfigError(
            f"{source}: model_cls is wan2.2_moe_distill, but there is no denoising_step_list. Choose a preset of a "
            "distilled model, or use model_cls wan2.2_moe."
        )
    elif named == "wan2.2_moe" and distilled:
        raise ConfigError(
            f"{source}: model_cls is wan2.2_moe, but denoising_step_list is for distilled models. Use model_cls "
            "wan2.2_moe_distill, or remove denoising_step_list and boundary_step_index."
        )
    if not distilled:
        return
    # As in LightX2V: a distilled model has guidance in its weights, so guidance is off unless a setting turns it on.
    request.setdefault("enable_cfg", False)
    if isinstance(steps, (list, tuple)) and override.request.get("steps", len(steps)) != len(steps):
        raise BadRequest(
            f"steps is {quoted(override.request['steps'])}, but a distilled model makes the {len(steps)} steps of its "
            "denoising_step_list. Leave steps out, or change denoising_step_list."
        )
    if override.request.get("boundary") is not None:
        raise BadRequest("boundary is for base models. A distilled one changes experts at boundary_step_index.")


def _check_together(source: str, engine: EngineConfig, values: dict[str, Any], base: Keys, override: Keys) -> Request:
    """A Request of these values, with placeholders for PER_VIDEO. An error blames an override if one caused it."""
    placeholders = dict.fromkeys(IMAGES[engine.task], "picture.png")
    try:
        request = Request(**{**values, "task": engine.task, "prompt": "prompt", **placeholders})
        engine.check_request(request)
        return request
    except ConfigError as error:
        raise ConfigError(f"{source}: {error}") from None
    except BadRequest as error:
        message = str(error)
    name = message.split(" ", 1)[0]
    if name in override.spelled:
        raise BadRequest(_respelled(message, name, override))
    if override.request and name not in base.spelled:
        raise BadRequest(message)
    raise ConfigError(f"{source}: {_respelled(message, name, base)}")


def _respelled(message: str, name: str, keys: Keys) -> str:
    """`message` about the field `name`, with the key that the user wrote."""
    return keys.spelled[name] + message.removeprefix(name) if name in keys.spelled else message


def _describe(name: str, about: Any, engine: EngineConfig, request: Request, *, moved: bool) -> PresetInfo:
    """`moved`: an override names another model, so the task of the preset need not match."""
    source = short_path(name, 1) if name else "settings"
    where = f"{source}: preset"
    check = Checks(ConfigError)
    check.known_keys(about, _ABOUT, where)
    for key, value in about.items():
        if not isinstance(value, str):
            check.bad(f"{where}.{key}", value, "text")
    variant = check.one_of(f"{where}.variant", about.get("variant", _variant(engine, request)), VARIANTS)
    if "task" in about:
        check.one_of(f"{where}.task", about["task"], TASKS)
    if "task" in about and not moved and (about["task"] == "t2v") != (engine.task == "t2v"):
        raise ConfigError(
            f"The preset {source} is for {about['task']}, not for {engine.task}. Choose a preset for {engine.task}, or "
            "give the model_path of a model for it."
        )
    return PresetInfo(
        name=name.removesuffix(".json"),
        title=about["title"] if "title" in about else name,
        summary=about["summary"] if "summary" in about else "",
        task=engine.task,
        variant=variant,
        lightx2v=about["lightx2v"] if "lightx2v" in about else None,
        offload=engine.cpu_offload is True,
        gpus=engine.parallel.world_size if engine.parallel else 1,
    )


_ABOUT = ("title", "summary", "task", "variant", "lightx2v")


def _variant(engine: EngineConfig, request: Request) -> str:
    if not request.distilled:
        if any(lora.varies for lora in engine.lora_configs):
            return "three_phase"
        return "hybrid" if engine.lora_configs and request.guided == (True, False) else "base"
    if is_gguf(engine.high_noise_quantized_ckpt or engine.high_noise_original_ckpt, engine.dit_quant_scheme):
        return "distill_gguf"
    if engine.dit_quantized:
        return "distill_fp8"
    return "distill_lora" if engine.lora_configs and not engine.build else "distill_merged"
