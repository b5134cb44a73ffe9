"""python -m lightx2v.convert: a checkpoint (and LoRAs) to one merged or 8-bit file that LightX2V reads too.

    python -m lightx2v.convert --source Wan2.2-T2V-A14B/high_noise_model --format fp8 \\
        --lora loras/high_noise_lora.safetensors:1.0 --output models/t2v_high_fp8.safetensors
    python -m lightx2v.convert --source models_t5_umt5-xxl-enc-bf16.pth --format fp8 --output t5_fp8.safetensors
    python -m lightx2v.convert --preset demo_t2v_fp8 --output models/demo_t2v_fp8

Formats: bf16 and fp32 (LoRAs merged), fp8 (e4m3) and int8 (a scale per output channel). One tensor is in memory at a
time. An interrupted run continues where it stopped when it is started again; a finished file is not made twice.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from .config import Environment, resolve
from .errors import BadRequest, Cancelled, LightX2VError, LoraError, OutputError, short_path
from .progress import CancelToken, OnProgress, Progress
from .terminal import Interrupts, ProgressLine, logging_to

if TYPE_CHECKING:
    import torch

    from .weights.build import ModelWeights
    from .weights.checkpoint import Checkpoint

log = logging.getLogger("lightx2v.convert")

FORMATS = ("bf16", "fp32", "fp8", "int8")
FINGERPRINT = "lightx2v_sources"
STEPS = 1000
"""What a file's progress is counted in."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Conversion:
    """One file to make. `loras` are (path, strength), in the order in which they are added."""

    source: Path
    output: Path
    format: str
    loras: tuple[tuple[Path, float], ...] = ()


def convert(
    job: Conversion, *, force: bool = False, on_progress: OnProgress | None = None, cancel: CancelToken | None = None
) -> bool:
    """Makes `job.output`; False where it was there already, made of the same files. Anything else there is kept
    unless `force`."""
    from .weights.checkpoint import open_checkpoint
    from .weights.write import write_safetensors

    checkpoint = open_checkpoint(job.source)
    weights, dtype_of = _plan(checkpoint, job)
    metadata = {"format": "pt", FINGERPRINT: _fingerprint(checkpoint, job)}
    if job.output.exists() and not force:
        if _is_made_of(job.output, metadata[FINGERPRINT]):
            log.info("%s is there already.", short_path(job.output))
            return False
        raise OutputError(f"{short_path(job.output)} exists and was made of something else. Use --force to replace it.")
    started = time.monotonic()

    def make(name: str) -> list[tuple[str, torch.Tensor]]:
        return [(part, tensor.to(dtype_of(part))) for part, tensor in weights.tensor(name)]

    def tell(done: int, total: int) -> None:
        if on_progress is not None:
            seconds = time.monotonic() - started
            rate = f"{done / 1e9:.2f} of {total / 1e9:.2f} GB"
            step = STEPS * done // total
            on_progress(Progress(stage="write", step=step, total=STEPS, seconds=seconds, message=rate))

    groups = {}
    for name in weights.order():
        parts = [name, name + "_scale"] if name in weights.formats else [name]
        groups[name] = [(part, weights.shapes[part], dtype_of(part)) for part in parts]
    write_safetensors(job.output, groups, make, metadata=metadata, on_bytes=tell, cancel=cancel)
    return True


def _plan(checkpoint: Checkpoint, job: Conversion) -> tuple[ModelWeights, Callable[[str], torch.dtype]]:
    """The weights to write, and the dtype each gets: what stays float32 in use is kept as precise as it is stored."""
    import torch

    from .models.dit import parameter_dtype
    from .models.umt5 import wan_name
    from .weights.build import ModelWeights
    from .weights.lora import match_lora
    from .weights.naming import wan_names
    from .weights.quant import FORMATS, is_expert_matrix, is_text_matrix
    from .weights.safetensors_file import FLOATS

    compute = torch.float32 if job.format == "fp32" else torch.bfloat16
    text = any(wan_name(name) == "token_embedding.weight" for name in checkpoint.shapes)
    names = {name: wan_name(name) for name in checkpoint.shapes} if text else wan_names(checkpoint.shapes)
    plain = ModelWeights(checkpoint, names, matrix=is_text_matrix if text else is_expert_matrix)
    if text and job.loras:
        raise BadRequest("LoRAs are for the experts; the text encoder takes none.")
    if plain.quantised and job.format in FORMATS and not job.loras:
        raise BadRequest(f"{short_path(job.source)} is quantised already.")
    if plain.quantised and job.format not in FORMATS:
        raise BadRequest(f"{short_path(job.source)} is quantised: what it lost cannot be brought back as {job.format}.")
    loras = [match_lora(path, plain.plain_shapes, strength=strength) for path, strength in job.loras]
    for lora in loras:
        log.info("LoRA %s: %d of %d layers", lora.report.path, lora.report.applied, lora.report.total)
    matrix = is_text_matrix if text else is_expert_matrix
    weights = ModelWeights(checkpoint, names, matrix=matrix, loras=loras, quantise=FORMATS.get(job.format))

    def dtype_of(name: str) -> torch.dtype:
        dtype = weights.dtypes[name]
        if dtype not in FLOATS or name in weights.formats or name.removesuffix("_scale") in weights.formats:
            return dtype
        kept = torch.float32 if text and job.format == "fp32" else compute if text else parameter_dtype(name, compute)
        stored = checkpoint.dtypes[weights.file_names[name]]
        return compute if stored in FLOATS and stored.itemsize <= compute.itemsize else kept

    return weights, dtype_of


