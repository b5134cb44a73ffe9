"""python -m lightx2v.calibrate: measure a model's table for MagCache, in one run without a video.

    python -m lightx2v.calibrate t2v_base --prompt "A cat surfs." --output table.json

The table belongs to the model and its shift; the prompt, the size and the number of steps change little. Put it into a
preset's JSON as magcache_ratios, or give it with --set "magcache_ratios=$(cat table.json)". Wan2.2-A14B needs none: the
authors' tables are built in.

Exit codes: 0 done, 1 failed, 2 bad usage, 130 interrupted (Ctrl-C), 143 terminated.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from .cli.parser import ArgumentParser
from .cli.runner import CommandContext, run_command
from .config.magcache_tables import MIN_CACHED_STEPS
from .config.presets import resolve
from .config.request import IMAGES, Request
from .config.request_settings import SETTINGS, SHOWN
from .errors import BadRequest, OutputError

NUMBERS = ("seed", "height", "width", "frames", "steps")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    return run_command(_parser(), _run, argv, stopped="Stopped; no table was made.")


def _run(options: argparse.Namespace, context: CommandContext) -> int:
    given = {name: value for name in (*NUMBERS, "models_dir") if (value := getattr(options, name)) is not None}
    resolved = resolve(options.preset, given | {"speed_up": 1}, environment=context.environment)
    pictures = {name: getattr(options, name) for name in IMAGES[resolved.engine.task]}
    request = Request(prompt=options.prompt, **resolved.request, **pictures)
    if request.distilled or request.steps < MIN_CACHED_STEPS:
        raise BadRequest(
            f"{options.preset} makes {request.steps} steps, and MagCache is for base models with {MIN_CACHED_STEPS} "
            "steps or more. Choose such a preset."
        )
    from .engine.calibration import calibrate
    from .engine.engine import load_engine

    with context.interrupts.cancelling() as token:
        engine = load_engine(resolved.engine, preset=resolved.preset.name, on_progress=context.progress, cancel=token)
        try:
            table = calibrate(engine, request, context.progress, token)
        finally:
            engine.placement.close()
    context.progress.clear()
    text = json.dumps(table)
    if options.output is None:
        print(text)
        return 0
    try:
        options.output.write_text(text + "\n", encoding="utf-8")
    except OSError as error:
        raise OutputError(f"{options.output} cannot be written: {error.strerror}. Choose another --output.") from None
    print(options.output)
    return 0


def _parser() -> ArgumentParser:
    summary, _, details = (__doc__ or "").partition("\n\n")
    parser = ArgumentParser(
        prog="python -m lightx2v.calibrate",
        description=summary,
        epilog=details,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("preset", metavar="PRESET", help="of a base model: a name or a JSON file")
    for name in ("prompt", "image_path", "last_frame_path"):
        row = SHOWN[name]
        parser.add_argument(row.usage, metavar=row.metavar, help=row.help, required=name == "prompt")
    for name in NUMBERS:
        row = SETTINGS[name]
        parser.add_argument(row.usage, type=int, metavar=row.metavar, help=row.help)
    parser.add_argument("--models_dir", metavar="FOLDER", help="the folder in which relative paths are looked up first")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the table there, and not to the terminal")
    parser.add_argument("--verbose", action="store_true", help="log more, and tracebacks")
    return parser


if __name__ == "__main__":
    sys.exit(main())
