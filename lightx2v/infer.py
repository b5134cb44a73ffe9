"""python -m lightx2v.infer: one video from the command line.

    python -m lightx2v.infer --preset demo_t2v_distill_lora --prompt "a red ball rolls left over green grass"
    python -m lightx2v.infer --model_cls wan2.2_moe --task t2v --model_path Wan-AI/Wan2.2-T2V-A14B \\
        --config_json presets/t2v_base.json --prompt "A cat surfs." --save_result_path cat.mp4
    python -m lightx2v.infer --from cat.mp4 --seed 7

Exit codes: 0 done, 1 failed, 2 bad usage, 130 interrupted (Ctrl-C), 143 terminated.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

from .cli.parser import ArgumentParser
from .cli.signals import ECHO, Interrupts
from .cli.terminal import ProgressLine, ended, logging_to, one_line
from .config.engine_config import EngineConfig, hub_name
from .config.environment import Environment
from .config.lightx2v_keys import PER_VIDEO
from .config.presets import Resolved, list_presets, resolve
from .config.recorded_settings import PICTURES, find_picture
from .config.request import Request
from .cost.machine import MachineReader
from .cost.memory_forecast import forecast_for_gpu, forecast_for_machine
from .errors import BadRequest, ConfigError, short_path
from .hub import find_all
from .loading import preload
from .media.framing import RESIZE_MODES
from .progress import CancelToken, OnProgress, log_duration

log = logging.getLogger("lightx2v.infer")


class Outcome(Protocol):
    """What a run gives back, as far as it is shown here."""

    @property
    def path(self) -> str | None: ...

    def report(self) -> dict[str, Any]: ...


class LoadedEngine(Protocol):
    """What can run a request: LightX2VPipeline, or a stand-in in tests."""

    def run(
        self,
        request: Request,
        *,
        save_result_path: str | Path | None = None,
        on_progress: OnProgress | None = None,
        cancel: CancelToken | None = None,
        metadata: bool = True,
        force: bool = False,
    ) -> Outcome: ...

    def close(self) -> None: ...


OpenEngine = Callable[[EngineConfig, str, OnProgress], LoadedEngine]
"""Loads an engine: its configuration, the preset's name, where progress goes."""


def main(argv: Sequence[str] | None = None, *, open_engine: OpenEngine | None = None) -> int:
    """Runs the command line and returns its exit code. `open_engine` replaces what loads the model."""
    try:
        options = _parser().parse(argv)
    except SystemExit as stop:  # argparse has said what is wrong, or shown the help
        return int(stop.code or 0)
    try:
        environment = Environment.read()
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    line = ProgressLine(sys.stderr)
    level = logging.DEBUG if options.verbose else logging.INFO
    echo = ECHO if environment.distributed else 0.0
    with logging_to(sys.stderr, line, level, prefix=environment.log_prefix), Interrupts(echo=echo) as interrupts:
        run = partial(_run, options, environment, line, interrupts, open_engine or _load_pipeline)
        return ended(run, line, interrupts, stopped="Stopped; no video was written.", tell=not environment.rank)


def _run(
    options: argparse.Namespace,
    environment: Environment,
    line: ProgressLine,
    interrupts: Interrupts,
    open_engine: OpenEngine,
) -> int:
    leads = environment.rank == 0
    on_progress = line if leads else lambda _: None
    if not leads and (options.list_presets or options.dry_run):
        return 0
    if options.list_presets:
        for info in list_presets():
            print(f"{info.name:<32} {info.title}")
        return 0
    resolved, shown = _settings(options, environment)
    if options.dry_run:
        print(json.dumps(_dry_run(resolved, shown, options.card), indent=2, ensure_ascii=False))
        return 0
    if options.card is not None:
        raise BadRequest("--card only asks whether a run would fit. Add --dry_run, or leave it out.")
    if "prompt" not in shown:
        raise BadRequest('There is no prompt. Describe the video: --prompt "a cat surfs".')
    resolved.engine.check_world(environment.world_size or 1, enable_cfg=resolved.request["enable_cfg"])
    request = Request.from_json(resolved.request | shown)
    if request.seed == -1:
        from .sampling import draw_seed  # here and not above: --dry_run and mistakes should not wait for torch

        request = replace(request, seed=draw_seed())
    _check_pictures(request)
    path = _output_path(options, resolved, request, environment) if leads else None
    with log_duration("Total Cost"):
        engine = open_engine(resolved.engine, resolved.preset.name, on_progress)
        try:
            with interrupts.cancelling() as token:
                result = engine.run(
                    request,
                    save_result_path=path,
                    on_progress=on_progress,
                    cancel=token,
                    metadata=not options.no_metadata,
                    force=options.force,
                )
        finally:
            engine.close()
    line.clear()
    if not leads:
        return 0
    print(result.path)
    print(_summary(result.report()))
    return 0


