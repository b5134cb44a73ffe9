"""python -m lightx2v.infer: make one video from the command line.

    python -m lightx2v.infer --preset demo_t2v_distill_lora --prompt "a red ball rolls left over green grass"
    python -m lightx2v.infer --model_cls wan2.2_moe --task t2v --model_path Wan-AI/Wan2.2-T2V-A14B \\
        --config_json presets/t2v_base.json --prompt "A cat surfs." --save_result_path cat.mp4
    python -m lightx2v.infer --from cat.mp4 --seed 7

After Ctrl+C or a crash the same command with --resume goes on at the saved step, which lies beside the video.

Exit codes: 0 done, 1 failed, 2 bad usage, 130 interrupted (Ctrl-C), 143 terminated.
"""

import argparse
import json
import logging
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

from .catalog.choose import FileChoice, add_file_flags, named_preset, open_catalog
from .catalog.used_files import find_again
from .cli.parser import ArgumentParser, add_save_every
from .cli.runner import CommandContext, run_command
from .cli.terminal import PATIENCE, takes_lines
from .config.engine_config import MODEL_CLASSES, EngineConfig, hub_name
from .config.environment import Environment
from .config.folders import output_folder, use_temporary
from .config.lightx2v_keys import PER_VIDEO
from .config.magcache import forwards_of
from .config.model_paths import RIFE
from .config.presets import Resolved, resolve
from .config.recorded_settings import PICTURES, find_picture
from .config.request import IMAGES, TASKS, Request, draw_seed
from .config.request_settings import SETTINGS, SHOWN, Guidance, Setting
from .config.schedule import schedule_of
from .cost.machine import MachineReader
from .cost.memory_forecast import forecast_for_gpu, forecast_for_machine
from .errors import BadRequest, CheckpointError, ConfigError, LightX2VError, OutputError, one_line, quoted, short_path
from .hub import find_all
from .jobs.engine_slot import Engine, OpenEngine
from .jobs.preset_list import preset_lines
from .loading import preload
from .progress import CancelToken, log_duration, read_words, went_on
from .step_file import StepFile

log = logging.getLogger("lightx2v.infer")


def main(argv: Sequence[str] | None = None, *, open_engine: OpenEngine | None = None) -> int:
    """Run the command line and return its exit code. `open_engine` replaces the loader of the model."""
    body = partial(_run, open_engine=open_engine or _load_pipeline)
    return run_command(_parser(), body, argv, stopped="Stopped; no video was written.")


def _run(options: argparse.Namespace, context: CommandContext, *, open_engine: OpenEngine) -> int:
    environment = context.environment
    is_rank0 = environment.rank == 0
    on_progress = context.progress if is_rank0 else lambda _: None
    if not is_rank0 and (options.list_presets or options.dry_run):
        return 0
    if options.list_presets:
        for line in preset_lines(output_folder(environment.output_dir)):
            print(line)
        return 0
    resolved, shown = _settings(options, environment)
    if options.dry_run:
        print(json.dumps(_dry_run(resolved, shown, options.card), indent=2, ensure_ascii=False))
        return 0
    if options.card is not None:
        raise BadRequest("--card plans memory and needs --dry_run. Add --dry_run, or leave --card out.")
    if "prompt" not in shown:
        raise BadRequest('There is no prompt. Describe the video: --prompt "a cat surfs".')
    resolved.engine.check_world(environment.world_size or 1, enable_cfg=resolved.request["enable_cfg"])
    request = Request.from_json(resolved.request | shown)
    _check_pictures(request)
    named = options.save_result_path
    folder = Path(named).parent if named else output_folder(environment.output_dir)
    use_temporary(folder)
    steps = None
    if is_rank0:
        request, steps = _output(options, resolved, request, folder)
    with log_duration("Total Cost"):
        # A signal during loading ends the process at once, so the token for it is never set.
        more = {"preset": resolved.preset.name, "prompts": tuple(request.texts.values())}
        engine = open_engine(resolved.engine, on_progress=on_progress, cancel=CancelToken(), **more)
        try:
            with context.interrupts.cancelling() as token:
                result = engine.run(
                    request,
                    save_result_path=steps and steps.video,
                    on_progress=on_progress,
                    cancel=token,
                    metadata=not options.no_metadata,
                    force=options.force,
                    steps=steps,
                )
        except LightX2VError:
            if steps is not None and steps.exists():
                log.info("A step is saved. The same command with --resume goes on from there.")
            raise
        finally:
            engine.close()
    context.progress.clear()
    if steps is not None:
        steps.remove()
    if is_rank0 and takes_lines(sys.stdout, PATIENCE):  # the video is there, whether or not anybody reads this
        report = result.report()
        print(report["path"], _summary(report), sep="\n")
    return 0


