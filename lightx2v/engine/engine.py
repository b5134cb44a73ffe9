"""A loaded engine: the model in its placement, and the attention backends with the reason for them."""

import logging
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TypedDict

import torch

from .. import hub
from ..attention import Choice, resolve_attention
from ..catalog.used_files import UsedFiles
from ..config.architecture import DiTConfig
from ..config.attention_names import FOR_VIDEO_ONLY
from ..config.engine_config import EngineConfig, ParallelConfig
from ..config.environment import Environment
from ..config.sol_attn_setting import SolAttnSetting
from ..cost.memory_ladder import USUAL, MemoryLadder
from ..cost.memory_plan import plan_from_disk
from ..errors import OutOfMemory, OutputError
from ..loading import preload
from ..loading.model_files import ModelFiles, locate
from ..loading.networks import DTYPES, Precision, expert_weights
from ..loading.prebuilt_cache import build_prebuilt, find_prebuilt
from ..models.fused import Dims, compile_for
from ..models.preview import Preview
from ..models.quant_linear import kernel_for
from ..offload.kept_parts import KeptParts
from ..offload.placement import Placement, limit_memory, load_offloaded, planner_for
from ..offload.resident import LoadInputs, Resident
from ..parallel.mesh import Mesh
from ..parallel.process_group import CLOSE, Group
from ..parallel.rendezvous import join
from ..parallel.single_process import ALONE
from ..progress import CancelToken, Meter, OnProgress, WeightsRead, free_memory
from ..weights.checkpoint import open_checkpoint
from ..weights.content_digest import content_digest
from ..weights.expert_pair import check_expert_pair
from .expert_order import ExpertOrder
from .load_progress import LoadProgress
from .memory_retry import retry_with_offload, within_memory
from .prompt_cache import PromptCache

log = logging.getLogger("lightx2v.engine")


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedEngine:
    """A loaded `EngineConfig`, shared by all runs. `mesh` says which part of the work this process does.

    `weights` names the content of the model's files; only rank 0 needs it. Reports and files carry the name `preset`;
    reports also carry the `warnings`.
    """

    config: EngineConfig
    mesh: Mesh
    precision: Precision
    placement: Placement
    self_attention: Choice
    cross_attention: Choice
    preview: Preview
    load_seconds: float
    read: WeightsRead = WeightsRead()
    weights: str = ""
    preset: str = ""
    warnings: tuple[str, ...] = ()
    files: UsedFiles = field(default_factory=lambda: UsedFiles({}))
    prompts: PromptCache = field(default_factory=PromptCache)
    expert_order: ExpertOrder = field(default_factory=ExpertOrder)


class LoadSettings(TypedDict, total=False):
    """The keywords of `load_engine`."""

    preset: str
    on_progress: OnProgress | None
    cancel: CancelToken | None
    prompts: Sequence[str]
    kept: KeptParts | None


def load_engine(
    config: EngineConfig,
    *,
    preset: str = "",
    on_progress: OnProgress | None = None,
    cancel: CancelToken | None = None,
    prompts: Sequence[str] = (),
    kept: KeptParts | None = None,
) -> LoadedEngine:
    """Load the model; download missing files first. Use what is `kept` of another engine, and free the rest of it.

    The `prompts` of the first request are encoded while the experts are read, if the text encoder stays on the device.
    Raises ConfigError, DownloadError, CheckpointError, OutOfMemory or Cancelled, and leaves nothing in memory then.
    """
    environment = Environment.read()
    config.check_world(environment.world_size or 1, enable_cfg=True)
    group = join(environment) if environment.distributed else ALONE

    def download() -> tuple[EngineConfig, str]:
        hub.ensure(config, meter=Meter(on_progress=on_progress), cancel=cancel)
        return config, preset

    config, preset = group.run_on_rank0(
        "load",
        download,
        lambda model: {"config": model[0].to_json(), "preset": model[1]},
        lambda content: (EngineConfig.from_json(content["config"]), content["preset"]),
    )
    with group.collective():
        # Unguided steps are shared by all processes in any layout, so this one suits every request.
        layout = config.parallel or ParallelConfig.for_world(group.size, enable_cfg=True)
        mesh = Mesh(group, layout.cfg_p_size, layout.seq_p_size)
        with closing(kept or KeptParts()) as parts:
            return load_here(config, mesh, preset, on_progress, cancel, prompts, parts)


