"""Conversion: one checkpoint, with LoRAs, to one file, merged or in 8 bits. For convert.py and prebuilt_cache.py.

    convert(Conversion(source=…, output=…, format="fp8", loras=((path, 1.0),)))

One tensor is in memory at a time. An interrupted conversion continues when it is started again; a finished file is not
made twice.
"""

import json
import logging
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from ..config.engine_config import EngineConfig
from ..config.phases import Expert
from ..errors import BadRequest, LightX2VError, LoraError, OutputError, short_path
from ..models.dit import parameter_dtype
from ..progress import CancelToken, OnProgress, Progress
from ..weights.checkpoint import Checkpoint, open_checkpoint
from ..weights.lora_match import match_lora
from ..weights.model_weights import ModelWeights, scale_name
from ..weights.quant_layout import SCALE
from ..weights.quantization import FORMATS, MIN_COSINE
from ..weights.safetensors_writer import write_safetensors
from ..weights.tensor_file import FLOATS
from ..weights.umt5_names import is_text_encoder
from .lora_experts import LoraFile, lora_files
from .model_files import ModelFiles
from .networks import DTYPES
from .writer_lock import writer_lock

log = logging.getLogger("lightx2v.convert")

FINGERPRINT = "lightx2v_sources"
VERSION = 3
"""Version of the computation. Files of another version are made anew."""
STEPS = 1000
"""The unit of a file's progress."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Conversion:
    """One file to make. `loras` are (path, strength), in the order in which to add them.

    `format` is one of DTYPES or of the 8-bit FORMATS; with the latter, unquantised weights get the dtype `plain`.
    `expert` chooses the half of a LoRA that holds one for each.
    """

    source: Path
    output: Path
    format: str
    loras: tuple[tuple[Path, float], ...] = ()
    allow_partial: bool = False
    plain: str = "bf16"
    expert: Expert | None = None


def convert(
    job: Conversion,
    *,
    force: bool = False,
    metadata: Mapping[str, str] | None = None,
    device: torch.device | str = "cpu",
    on_progress: OnProgress | None = None,
    cancel: CancelToken | None = None,
) -> bool:
    """Make `job.output`; return False if it exists and has the same sources. Replaces another file only with `force`.

    Merges and quantises on `device`.
    """
    checkpoint = open_checkpoint(job.source)
    weights, dtype_of = _converted(checkpoint, job)
    metadata = {"format": "pt", **(metadata or {}), FINGERPRINT: fingerprint(checkpoint, job)}
    before = _made(job.output)
    with writer_lock(job.output.with_name(f".{job.output.name}.lock"), job.output, cancel):
        after = _made(job.output)
        wanted = not force or after != before  # with force, too, if another process has made it meanwhile
        if after and wanted and has_fingerprint(job.output, metadata[FINGERPRINT]):
            log.info("%s exists already.", short_path(job.output))
            return False
        if after and not force:
            raise OutputError(
                f"{short_path(job.output)} exists and was made of something else. Use --force to replace it."
            )
        _write(job, weights, dtype_of, metadata=metadata, device=device, on_progress=on_progress, cancel=cancel)
    return True


def _made(path: Path) -> tuple[int, int] | None:
    """What tells one file of this name from another one; None where there is none."""
    return (path.stat().st_ino, path.stat().st_mtime_ns) if path.exists() else None


def _write(
    job: Conversion,
    weights: ModelWeights,
    dtype_of: Callable[[str], torch.dtype],
    *,
    metadata: Mapping[str, str],
    device: torch.device | str,
    on_progress: OnProgress | None,
    cancel: CancelToken | None,
) -> None:
    started = time.monotonic()

    def report(done: int, total: int) -> None:
        if on_progress is not None:
            seconds = time.monotonic() - started
            message = f"{done / 1e9:.2f} of {total / 1e9:.2f} GB"
            step = STEPS * done // total
            on_progress(Progress(stage="write", step=step, total=STEPS, seconds=seconds, message=message))

    groups = {}
    for name in weights.names_on_disk():
        parts = [name, scale_name(name)] if name in weights.formats else [name]
        groups[name] = [(part, weights.shapes[part], dtype_of(part)) for part in parts]
    source = lambda name: weights.chunks(name, dtype_of, device=device)  # noqa: E731
    write_safetensors(job.output, groups, source, metadata=metadata, on_bytes=report, cancel=cancel)
    _log_fidelity(job, weights.fidelity or {})


def fidelity(job: Conversion) -> dict[str, float]:
    """The cosine between each layer that `job` quantises and its original with LoRAs merged. Writes nothing."""
    weights, dtype_of = _converted(open_checkpoint(job.source), job)
    for name in weights.formats:
        deque(weights.chunks(name, dtype_of), maxlen=0)
    return dict(weights.fidelity or {})


def _log_fidelity(job: Conversion, cosines: Mapping[str, float]) -> None:
    """A layer below MIN_COSINE is no error: only the video shows the cost."""
    if not cosines:
        return
    name, output = min(cosines, key=lambda name: cosines[name]), short_path(job.output)
    log.info("%s: the lowest cosine between a layer and its original is %.5f (%s)", output, cosines[name], name)
    if poor := [name for name, value in cosines.items() if value < MIN_COSINE]:
        log.warning(
            "%s: %d layers lose more than usual in 8 bits (cosine below %s): %s",
            *(output, len(poor), MIN_COSINE, ", ".join(poor[:5])),
        )


def _converted(checkpoint: Checkpoint, job: Conversion) -> tuple[ModelWeights, Callable[[str], torch.dtype]]:
    """The weights to write, and the dtype of each. A weight that stays float32 in use keeps its stored precision."""
    compute = DTYPES[job.plain if job.format in FORMATS else job.format]
    text = is_text_encoder(checkpoint.shapes)
    of_model = ModelWeights.of_text_encoder if text else ModelWeights.of_expert
    source = of_model(checkpoint)
    if text and job.loras:
        raise BadRequest("LoRAs are for the experts; the text encoder takes none. Leave --lora out.")
    if source.blocks:
        formats = ", ".join(sorted({form.name for form in source.blocks.values()}))
        raise BadRequest(
            f"{short_path(job.source)} is a GGUF file in {formats}. Use it as it is: it takes LoRAs as it runs. To "
            "convert, take the original file."
        )
    if source.quantised and job.format in FORMATS and not job.loras:
        raise BadRequest(f"{short_path(job.source)} is quantised already. Use it as it is.")
    if source.quantised and job.format not in FORMATS:
        raise BadRequest(
            f"{short_path(job.source)} is quantised: the lost precision cannot be brought back as {job.format}. "
            "Use the original file."
        )
    loras = [
        match_lora(path, source.plain_shapes, strength=strength, allow_partial=job.allow_partial, expert=job.expert)
        for path, strength in job.loras
    ]
    for lora in loras:
        log.info("LoRA %s: %d of %d layers", lora.report.path, lora.report.applied, lora.report.total)
    weights = of_model(checkpoint, quantise=FORMATS.get(job.format)).with_loras(loras)
    weights.fidelity = {}

    def dtype_of(name: str) -> torch.dtype:
        dtype = weights.dtypes[name]
        if name.endswith(SCALE) or name in weights.formats or dtype not in FLOATS:
            return dtype
        used = compute if text else parameter_dtype(name, compute)
        stored = checkpoint.dtypes[weights.file_names[name]]
        if weights.is_modified(name) or stored.itemsize > compute.itemsize:
            return used
        return compute if stored.itemsize == compute.itemsize and used is compute else stored

    return weights, dtype_of


def fingerprint(checkpoint: Checkpoint, job: Conversion) -> str:
    """The identity of a file's content: names (without folders), sizes and times of its sources, and the settings."""
    loras = []
    for path, strength in job.loras:
        if not path.is_file():
            raise LoraError(f"There is no LoRA {short_path(path, 3)}. Check the path.")
        loras.append([*_identity(path), strength])
    sources = {"of": [_identity(file.path) for file in checkpoint.files], "loras": loras, "format": job.format}
    return json.dumps(
        {**sources, "plain": job.plain, "partial": job.allow_partial, "version": VERSION, "expert": job.expert}
    )