def _load_pipeline(config: EngineConfig, **more: Any) -> Engine:
    if Environment.read().rank == 0:  # the others need no text encoder
        preload.start()
    from .pipeline import LightX2VPipeline

    return LightX2VPipeline.from_config(config, **more)


# ---- settings -------------------------------------------------------------------------------------------------------


def _settings(options: argparse.Namespace, environment: Environment) -> tuple[Resolved, dict[str, Any]]:
    """The resolved preset, and the fields of Request that no preset has (PER_VIDEO)."""
    shown: dict[str, Any] = {}
    files = FileChoice.of(options)
    preset: str | Path | dict[str, Any]
    if options.from_video is not None:
        given_pictures = [key for key in PICTURES if getattr(options, key) is not None]
        preset, shown = _recorded(options.from_video, given_pictures, files)
    elif options.preset or options.config_json:
        preset = named_preset(options.preset or options.config_json, files.model_dirs)
    elif options.model_path or files.names_experts:
        preset = {}
    else:
        raise ConfigError(
            "No preset is given. Use --preset NAME or --config_json FILE; --list_presets shows the names. Or name the "
            "model's files with --high FILE --low FILE."
        )
    if files.names_experts:
        preset = files.settings(preset)
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
    given |= files.overrides(preset)
    shown |= {key: getattr(options, key) for key in PER_VIDEO if getattr(options, key) is not None}
    resolved = resolve(preset, given, environment=environment)
    name = shown.pop("preset", "") or (preset.get("preset", {}).get("title", "") if isinstance(preset, dict) else "")
    if name:
        resolved = replace(resolved, preset=replace(resolved.preset, name=name))
    return resolved, shown


def _recorded(video: str, given: Sequence[str], files: FileChoice) -> tuple[dict[str, Any], dict[str, Any]]:
    """The settings inside a video: those of a preset, and those of PER_VIDEO together with the preset's name. Finds the
    pictures except the `given` ones, and the model's files except those that `files` names."""
    from .media.mp4 import read_settings

    settings = read_settings(video)
    engine, request = settings.get("engine"), settings.get("request")
    if not isinstance(engine, dict) or not isinstance(request, dict):
        raise BadRequest("The settings in this video lack the engine or the request. Use a video made by this program.")
    shown = {key: request[key] for key in PER_VIDEO if key in request}
    for key in PICTURES:
        if shown.get(key) and key not in given:
            if (picture := find_picture(settings, key, video)) is None:
                name = short_path(str(shown[key]))
                raise BadRequest(
                    f"The picture {name} of this video is neither in this folder nor beside the video, or its content "
                    f"has changed. Give it with --{key}."
                )
            shown[key] = str(picture)
    # The class follows from the step list of the request. The others belong to this run and do not change the video.
    engine = {key: value for key, value in engine.items() if key not in ("model_cls", "parallel", "vram_gb")}
    values = {key: value for key, value in request.items() if key not in PER_VIDEO}
    named = {part for part in ("t5", "vae") if getattr(files, part)} | (
        {"high", "low"} if files.names_experts else set()
    )
    places = find_again(engine | values, settings.get("files"), lambda: open_catalog(files.model_dirs), named)
    return places, shown | {"preset": str(settings.get("preset") or "")}


def _check_pictures(request: Request) -> None:
    """Refuse a file that is no picture now, and not after minutes of loading."""
    if request.image_path:
        from .media.images import load_image

        for path in (request.image_path, request.last_frame_path):
            if path:
                load_image(path)