def with_other_loras(
    engine: LoadedEngine, config: EngineConfig, preset: str, on_progress: OnProgress | None, cancel: CancelToken | None
) -> LoadedEngine | None:
    """`engine` for `config`, if that differs in its LoRAs only; None where the model has to be loaded.

    The base model stays: what the LoRAs change is read again, and gives the bits of a fresh load. After a LoraError or
    a DownloadError the engine is what it was.
    """
    same = replace(engine.config, lora_configs=config.lora_configs, model_cls=config.model_cls) == config
    if not same or config.build is not None or engine.mesh.group.size > 1:
        return None
    hub.ensure(config, meter=Meter(on_progress=on_progress), cancel=cancel)
    meter = Meter(engine.precision.device, on_progress)
    try:
        with meter.stage("load"):
            meter.emit("load", message="Exchanging the LoRAs.")
            within_memory(lambda: engine.placement.use_loras(config.lora_configs), "while exchanging LoRAs")
    except OutOfMemory:
        return None  # loading plans the memory anew
    return replace(engine, config=config, preset=preset)


def release_engine(engine: LoadedEngine) -> KeptParts:
    """Close an engine that nobody else uses, and keep its text encoder, VAE and pinned host memory for the next one.
    Several processes keep nothing."""
    group, placement = engine.mesh.group, engine.placement
    group.send_command(CLOSE)
    if group.size == 1:
        kept = placement.release()
    else:
        placement.close()
        kept = KeptParts()
    free_memory()
    return kept


def load_here(
    config: EngineConfig,
    mesh: Mesh,
    preset: str,
    on_progress: OnProgress | None,
    cancel: CancelToken | None,
    prompts: Sequence[str] = (),
    kept: KeptParts | None = None,
) -> LoadedEngine:
    """Load this process's part of the model. `kept` stays the caller's to close."""
    group = mesh.group
    if group.is_rank0:  # the others need no text encoder
        preload.start()
    group.check_device(config.device)
    precision = Precision.of(config)
    started = time.perf_counter()
    meter = Meter(precision.device, on_progress)
    with meter.stage("load"), preload.in_turns():
        meter.emit("load")
        files, warnings = with_prebuilt(locate(config), config, precision, meter, cancel, group)
        read = files.prebuilt or files
        warnings += check_expert_pair(open_checkpoint(read.high), open_checkpoint(read.low), config.task)
        progress, encoded = LoadProgress(meter, cancel), PromptCache()
        attention = choose_attention(config, files, precision, group)
        with ThreadPoolExecutor(1, "lightx2v-digest") as thread, compiling(files, config, precision):
            digest = thread.submit(weights_digest, files) if group.is_rank0 else None
            inputs = LoadInputs(
                *(files, config, precision, *attention, progress.watch, group),
                use_text=partial(encoded.add_all, prompts),
                kept=kept or KeptParts(),
            )
            placement = load_placement(inputs, warnings)
        weights_read = progress.result()
        for warning in warnings:
            log.warning("%s", warning)
        weights = digest.result() if digest is not None else ""
    used = UsedFiles({"high-noise expert": files.high, "low-noise expert": files.low, "T5": files.t5, "VAE": files.vae})
    if group.is_rank0:
        used.hash_in_background()
    return LoadedEngine(
        config=config,
        mesh=mesh,
        precision=precision,
        placement=placement,
        self_attention=attention[0],
        cross_attention=attention[1],
        preview=placement.preview,
        load_seconds=time.perf_counter() - started,
        read=weights_read,
        weights=weights,
        preset=preset,
        warnings=tuple(warnings),
        files=used,
        prompts=encoded,
    )


@contextmanager
def compiling(files: ModelFiles, config: EngineConfig, precision: Precision) -> Iterator[None]:
    """Inside, a thread compiles and tests the experts' kernels: seconds that the first step need not wait."""
    device, compute = precision.device, precision.compute
    if device.type != "cuda":
        yield
        return
    weights = expert_weights(files, "high", config)
    dit = DiTConfig.from_checkpoint(files.architecture, weights.plain_shapes)
    dims, formats = Dims(dit.num_heads, dit.head_dim, dit.ffn_dim), {*weights.formats.values()}

    def compile_kernels() -> None:
        with torch.cuda.device(device):
            compile_for(device, dims, compute, formats)
            for weight in formats:
                kernel_for(weight, device, compute)

    with ThreadPoolExecutor(1, "lightx2v-kernels") as thread:  # two threads would compile the same twice
        compiled = thread.submit(compile_kernels)
        yield
        compiled.result()