def _load_pipeline(config: EngineConfig, preset: str, on_progress: OnProgress) -> LoadedEngine:
    if Environment.read().rank == 0:  # the others need no text encoder
        preload.start()
    from .pipeline import LightX2VPipeline

    return LightX2VPipeline.from_config(config, preset=preset, on_progress=on_progress)


# ---- what is asked for ----------------------------------------------------------------------------------------------


def _settings(options: argparse.Namespace, environment: Environment) -> tuple[Resolved, dict[str, Any]]:
    """The resolved preset, and what to show: the fields of Request that no preset has."""
    shown: dict[str, Any] = {}
    preset: str | dict[str, Any]
    if options.from_video is not None:
        preset, shown = _recorded(options.from_video, [key for key in PICTURES if getattr(options, key) is not None])
    elif options.preset or options.config_json:
        preset = options.preset or options.config_json
    elif options.model_path:
        preset = {}
    else:
        raise ConfigError("Say what to run: --preset NAME or --config_json FILE. --list_presets shows the names.")
    given = {key: value for key, value in vars(options).items() if key in _OVERRIDES and value not in (None, "")}
    if "guidance" in given and len(given["guidance"]) == 1:
        given["guidance"] = given["guidance"][0]
    if options.strict_attention:
        given["attention_strict"] = True
    if options.target_shape:
        given["target_shape"] = options.target_shape
    for key, value in options.set:
        if key in given:
            raise ConfigError(f"{key} is given twice, as a flag and with --set. Keep one of them.")
        if key in PER_VIDEO:
            raise ConfigError(f"{key} cannot be given with --set. Use --{key}.")
        given[key] = value
    shown |= {key: getattr(options, key) for key in PER_VIDEO if getattr(options, key) is not None}
    resolved = resolve(preset, given, environment=environment)
    if options.from_video is not None and (name := shown.pop("preset")):
        resolved = replace(resolved, preset=replace(resolved.preset, name=name))
    return resolved, shown


