"""A checkpoint and LoRAs to one file: merged, or in 8 bits. What convert.py and the kept builds (built.py) do.

    convert(Conversion(source=…, output=…, format="fp8", loras=((path, 1.0),)))

One tensor is in memory at a time. An interrupted run continues where it stopped when it is started again; a finished
file is not made twice.
"""

from __future__ import annotations

import json
import logging
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from ..config.engine_config import EngineConfig
from ..config.request import Expert
from ..errors import BadRequest, LightX2VError, LoraError, OutputError, short_path
from ..models.dit import parameter_dtype
from ..models.umt5 import wan_name
from ..progress import CancelToken, OnProgress, Progress
from ..weights.checkpoint import Checkpoint, open_checkpoint
from ..weights.dit_names import wan_names
from ..weights.lora import match_lora
from ..weights.model_weights import ModelWeights, scale_name
from ..weights.quantization import FORMATS, GATE, QUANTISED, is_expert_matrix, is_text_matrix
from ..weights.safetensors_writer import write_safetensors
from ..weights.tensor_file import FLOATS
from .expert_loras import files_for
from .model_files import ModelFiles
from .networks import DTYPES

log = logging.getLogger("lightx2v.convert")

FINGERPRINT = "lightx2v_sources"
VERSION = 2
"""Of what is computed: another one makes files anew."""
STEPS = 1000
"""What a file's progress is counted in."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Conversion:
    """One file to make. `loras` are (path, strength), in the order in which they are added.

    `format` is one of DTYPES or of the 8-bit formats; `plain` is that of what is not quantised in the latter.
    """

    source: Path
    output: Path
    format: str
    loras: tuple[tuple[Path, float], ...] = ()
    allow_partial: bool = False
    plain: str = "bf16"


def convert(
    job: Conversion,
    *,
    force: bool = False,
    metadata: Mapping[str, str] | None = None,
    device: torch.device | str = "cpu",
    on_progress: OnProgress | None = None,
    cancel: CancelToken | None = None,
) -> bool:
    """Makes `job.output`; False where it was there already, made of the same files. Anything else there is kept
    unless `force`. The sums and the quantising run on `device`."""
    checkpoint = open_checkpoint(job.source)
    weights, dtype_of = _plan(checkpoint, job)
    metadata = {"format": "pt", **(metadata or {}), FINGERPRINT: fingerprint(checkpoint, job)}
    if job.output.exists() and not force:
        if has_fingerprint(job.output, metadata[FINGERPRINT]):
            log.info("%s is there already.", short_path(job.output))
            return False
        raise OutputError(f"{short_path(job.output)} exists and was made of something else. Use --force to replace it.")
    started = time.monotonic()

    def make(name: str) -> Iterator[tuple[str, torch.Tensor]]:
        return weights.parts(name, dtype_of, device=device)

    def tell(done: int, total: int) -> None:
        if on_progress is not None:
            seconds = time.monotonic() - started
            rate = f"{done / 1e9:.2f} of {total / 1e9:.2f} GB"
            step = STEPS * done // total
            on_progress(Progress(stage="write", step=step, total=STEPS, seconds=seconds, message=rate))

    groups = {}
    for name in weights.order():
        parts = [name, scale_name(name)] if name in weights.formats else [name]
        groups[name] = [(part, weights.shapes[part], dtype_of(part)) for part in parts]
    write_safetensors(job.output, groups, make, metadata=metadata, on_bytes=tell, cancel=cancel)
    _say_fidelity(job, weights.fidelity or {})
    return True


def fidelity(job: Conversion) -> dict[str, float]:
    """The cosine of each layer that `job` quantises to what it was, with the LoRAs merged; nothing is written."""
    weights, dtype_of = _plan(open_checkpoint(job.source), job)
    for name in weights.formats:
        deque(weights.parts(name, dtype_of), maxlen=0)
    return dict(weights.fidelity or {})


def _say_fidelity(job: Conversion, found: Mapping[str, float]) -> None:
    """How close the 8-bit weights are. A layer below the gate is no error: what it costs shows in the video only."""
    if not found:
        return
    name = min(found, key=lambda name: found[name])
    poor = [name for name, value in found.items() if value < GATE]
    log.info("%s: lowest cosine of a layer to what it was: %.5f (%s)", short_path(job.output), found[name], name)
    if poor:
        log.warning(
            "%s: %d layers lose more than usual in 8 bits (cosine below %s): %s",
            *(short_path(job.output), len(poor), GATE, ", ".join(poor[:5])),
        )


def _plan(checkpoint: Checkpoint, job: Conversion) -> tuple[ModelWeights, Callable[[str], torch.dtype]]:
    """The weights to write, and the dtype each gets: what stays float32 in use is kept as precise as it is stored."""
    compute = DTYPES[job.plain if job.format in FORMATS else job.format]
    text = any(wan_name(name) == "token_embedding.weight" for name in checkpoint.shapes)
    names = {name: wan_name(name) for name in checkpoint.shapes} if text else wan_names(checkpoint.shapes)
    for name in [name for name, ours in names.items() if text and ours == "encoder.embed_tokens.weight"]:
        del names[name]  # the token table a second time
    plain = ModelWeights(checkpoint, names, matrix=is_text_matrix if text else is_expert_matrix)
    if text and job.loras:
        raise BadRequest("LoRAs are for the experts; the text encoder takes none.")
    if plain.quantised and job.format in FORMATS and not job.loras:
        raise BadRequest(f"{short_path(job.source)} is quantised already.")
    if plain.quantised and job.format not in FORMATS:
        raise BadRequest(f"{short_path(job.source)} is quantised: what it lost cannot be brought back as {job.format}.")
    loras = [
        match_lora(path, plain.plain_shapes, strength=strength, allow_partial=job.allow_partial)
        for path, strength in job.loras
    ]
    for lora in loras:
        log.info("LoRA %s: %d of %d layers", lora.report.path, lora.report.applied, lora.report.total)
    matrix = is_text_matrix if text else is_expert_matrix
    weights = ModelWeights(checkpoint, names, matrix=matrix, loras=loras, quantise=FORMATS.get(job.format))
    weights.fidelity = {}

    def dtype_of(name: str) -> torch.dtype:
        dtype = weights.dtypes[name]
        if name.endswith("_scale") or name in weights.formats or dtype not in FLOATS:
            return dtype
        kept = compute if text else parameter_dtype(name, compute)
        stored = checkpoint.dtypes[weights.file_names[name]]
        if weights.is_modified(name) or stored.itemsize > compute.itemsize:
            return kept
        return compute if stored.itemsize == compute.itemsize and kept is compute else stored

    return weights, dtype_of


def fingerprint(checkpoint: Checkpoint, job: Conversion) -> str:
    """What the file is made of: names, sizes and times of its sources, without their folders, and the settings."""
    loras = []
    for path, strength in job.loras:
        if not path.is_file():
            raise LoraError(f"There is no LoRA {short_path(path, 3)}. Check the path.")
        loras.append([*state(path), strength])
    made = {"of": [state(file.path) for file in checkpoint.files], "loras": loras, "format": job.format}
    return json.dumps({**made, "plain": job.plain, "partial": job.allow_partial, "version": VERSION})


def state(path: Path) -> list[str | int]:
    """What tells whether a file is still the same."""
    about = path.stat()
    return [path.name, about.st_size, about.st_mtime_ns]


def has_fingerprint(path: Path, print_: str) -> bool:
    """Whether this is a whole file with that fingerprint."""
    try:
        return open_checkpoint(path).metadata.get(FINGERPRINT) == print_
    except LightX2VError:
        return False


def prebuilt_conversions(files: ModelFiles, config: EngineConfig, folder: Path, plain: str) -> dict[str, Conversion]:
    """The files that a configuration with "build" is made of: "high", "low", and "t5" where that is to be quantised."""
    kind = "fp8" if config.build == "fp8" else plain
    jobs = {}
    experts: dict[Expert, Path] = {"high": files.high, "low": files.low}
    for which, source in experts.items():
        loras = tuple((path, spec.strength) for spec, path in files_for(config.lora_configs, which, config))
        target = folder / f"{which}_noise_{kind}.safetensors"
        jobs[which] = Conversion(
            source=source,
            output=target,
            format=kind,
            loras=loras,
            allow_partial=config.lora_allow_partial,
            plain=plain,
        )
    if config.t5_quantized and not set(open_checkpoint(files.t5).dtypes.values()) & set(QUANTISED):
        kind = str(config.t5_quant_scheme).partition("-")[0]
        plain = "bf16" if plain == "fp16" else plain  # UMT5's activations leave float16's range
        jobs["t5"] = Conversion(source=files.t5, output=folder / f"t5_{kind}.safetensors", format=kind, plain=plain)
    return jobs