def weights_digest(files: ModelFiles) -> str:
    """Names the content of the experts and the VAE; of what is built from them, that of the sources."""
    checkpoints = map(open_checkpoint, (files.high, files.low, files.vae))
    return content_digest(file.path for checkpoint in checkpoints for file in checkpoint.files)


def with_prebuilt(
    files: ModelFiles,
    config: EngineConfig,
    precision: Precision,
    meter: Meter,
    cancel: CancelToken | None,
    group: Group,
) -> tuple[ModelFiles, list[str]]:
    """The files with those that the "build" setting makes from them, and warnings. Rank 0 builds missing ones now.

    If they cannot be stored, the weights are built in memory as they are read.
    """
    if config.build is None:
        return files, []
    plain = next(name for name, dtype in DTYPES.items() if dtype is precision.compute)

    def report(part: str) -> OnProgress:
        title = {"high": "high-noise expert", "low": "low-noise expert", "t5": "text encoder"}[part]
        return lambda event: meter.emit("load", event.step, event.total, message=f"Making the {title}: {event.message}")

    def build() -> None:
        if find_prebuilt(files, config, plain) is None:
            check_expert_pair(open_checkpoint(files.high), open_checkpoint(files.low), config.task)
            build_prebuilt(files, config, plain, device=precision.device, on_progress=report, cancel=cancel)

    try:
        group.run_on_rank0("build", build, lambda _: None, lambda _: None)
        return replace(files, prebuilt=find_prebuilt(files, config, plain)), []
    except OutputError as error:
        return files, [f"The model was built in memory, and will be again at the next start. {error}"]


def choose_attention(
    config: EngineConfig, files: ModelFiles, precision: Precision, group: Group = ALONE
) -> tuple[Choice, Choice]:
    """The attention backends for the video's tokens and for the text, tested on heads of this model's size.

    What trades exactness for speed is for the many tokens of a video only; the text's attention is exact then. Of
    several processes, rank 0 takes the times of `auto_fast` for all.
    """
    shapes = expert_weights(files, "high", config).shapes
    dit_config = DiTConfig.from_checkpoint(files.architecture, shapes)
    config.check_heads(dit_config.num_heads)
    setting = config.sol_attn_setting or SolAttnSetting()

    def resolved(name: str) -> Choice:
        return resolve_attention(
            name,
            precision.device,
            precision.compute,
            strict=config.attention_strict or (name == "sol_attn" and setting.strict),
            head_dim=dit_config.head_dim,
            sol_setting=setting,
        )

    name, cross = config.self_attn_1_type, config.cross_attn_1_type
    timed = resolved(name) if name == "auto_fast" and group.is_rank0 else None
    if name == "auto_fast":
        name = group.broadcast_json(timed.name if timed else None)
    chosen = timed or resolved(name)
    cross = "auto" if cross in FOR_VIDEO_ONLY else cross
    return chosen, chosen if cross == name else resolved(cross)


def load_placement(inputs: LoadInputs, warnings: list[str]) -> Placement:
    """Load the weights to where the plan puts them, with less on the device after each out-of-memory error.

    A retry adds a warning.
    """
    config, precision, group = inputs.config, inputs.precision, inputs.group
    limit_memory(precision.device, config.vram_gb)
    planner, when = planner_for(inputs), "while loading the model"
    if planner is None and not config.lazy_load:
        if config.cpu_offload is True:
            device = precision.device.type.upper()
            warnings.append(f"cpu_offload has no effect: {device} has no memory of its own to offload from.")
        return within_memory(lambda: Resident(inputs), when)
    plan = planner.plan(USUAL) if planner else plan_from_disk(config)
    # Several processes do not retry: perhaps only one of them has run out of memory.
    ladder, reduced = MemoryLadder(plan, planner, retry=group.size == 1), list[str]()
    placement = retry_with_offload(
        lambda: load_offloaded(inputs, ladder),
        when,
        lambda: ladder.reduce("denoise") if planner else None,
        reduced.append,
    )
    if reduced:
        warnings.append(
            f"The device ran out of memory while loading; the model was loaded with less on it: {reduced[-1]}."
        )
    return placement