def _fingerprint(checkpoint: Checkpoint, job: Conversion) -> str:
    """What the file is made of: names, sizes and times of its sources, without their folders."""

    def state(path: Path) -> list[object]:
        about = path.stat()
        return [path.name, about.st_size, about.st_mtime_ns]

    loras = []
    for path, strength in job.loras:
        if not path.is_file():
            raise LoraError(f"There is no LoRA {short_path(path, 3)}. Check the path.")
        loras.append([*state(path), strength])
    return json.dumps({"of": [state(file.path) for file in checkpoint.files], "loras": loras, "format": job.format})


def _is_made_of(path: Path, fingerprint: str) -> bool:
    from .weights.checkpoint import open_checkpoint

    try:
        return open_checkpoint(path).metadata.get(FINGERPRINT) == fingerprint
    except LightX2VError:
        return False


def jobs_of_preset(preset: str, output: Path, environment: Environment | None = None) -> list[Conversion]:
    """The files that a preset with "build" is made of: both experts, and the text encoder where it is quantised."""
    from .adapters import find_lora
    from .weights.locate import locate

    config = resolve(preset, {}, environment=environment).engine
    if config.build is None:
        raise BadRequest(f"The preset {preset} builds nothing: it takes its files as they are.")
    files = locate(config)
    kind = "fp8" if config.build == "fp8" else "bf16"
    jobs = []
    for which, source in (("high", files.high), ("low", files.low)):
        loras = tuple(
            (find_lora(lora.path, config), lora.strength) for lora in config.lora_configs if lora.expert == which
        )
        target = output / f"{which}_noise_{kind}.safetensors"
        jobs.append(Conversion(source=source, output=target, format=kind, loras=loras))
    if config.t5_quantized:
        jobs.append(Conversion(source=files.t5, output=output / f"t5_{kind}.safetensors", format=kind))
    return jobs


def main(argv: Sequence[str] | None = None) -> int:
    try:
        options = _parser().parse_args(argv)
    except SystemExit as stop:  # argparse has said what is wrong, or shown the help
        return int(stop.code or 0)
    line = ProgressLine(sys.stderr)
    with logging_to(sys.stderr, line, logging.INFO), Interrupts() as interrupts:
        try:
            for job in _jobs(options):
                with interrupts.cancelling() as token:
                    convert(job, force=options.force, on_progress=line, cancel=token)
                line.clear()
                print(job.output)
        except (Cancelled, KeyboardInterrupt):
            line.clear()
            print("Stopped. Start it again to continue.", file=sys.stderr)
            return interrupts.exit_code
        except LightX2VError as error:
            line.clear()
            print(f"error: {error}", file=sys.stderr)
            return error.exit_code
    return 0


def _jobs(options: argparse.Namespace) -> list[Conversion]:
    if (options.preset is None) == (options.source is None):
        raise BadRequest("Give either --source, one checkpoint, or --preset, one that builds its files.")
    if options.preset is not None:
        if options.lora or options.format:
            raise BadRequest("A preset says itself which LoRAs and format it wants. Leave --lora and --format out.")
        return jobs_of_preset(options.preset, options.output, Environment.read())
    loras = tuple(_lora(text) for text in options.lora)
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


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m lightx2v.convert",
        description=(__doc__ or "").partition("\n\n")[0],
        epilog=(__doc__ or "").partition("\n\n")[2],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--source", type=Path, help="a checkpoint: a file, or a folder of shards")
    parser.add_argument("--preset", help="a preset with build: all files it needs")
    parser.add_argument("--lora", action="append", default=[], metavar="FILE[:STRENGTH]", help="may be repeated")
    parser.add_argument("--format", choices=FORMATS, help="bf16 when not given")
    parser.add_argument("--output", type=Path, required=True, help="the file to write; with --preset, a folder")
    parser.add_argument("--force", action="store_true", help="replace a file that is there")
    return parser


if __name__ == "__main__":
    sys.exit(main())