def _output(
    options: argparse.Namespace, resolved: Resolved, request: Request, folder: Path
) -> tuple[Request, StepFile]:
    """The request with its seed, and the file of its steps, which knows the path of the video."""
    path = None
    if options.save_result_path:
        path = Path(options.save_result_path)
    elif options.resume:
        path = _interrupted(folder, resolved, request)
    if request.seed == -1 and not (options.resume and path):  # the saved step has the seed
        request = replace(request, seed=draw_seed())
    if path is None:
        stamp = time.strftime("%Y%m%d-%H%M%S")
        path = folder / f"{Path(resolved.preset.name).name or resolved.preset.task}_{request.seed}_{stamp}.mp4"
    steps = StepFile(_checked_path(path, options), options.save_every, resume=options.resume)
    if options.resume and not steps.exists():
        log.warning("There is no saved step of this video to go on from; it begins at the first step.")
    elif steps.exists() and not options.resume:
        log.warning("An earlier run of this video has saved a step. With --resume, this command goes on from there.")
    return request, steps


def _interrupted(folder: Path, resolved: Resolved, request: Request) -> Path | None:
    """The video of the newest saved step in the folder that is of this request."""
    from .engine.saved_step import SavedStep, fits

    for steps in StepFile.all_in(folder):
        try:
            data = steps.read()
            if data is not None and fits(SavedStep.from_bytes(data), resolved.engine, request):
                return steps.video
        except (CheckpointError, OutputError) as error:
            log.warning("%s is not used: %s", steps.path.name, error)
    return None


def _checked_path(path: Path, options: argparse.Namespace) -> Path:
    """Check the path of the video before the model loads. Creates its folder."""
    from .media.video_writer import check_output_path

    if os.path.exists(path) and not options.force:  # unlike Path.exists, False for an impossible name
        raise BadRequest(f"{path} exists. Choose another --save_result_path, or add --force to replace it.")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BadRequest(
            f"The folder {path.parent} cannot be created: {error.strerror}. Choose another with "
            "--save_result_path or LIGHTX2V_OUTPUT_DIR."
        ) from None
    return check_output_path(path, force=options.force)


# ---- output ---------------------------------------------------------------------------------------------------------


def _dry_run(resolved: Resolved, shown: dict[str, Any], card: float | None) -> dict[str, Any]:
    """The resolved configuration and the cost of a run, on this machine or on a GPU of `card` GB. Reads local files
    and the state of the machine, and nothing else."""
    placeholders = dict.fromkeys(("prompt", *IMAGES[resolved.engine.task]), "placeholder")
    request = Request.from_json(resolved.request | placeholders | shown)
    engine = resolved.engine
    files = []
    for name, place in find_all(engine, (RIFE,) if request.interpolator == "rife" else ()).items():
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
            "forwards": forwards_of(request).to_json(),
            "phases": schedule_of(request).to_json(),
            "seconds_of_video": request.seconds,
            "video": {"frames": request.video_frames, "fps": request.video_fps},
            "processes": resolved.preset.gpus,
            "memory": {"device": device, **memory.to_json()},
        },
        "notes": list(resolved.warnings),
    }


def _summary(report: dict[str, Any]) -> str:
    """A finished run in four lines, and one more for each LoRA and each warning."""
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
        f"weights: {read_words(report['load'])}",
        f"peak {memory}",
    ]
    if skipped := report["forwards"].get("skipped"):
        lines.append(f"{skipped} of {skipped + report['forwards']['computed']} evaluations skipped")
    if after := report["resumed_after"]:
        lines.append(went_on(after, report["request"]["steps"]))
    lines += [
        f"LoRA {one_line(lora['path'])}: {lora['applied']} of {lora['total']} layers on the {lora['expert']}-noise "
        f"expert, strength {'/'.join(f'{each:g}' for each in strengths)}. {one_line(' '.join(lora['notes']))}"
        for lora in report.get("loras", [])
        for strengths in [lora["strength"] if isinstance(lora["strength"], list) else [lora["strength"]]]
    ]
    return "\n".join(lines + [f"warning: {one_line(text)}" for text in report["warnings"]])


# ---- the flags ------------------------------------------------------------------------------------------------------

_ENGINE_FLAGS = ("model_cls", "task", "model_path", "models_dir", "vram_gb")
_OVERRIDES = frozenset({*_ENGINE_FLAGS, *(name for name, row in SETTINGS.items() if row.flag)})
"""Flags with the names of fields, which `resolve` takes as they are."""

Add = Callable[..., Any]
"""`add_argument` of one group of flags."""