def _identity(path: Path) -> list[str | int]:
    """Name, size and time of a file: if one differs, it is another file."""
    stat = path.stat()
    return [path.name, stat.st_size, stat.st_mtime_ns]


def has_fingerprint(path: Path, expected: str) -> bool:
    """Whether this is a complete file with that fingerprint."""
    try:
        return open_checkpoint(path).metadata.get(FINGERPRINT) == expected
    except LightX2VError:
        return False


def _constant(lora: LoraFile) -> float:
    assert not isinstance(lora.strength, tuple), "an EngineConfig with `build` has no strengths that change"
    return lora.strength


def prebuilt_conversions(files: ModelFiles, config: EngineConfig, folder: Path, plain: str) -> dict[str, Conversion]:
    """The files that a configuration with "build" uses: "high", "low", and "t5" if that is to be quantised."""
    kind = "fp8" if config.build == "fp8" else plain
    jobs = {}
    experts: dict[Expert, Path] = {"high": files.high, "low": files.low}
    for expert, source in experts.items():
        jobs[expert] = Conversion(
            source=source,
            output=folder / f"{expert}_noise_{kind}.safetensors",
            format=kind,
            loras=tuple((lora.path, _constant(lora)) for lora in lora_files(config.lora_configs, expert, config)),
            allow_partial=config.lora_allow_partial,
            plain=plain,
            expert=expert,
        )
    if config.t5_quantized and not ModelWeights.of_text_encoder(open_checkpoint(files.t5)).quantised:
        kind = str(config.t5_quant_scheme).partition("-")[0]
        plain = "bf16" if plain == "fp16" else plain  # UMT5's activations exceed float16's range
        jobs["t5"] = Conversion(source=files.t5, output=folder / f"t5_{kind}.safetensors", format=kind, plain=plain)
    return jobs
