"""python -m lightx2v.convert: a checkpoint (and LoRAs) to one merged or 8-bit file that LightX2V reads too.

    python -m lightx2v.convert --source Wan2.2-T2V-A14B/high_noise_model --format fp8 \\
        --lora loras/high_noise_lora.safetensors:1.0 --output models/t2v_high_fp8.safetensors
    python -m lightx2v.convert --source models_t5_umt5-xxl-enc-bf16.pth --format fp8 --output t5_fp8.safetensors
    python -m lightx2v.convert --preset demo_t2v_fp8 --output models/demo_t2v_fp8
    python -m lightx2v.convert --list_built           what presets with "build" have made and kept; --tidy_built

Formats: bf16, fp16 and fp32 (LoRAs merged), fp8 (e4m3) and int8 (a scale per output channel). One tensor is in memory
at a time. An interrupted run continues where it stopped when it is started again; a finished file is not made twice.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from .cli.parser import ArgumentParser
from .cli.signals import Interrupts
from .cli.terminal import ProgressLine, ended, logging_to
from .config.environment import Environment
from .config.lora_names import expert_of
from .config.presets import resolve
from .errors import BadRequest, LoraError, short_path

if TYPE_CHECKING:
    from .loading.conversion import Conversion

FORMATS = ("bf16", "fp16", "fp32", "fp8", "int8")


def preset_conversions(preset: str, output: Path, environment: Environment | None = None) -> list[Conversion]:
    """The files that a preset with "build" is made of: both experts, and the text encoder where it is quantised."""
    from .loading.conversion import prebuilt_conversions
    from .loading.model_files import locate

    config = resolve(preset, {}, environment=environment).engine
    if config.build is None:
        raise BadRequest(f"The preset {preset} builds nothing: it takes its files as they are.")
    return list(prebuilt_conversions(locate(config), config, output, "bf16").values())


def show_built(tidy: bool) -> None:
    """Prints what is kept; with `tidy`, removes what no longer belongs to anything."""
    from .loading.prebuilt_cache import PrebuiltCache, prebuilt_folder

    store = PrebuiltCache(prebuilt_folder(None, Environment.read()))
    for item in store.prune() if tidy else store.files():
        print(f"{item.size / 1e9:8.2f} GB  {'removed' if tidy else item.state:14}  {item.path}")


def main(argv: Sequence[str] | None = None) -> int:
    try:
        options = _parser().parse(argv)
    except SystemExit as stop:  # argparse has said what is wrong, or shown the help
        return int(stop.code or 0)
    line = ProgressLine(sys.stderr)
    with logging_to(sys.stderr, line, logging.INFO), Interrupts() as interrupts:
        stopped = "Stopped. Start it again to continue."
        return ended(partial(_run, options, line, interrupts), line, interrupts, stopped=stopped)


def _run(options: argparse.Namespace, line: ProgressLine, interrupts: Interrupts) -> int:
    if options.list_built or options.tidy_built:
        show_built(options.tidy_built)
        return 0
    from .loading.conversion import convert

    for job in _jobs(options):
        with interrupts.cancelling() as token:
            convert(job, force=options.force, on_progress=line, cancel=token)
        line.clear()
        print(job.output)
    return 0


def _jobs(options: argparse.Namespace) -> list[Conversion]:
    if (options.preset is None) == (options.source is None):
        raise BadRequest("Give either --source, one checkpoint, or --preset, one that builds its files.")
    if options.output is None:
        raise BadRequest("--output is missing: the file to write, or with --preset a folder.")
    if options.preset is not None:
        if options.lora or options.format:
            raise BadRequest("A preset says itself which LoRAs and format it wants. Leave --lora and --format out.")
        return preset_conversions(options.preset, options.output, Environment.read())
    from .loading.conversion import Conversion

    loras = tuple(_lora(text) for text in options.lora)
    says = expert_of(options.source)
    for path, _ in loras:
        if says and expert_of(path) not in (None, says):
            raise LoraError(
                f"By their names {short_path(path)} is for the other expert than {short_path(options.source)}. "
                f"Take the {says}-noise LoRA, or rename the file if its name is wrong."
            )
    return [Conversion(source=options.source, output=options.output, format=options.format or "bf16", loras=loras)]


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
    parser = ArgumentParser(
        prog="python -m lightx2v.convert",
        description=(__doc__ or "").partition("\n\n")[0],
        epilog=(__doc__ or "").partition("\n\n")[2],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--source", type=Path, help="a checkpoint: a file, or a folder of shards")
    parser.add_argument("--preset", help="a preset with build: all files it needs")
    parser.add_argument("--lora", action="append", default=[], metavar="FILE[:STRENGTH]", help="may be repeated")
    parser.add_argument("--format", choices=FORMATS, help="bf16 when not given")
    parser.add_argument("--output", type=Path, help="the file to write; with --preset, a folder")
    parser.add_argument("--force", action="store_true", help="replace a file that is there")
    parser.add_argument("--list_built", action="store_true", help="show what presets with build have made and kept")
    parser.add_argument("--tidy_built", action="store_true", help="remove of it what was made of files that changed")
    return parser


if __name__ == "__main__":
    sys.exit(main())