def _parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="python -m lightx2v.infer",
        usage="python -m lightx2v.infer --preset NAME --prompt TEXT [options]",
        description="Makes one video with Wan2.2 from a prompt, and for i2v from an image.",
        epilog="Exit codes: 0 done, 1 failed, 2 bad usage, 130 interrupted, 143 terminated.",
        allow_abbrev=False,
    )
    group = parser.add_argument_group("what to run, one of")
    add = group.add_mutually_exclusive_group().add_argument
    add("--preset", metavar="NAME", help="a preset by its name, e.g. t2v_distill_lora")
    add("--config_json", metavar="FILE", help="a preset from a JSON file in LightX2V's format")
    add("--from", dest="from_video", metavar="VIDEO", help="the settings inside an mp4 made here, to repeat it")
    add("--list_presets", action="store_true", help="list the presets with their time on this machine, and exit")
    _add_settings(parser.add_argument_group("what it shows").add_argument, SHOWN)
    add = parser.add_argument_group("settings of this video, which override the preset").add_argument
    _add_settings(add, SETTINGS)
    add("--target_shape", type=int, nargs=2, metavar=("H", "W"), help="height and width in one")
    add_file_flags(parser.add_argument_group("files of your own").add_argument)
    _add_engine_flags(parser.add_argument_group("settings of the engine, which override the preset").add_argument)
    _add_output_flags(parser.add_argument_group("output").add_argument)
    return parser


def _add_settings(add: Add, rows: Mapping[str, Setting]) -> None:
    kinds: dict[Any, dict[str, Any]] = {
        int: {"type": int},
        float: {"type": float},
        Guidance: {"type": float, "nargs": "+"},
        str: {},
    }
    for row in rows.values():
        if row.type is bool:
            add(row.usage, action=argparse.BooleanOptionalAction, default=None, help=row.help)
        elif row.flag:
            names = (row.usage, "--num_frames") if row.name == "frames" else (row.usage,)
            add(*names, metavar=row.metavar, help=row.help, **kinds[row.type])


def _add_engine_flags(add: Add) -> None:
    add("--task", choices=TASKS)
    add("--model_cls", metavar="CLASS", help=" or ".join(MODEL_CLASSES))
    add("--model_path", metavar="PATH", help="a folder, or a Hub name such as Wan-AI/Wan2.2-T2V-A14B")
    add("--models_dir", metavar="FOLDER", help="the folder in which relative paths are looked up first")
    add("--vram_gb", type=float, metavar="N", help="use at most N GB of the GPU (default: all that is free)")
    add("--strict_attention", action="store_true", help="fail if the chosen attention backend cannot run")
    add(
        "--set",
        type=_assignment,
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="any other key of a preset, its value as JSON, e.g. cpu_offload=true; may be repeated",
    )


def _add_output_flags(add: Add) -> None:
    add("--save_result_path", metavar="FILE", help="default: outputs/<preset>_<seed>_<time>.mp4")
    add("--force", action="store_true", help="replace the file if it exists")
    add("--resume", action="store_true", help="go on from the step that this command saved before it was stopped")
    add_save_every(add)
    add("--no_metadata", action="store_true", help="do not write the prompt and the settings into the file")
    add(
        "--dry_run",
        action="store_true",
        help="print the resolved configuration, plan and memory as JSON; load and download nothing",
    )
    add("--card", type=_card, metavar="GB", help="with --dry_run: plan for a GPU of that size instead of this machine")
    add("--verbose", action="store_true", help="log more, and tracebacks")
    add("--return_result_tensor", action="store_true", help=argparse.SUPPRESS)  # LightX2V's; has no effect here


def _assignment(text: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise argparse.ArgumentTypeError(f"{quoted(text)} is not KEY=VALUE")
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
        raise argparse.ArgumentTypeError(f"{quoted(text)} is no size from 1 to 10000 GB")
    return size


def _no_constant(word: str) -> Any:
    raise ValueError(word)


def _unexpected(kind: type[BaseException], error: BaseException, at: TracebackType | None) -> None:
    """One line instead of a traceback, for errors that are faults of the program."""
    print(f"\nerror: unexpected {kind.__name__}: {one_line(str(error))[:500]}", file=sys.stderr)
    print("This is a fault in the program. Run it again with --verbose to see where.", file=sys.stderr)


if __name__ == "__main__":
    if "--verbose" not in sys.argv:
        sys.excepthook = _unexpected
    sys.exit(main())
