"""python -m lightx2v.convert: a checkpoint (and LoRAs) to one merged or 8-bit file that LightX2V reads too.

    python -m lightx2v.convert --source Wan2.2-T2V-A14B/high_noise_model --format fp8 \\
        --lora loras/high_noise_lora.safetensors:1.0 --output models/t2v_high_fp8.safetensors
    python -m lightx2v.convert --source models_t5_umt5-xxl-enc-bf16.pth --format fp8 --output t5_fp8.safetensors
    python -m lightx2v.convert --preset demo_t2v_fp8 --output models/demo_t2v_fp8
    python -m lightx2v.convert --list_built           the prebuilt files of presets with "build"; --tidy_built

Formats: bf16, fp16 and fp32 (LoRAs merged), fp8 (e4m3) and int8 (a scale per output channel). One tensor is in memory
at a time. An interrupted conversion continues when it is started again; a finished file is not made twice.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from .cli.parser import ArgumentParser
from .cli.runner import CommandContext, run_command
from .config.environment import Environment
from .config.folders import use_temporary
from .config.lora_names import noise_of
from .config.presets import resolve
from .errors import BadRequest, short_path

if TYPE_CHECKING:
    from .loading.conversion import Conversion

log = logging.getLogger("lightx2v.convert")

FORMATS = ("bf16", "fp16", "fp32", "fp8", "int8")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    return run_command(_parser(), _run, argv, stopped="Stopped. Start it again to continue.")


def _run(options: argparse.Namespace, context: CommandContext) -> int:
    use_temporary(options.output.parent if options.output else Path())
    if options.list_built or options.tidy_built:
        print_prebuilt(context.environment, prune=options.tidy_built)
        return 0
    from .loading.conversion import convert

    for job in _conversions(options, context.environment):
        with context.interrupts.cancelling() as token:
            convert(job, force=options.force, on_progress=context.progress, cancel=token)
        context.progress.clear()
        print(job.output)
    return 0


def print_prebuilt(environment: Environment, *, prune: bool) -> None:
    """Print the prebuilt files; with `prune`, remove and print those whose sources have changed."""
    from .loading.prebuilt_cache import PrebuiltCache, prebuilt_folder

    cache = PrebuiltCache(prebuilt_folder(None, environment))
    for file in cache.prune() if prune else cache.files():
        print(f"{file.size / 1e9:8.2f} GB  {'removed' if prune else file.state:14}  {file.path}")


def _conversions(options: argparse.Namespace, environment: Environment) -> list[Conversion]:
    if (options.preset is None) == (options.source is None):
        raise BadRequest("Give either --source, one checkpoint, or --preset, one that builds its files.")
    if options.output is None:
        raise BadRequest("--output is missing: the file to write, or with --preset a folder.")
    if options.preset is not None:
        if options.lora or options.format:
            raise BadRequest("The preset sets LoRAs and format itself. Leave --lora and --format out.")
        return preset_conversions(options.preset, options.output, environment)
    from .loading.conversion import Conversion

    loras = tuple(_lora(text) for text in options.lora)
    expert = noise_of(options.source)
    for path, _ in loras:
        if expert and noise_of(path) not in (None, expert):
            log.warning(
                "By its name %s is for the other expert than %s. It is merged, as you chose.",
                *(short_path(path), short_path(options.source)),
            )
    output_format = options.format or "bf16"
    return [Conversion(source=options.source, output=options.output, format=output_format, loras=loras, expert=expert)]


def preset_conversions(preset: str, output: Path, environment: Environment | None = None) -> list[Conversion]:
    """The files that a preset with "build" uses: both experts, and the text encoder if it is quantised."""
    from .loading.conversion import prebuilt_conversions
    from .loading.model_files import locate

    config = resolve(preset, {}, environment=environment).engine
    if config.build is None:
        raise BadRequest(f"The preset {preset} builds nothing: it uses its files as they are.")
    return list(prebuilt_conversions(locate(config), config, output, "bf16").values())


def _lora(text: str) -> tuple[Path, float]:
    """`path` or `path:strength`."""
    path, colon, number = text.rpartition(":")
    try:
        strength = float(number) if colon else 1.0
    except ValueError:
        return Path(text), 1.0
    if not abs(strength) <= 100:
        raise BadRequest(f"LoRA strength is {number}; expected a number from -100 to 100.")
    return Path(path if colon else text), strength


def _parser() -> ArgumentParser:
    summary, _, details = (__doc__ or "").partition("\n\n")
    parser = ArgumentParser(
        prog="python -m lightx2v.convert",
        description=summary,
        epilog=details,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--source", type=Path, help="a checkpoint: a file, or a folder of shards")
    parser.add_argument("--preset", help="a preset with build: all files it needs")
    parser.add_argument("--lora", action="append", default=[], metavar="FILE[:STRENGTH]", help="may be repeated")
    parser.add_argument("--format", choices=FORMATS, help="default: bf16")
    parser.add_argument("--output", type=Path, help="the file to write; with --preset, a folder")
    parser.add_argument("--force", action="store_true", help="replace an existing file")
    parser.add_argument("--list_built", action="store_true", help="list the prebuilt files of presets with build")
    parser.add_argument("--tidy_built", action="store_true", help="remove prebuilt files whose sources have changed")
    return parser


if __name__ == "__main__":
    sys.exit(main())
