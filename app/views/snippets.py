"""Snippets: one run as a command line, Python or HTTP call that repeats it, and its settings as JSON."""

import json
import shlex
from contextlib import suppress
from dataclasses import fields, replace
from pathlib import PurePath
from typing import Any

from lightx2v.config.presets import resolve
from lightx2v.config.recorded_settings import PICTURES
from lightx2v.config.request import Request
from lightx2v.config.request_settings import SETTINGS, SHOWN
from lightx2v.errors import LightX2VError
from lightx2v.jobs.store import Job

from ..exposure import ADDRESS

OVER_HTTP = {name: row.video for name, row in (SHOWN | SETTINGS).items() if row.video}
"""The names of the settings in POST /v1/videos."""


def snippets(job: Job, *, address: str = ADDRESS, key: bool = False, paths: bool = True) -> dict[str, str]:
    """{name: text} ready to copy. `address` is the page's own URL, which needs a key if `key` is set. Without `paths` a
    picture is named without its folder, so that a page for others does not reveal this machine's paths."""
    if not paths:
        bare = {name: PurePath(path).name for name in PICTURES if (path := getattr(job.request, name))}
        job = replace(job, request=replace(job.request, **bare))
    changed = changed_settings(job)
    curl = _curl(job, changed, address, key)
    return {"CLI": _cli(job, changed), "Python": _python(job, changed), "curl": curl, "JSON": _json(job)}


def changed_settings(job: Job) -> dict[str, Any]:
    """The fields of the request that differ from the preset."""
    preset: dict[str, Any] = {}
    with suppress(LightX2VError):  # the preset is gone: every setting differs from the defaults
        preset = resolve(job.preset).request if job.preset else {}
    data = job.request.to_json()
    defaults = {field.name: preset.get(field.name, field.default) for field in fields(Request)}
    changed = {name: data[name] for name, default in defaults.items() if getattr(job.request, name) != default}
    changed["seed"] = job.result["seed"] if job.result else job.request.seed
    changed.pop("task", None)
    if job.config.cpu_offload != "auto":
        changed["cpu_offload"] = job.config.cpu_offload
    if job.config.vram_gb is not None:
        changed["vram_gb"] = job.config.vram_gb
    return changed


def _cli(job: Job, changed: dict[str, Any]) -> str:
    words = ["python -m lightx2v.infer"]
    if job.preset:
        words.append(f"--preset {shlex.quote(job.preset)}")
    for name, value in changed.items():
        if name == "guidance":
            words.append(f"--guidance {value[0]:g} {value[1]:g}")
        elif name == "enable_cfg":
            words.append("--enable_cfg" if value else "--no-enable_cfg")
        elif isinstance(value, (list, dict, bool)) or value is None:
            words.append(f"--set {shlex.quote(f'{name}={json.dumps(value)}')}")
        else:
            words.append(f"--{name} {shlex.quote(str(value))}")
    words.append("--save_result_path outputs/video.mp4")
    return " \\\n  ".join(words)


def _python(job: Job, changed: dict[str, Any]) -> str:
    generate = ("prompt", "negative_prompt", "image_path", "last_frame_path", "seed")
    arguments = {name: value for name, value in changed.items() if name in generate}
    arguments["save_result_path"] = "outputs/video.mp4"
    settings = "".join(f", {name}={value!r}" for name, value in changed.items() if name not in generate)
    preset = f"config_json={f'presets/{job.preset}.json'!r}" if job.preset else ""
    lines = [
        "from lightx2v import LightX2VPipeline",
        "",
        f"pipe = LightX2VPipeline(model_cls={job.config.model_cls!r}, task={job.config.task!r})",
        f"pipe.create_generator({preset}{settings})",
        "result = pipe.generate(",
        *(f"    {name}={value!r}," for name, value in arguments.items()),
        ")",
        'print(result.path, result.timings.total, "seconds")',
    ]
    return "\n".join(lines)


def _curl(job: Job, changed: dict[str, Any], address: str, key: bool) -> str:
    words = [f"curl {address}/v1/videos"]
    if key:
        words.append('-H "Authorization: Bearer $LIGHTX2V_API_KEY"')
    if job.preset:
        words.append(f"-F model={shlex.quote(job.preset)}")
    for name, value in changed.items():
        if name in ("cpu_offload", "vram_gb") or value is None:  # the server decides on offload, not the request
            continue
        if name == "steps" and job.request.denoising_step_list is not None:  # the list sets the number of steps
            continue
        field = OVER_HTTP.get(name, name)
        if field.endswith("_reference"):
            words.append(f"-F {shlex.quote(f'{field}=@{value}')}")
        else:
            text = value if isinstance(value, str) else json.dumps(value)
            words.append(f"--form-string {shlex.quote(f'{field}={text}')}")  # -F would read a file named after @ or <
    return " \\\n  ".join(words)


def _json(job: Job) -> str:
    settings = {"preset": job.preset, "engine": job.config.to_json(), "request": job.request.to_json()}
    return json.dumps(settings, ensure_ascii=False, indent=2)