def _recorded(video: str, given: Sequence[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The settings inside one of our videos: those of a preset, and what it shows (with its preset's name). Its
    pictures are looked for, but for those that are `given`."""
    from .media.mp4 import read_settings

    settings = read_settings(video)
    engine, request = settings.get("engine"), settings.get("request")
    if not isinstance(engine, dict) or not isinstance(request, dict):
        raise BadRequest("The settings in this video have no engine and no request; it cannot be repeated.")
    shown = {key: request[key] for key in PER_VIDEO if key in request}
    for key in PICTURES:
        if shown.get(key) and key not in given:
            if (picture := find_picture(settings, key, video)) is None:
                name = one_line(short_path(str(shown[key])))[:100]
                raise BadRequest(
                    f"The picture {name} that this video was made from is neither here nor beside the video, or its "
                    f"content has changed. Give it with --{key}."
                )
            shown[key] = str(picture)
    # The class follows from the step list: a request may have one even where the engine was loaded without.
    # And the number of processes is this run's own; it changes nothing in the video.
    engine = {key: value for key, value in engine.items() if key not in ("model_cls", "parallel")}
    values = {key: value for key, value in request.items() if key not in PER_VIDEO}
    return engine | values, shown | {"preset": str(settings.get("preset") or "")}


def _check_pictures(request: Request) -> None:
    """A file that is no picture is said now, and not after minutes of loading."""
    if request.image_path:
        from .media.images import load_image

        for path in (request.image_path, request.last_frame_path):
            if path:
                load_image(path)


def _output_path(options: argparse.Namespace, resolved: Resolved, request: Request, environment: Environment) -> Path:
    """Where the video goes; checked before anything is loaded, and its folder made."""
    from .media.video_writer import check_output_path

    if options.save_result_path:
        path = Path(options.save_result_path)
    else:
        stamp = time.strftime("%Y%m%d-%H%M%S")
        name = f"{Path(resolved.preset.name).name or resolved.preset.task}_{request.seed}_{stamp}.mp4"
        path = Path(environment.output_dir or "outputs") / name
    if os.path.exists(path) and not options.force:  # False, unlike Path.exists, where the name is impossible
        raise BadRequest(f"{path} exists. Choose another --save_result_path, or add --force to replace it.")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BadRequest(f"The folder {path.parent} cannot be made: {error.strerror}. Choose another one.") from None
    return check_output_path(path, force=options.force)


# ---- what is shown --------------------------------------------------------------------------------------------------


def _dry_run(resolved: Resolved, shown: dict[str, Any], card: float | None) -> dict[str, Any]:
    """The resolved configuration and what a run of it would take, here or on another `card`. Looks for local files and
    at the machine, and at nothing else."""
    stand_in = {"prompt": "prompt", "image_path": "image", "last_frame_path": "image"}
    needed = {"t2v": ("prompt",), "i2v": ("prompt", "image_path"), "flf2v": tuple(stand_in)}[resolved.engine.task]
    request = Request.from_json(resolved.request | {key: stand_in[key] for key in needed if key not in shown} | shown)
    engine = resolved.engine
    guided = request.guided
    files = []
    for name, place in find_all(engine).items():
        hub = hub_name(name)
        source = None if hub is None else {"repo": hub[0], "file": hub[1]}
        files.append({"name": name, "here": place is not None, "hub": source})
    if card is None:
        here = MachineReader()()
        device, memory = here.name, forecast_for_machine(engine, request, here)
    else:
        device, memory = f"a card of {card:g} GB", forecast_for_gpu(engine, request, card)
    return {
        "preset": asdict(resolved.preset),
        "engine": engine.to_json(),
        "request": {key: value for key, value in request.to_json().items() if key in shown or key not in PER_VIDEO},
        "plan": {
            "files": files,
            "latent_shape": list(request.latent_shape),
            "tokens": request.tokens,
            "steps": request.steps,
            "forwards_per_step": {"high": 1 + guided[0], "low": 1 + guided[1]},
            "seconds_of_video": request.seconds,
            "processes": resolved.preset.gpus,
            "memory": {"device": device, **memory.to_json()},
        },
        "notes": list(resolved.warnings),
    }


def _summary(report: dict[str, Any]) -> str:
    """A finished run in three lines, one more for each LoRA and each warning."""
    timings = report["timings"]
    stages = ", ".join(f"{name} {seconds:.2f}" for name, seconds in timings["seconds"].items())
    memory = f"{timings['peak_rss'] / 2**30:.2f} GiB of RAM"
    if timings["peak_vram"]:
        allocated = max(peak["allocated"] for peak in timings["peak_vram"].values())
        reserved = max(peak["reserved"] for peak in timings["peak_vram"].values())
        memory = f"{allocated / 2**30:.2f} GiB of GPU memory ({reserved / 2**30:.2f} GiB reserved), {memory}"
    for process in report.get("processes", [])[1:]:
        peaks = (process["timings"]["peak_vram"] or {}).values()
        allocated = max((peak["allocated"] for peak in peaks), default=0) / 2**30
        memory += f"; process {process['rank']} " + (f"{allocated:.2f} GiB of GPU memory, " if allocated else "")
        memory += f"{process['timings']['peak_rss'] / 2**30:.2f} GiB of RAM"
    lines = [
        f"{report['width']}x{report['height']}, {report['frames']} frames, {report['fps']:g} fps, seed "
        f"{report['seed']}, {report['device']}",
        f"{timings['total']:.2f} s: {stages}",
        f"peak {memory}",
    ]
    lines += [
        f"LoRA {one_line(lora['path'])}: {lora['applied']} of {lora['total']} layers on the {lora['expert']}-noise "
        f"expert, strength {lora['strength']:g}"
        for lora in report.get("loras", [])
    ]
    return "\n".join(lines + [f"warning: {one_line(text)}" for text in report["warnings"]])


# ---- the flags ------------------------------------------------------------------------------------------------------

_OVERRIDES = frozenset(
    """
    model_cls task model_path models_dir seed height width frames steps shift guidance fps boundary enable_cfg
    resize_mode
    """.split()
)
"""Flags whose names are those of fields, so that they go into `resolve` as they are."""


def _parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="python -m lightx2v.infer",
        usage="python -m lightx2v.infer --preset NAME --prompt TEXT [options]",
        description="Makes one video with Wan2.2 from a prompt, and an image for i2v.",
        epilog="Exit codes: 0 done, 1 failed, 2 bad usage, 130 interrupted, 143 terminated.",
        allow_abbrev=False,
    )
    group = parser.add_argument_group("what to run, one of")
    add = group.add_mutually_exclusive_group().add_argument
    add("--preset", metavar="NAME", help="a preset by its name, e.g. t2v_distill_lora")
    add("--config_json", metavar="FILE", help="a preset from a JSON file in LightX2V's format")
    add("--from", dest="from_video", metavar="VIDEO", help="the settings inside an mp4 made here, to repeat it")
    add("--list_presets", action="store_true", help="list the presets and exit")

    add = parser.add_argument_group("what it shows").add_argument
    add("--prompt", metavar="TEXT", help="what happens in the video")
    add("--negative_prompt", metavar="TEXT", help='what should not; "" is the model\'s default, " " nothing')
    add("--image_path", metavar="IMAGE", help="first frame, for i2v and flf2v")
    add("--last_frame_path", metavar="IMAGE", help="last frame, for flf2v")

    add = parser.add_argument_group("over the preset: this video").add_argument
    add("--seed", type=int, metavar="N", help="-1 draws one")
    add("--height", type=int, metavar="PIXELS", help="a multiple of 16; with an image, height x width is an area")
    add("--width", type=int, metavar="PIXELS")
    add("--target_shape", type=int, nargs=2, metavar=("H", "W"), help="height and width in one")
    add("--frames", "--num_frames", type=int, metavar="N", help="4n + 1")
    add("--fps", type=float, metavar="N", help="frames per second of the file")
    add("--steps", type=int, metavar="N", help="denoising steps of a base model")
    add("--shift", type=float, metavar="X", help="shift of the noise levels")
    add("--guidance", type=float, nargs="+", metavar="X", help="for both experts, or high-noise then low-noise")
    add("--enable_cfg", action=argparse.BooleanOptionalAction, default=None, help="guidance, at twice the time")
    add("--boundary", type=float, metavar="X", help="share of the noise levels below which the low-noise expert works")
    add("--resize_mode", metavar="MODE", help=f"how an image is fitted: {', '.join(RESIZE_MODES)}")

    add = parser.add_argument_group("over the preset: the engine").add_argument
    add("--task", choices=("t2v", "i2v", "flf2v"))
    add("--model_cls", metavar="CLASS", help="wan2.2_moe or wan2.2_moe_distill")
    add("--model_path", metavar="PATH", help="a folder, or a Hub name such as Wan-AI/Wan2.2-T2V-A14B")
    add("--models_dir", metavar="FOLDER", help="where relative paths are looked for first")
    add("--strict_attention", action="store_true", help="fail where the attention backend asked for cannot run")
    add(
        "--set",
        type=_assignment,
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="any other key of a preset, its value as JSON, e.g. cpu_offload=true; may be repeated",
    )

    add = parser.add_argument_group("output").add_argument
    add("--save_result_path", metavar="FILE", help="default: outputs/<preset>_<seed>_<time>.mp4")
    add("--force", action="store_true", help="replace the file if it exists")
    add("--no_metadata", action="store_true", help="do not write the prompt and the settings into the file")
    add(
        "--dry_run",
        action="store_true",
        help="print the resolved configuration, plan and memory as JSON; load and fetch nothing",
    )
    add("--card", type=_card, metavar="GB", help="with --dry_run: on a card of that size instead of this machine's")
    add("--verbose", action="store_true", help="log more, and tracebacks")
    add("--return_result_tensor", action="store_true", help=argparse.SUPPRESS)  # LightX2V's; means nothing here
    return parser


def _assignment(text: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise argparse.ArgumentTypeError(f"{text!r} is not KEY=VALUE")
    try:
        return key.strip(), json.loads(value, parse_constant=_no_constant)
    except (ValueError, RecursionError):
        return key.strip(), value


def _card(text: str) -> float:
    try:
        size = float(text)
    except ValueError:
        size = 0.0
    if not 1 <= size <= 10_000:
        raise argparse.ArgumentTypeError(f"{text!r} is no size from 1 to 10000")
    return size


def _no_constant(word: str) -> Any:
    raise ValueError(word)


def _unexpected(kind: type[BaseException], error: BaseException, at: TracebackType | None) -> None:
    """Instead of a traceback, for what nobody foresaw."""
    print(f"\nerror: unexpected {kind.__name__}: {one_line(str(error))[:500]}", file=sys.stderr)
    print("This is a fault in the program. Run it again with --verbose to see where.", file=sys.stderr)


if __name__ == "__main__":
    if "--verbose" not in sys.argv:
        sys.excepthook = _unexpected
    sys.exit(main())
