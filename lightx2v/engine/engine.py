"""A loaded engine: the model where it lives, the attention it uses, and why. Built once, read by every run."""

from __future__ import annotations

import logging
import re
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch

from .. import hub
from ..attention import Choice, resolve_attention
from ..config.engine_config import EngineConfig, ParallelConfig
from ..config.environment import Environment
from ..cost.machine import free_memory
from ..cost.memory_plan import from_disk
from ..errors import OutOfMemory, OutputError
from ..loading import preload
from ..loading.model_files import ModelFiles, locate
from ..loading.networks import DTYPES, Precision, expert_weights
from ..loading.prebuilt_cache import build_prebuilt, find_prebuilt
from ..models.dit import DiTConfig
from ..models.preview import Preview
from ..offload.offloaded import describe
from ..offload.placement import USUAL, Placement, Resident, offloaded, planner_for
from ..parallel.mesh import Mesh
from ..parallel.process_group import Group
from ..parallel.rendezvous import join
from ..parallel.single_process import ALONE
from ..progress import CancelToken, Meter, OnProgress
from ..weights.checkpoint import open_checkpoint
from ..weights.expert_pair import check_expert_pair
from .prompt_cache import PromptCache

log = logging.getLogger("lightx2v.engine")

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedEngine:
    """What `EngineConfig` says, loaded. `preset` is the name reports and files carry; `warnings` go into reports.

    `mesh` says which part of the work this process does.
    """

    config: EngineConfig
    mesh: Mesh
    precision: Precision
    placement: Placement
    self_attention: Choice
    cross_attention: Choice
    preview: Preview
    load_seconds: float
    preset: str = ""
    warnings: tuple[str, ...] = ()
    prompts: PromptCache = field(default_factory=PromptCache)


def load_engine(
    config: EngineConfig,
    *,
    preset: str = "",
    on_progress: OnProgress | None = None,
    cancel: CancelToken | None = None,
) -> LoadedEngine:
    """Loads the model, and first fetches what this machine lacks of it.

    Raises ConfigError, DownloadError, CheckpointError, OutOfMemory or Cancelled; nothing stays in memory then.
    """
    group = group_for(config)

    def download() -> tuple[EngineConfig, str]:
        hub.ensure(config, meter=Meter(on_progress=on_progress), cancel=cancel)
        return config, preset

    config, preset = group.run_on_rank0("load", download, _load_command, _loaded_command)
    with group.collective():
        # Unguided steps are shared by all processes in any layout, so this one suits every request.
        layout = config.parallel or ParallelConfig.for_world(group.size, enable_cfg=True)
        mesh = Mesh(group, layout.cfg_p_size, layout.seq_p_size)
        return load_here(config, mesh, preset, on_progress, cancel)


def _load_command(model: tuple[EngineConfig, str]) -> dict[str, Any]:
    """What rank 0 loads, as JSON for the other processes."""
    return {"config": model[0].to_json(), "preset": model[1]}


def _loaded_command(content: dict[str, Any]) -> tuple[EngineConfig, str]:
    return EngineConfig.from_json(content["config"]), content["preset"]


def load_here(
    config: EngineConfig,
    mesh: Mesh,
    preset: str,
    on_progress: OnProgress | None,
    cancel: CancelToken | None,
) -> LoadedEngine:
    """Load this process's part of the model."""
    if mesh.group.is_rank0:  # the others need no text encoder
        preload.start()
    mesh.group.check_device(config.device)
    precision = Precision.of(config)
    started = time.perf_counter()
    meter = Meter(precision.device, on_progress)
    with meter.stage("load"):
        meter.emit("load")
        files = locate(config)
        files, warnings = with_built(files, config, precision, meter, cancel, mesh.group)
        read = files.prebuilt or files
        warnings += check_expert_pair(open_checkpoint(read.high), open_checkpoint(read.low), config.task)
        self_attention, cross_attention = choose_attention(config, files, precision)
        placement = place(files, config, precision, self_attention, cross_attention, warnings, cancel, mesh.group)
        for warning in warnings:
            log.warning("%s", warning)
        with torch.inference_mode(), placement.vae() as vae:
            preview = Preview.for_vae(vae, files.vae)
    return LoadedEngine(
        config=config,
        mesh=mesh,
        precision=precision,
        placement=placement,
        self_attention=self_attention,
        cross_attention=cross_attention,
        preview=preview,
        load_seconds=time.perf_counter() - started,
        preset=preset,
        warnings=tuple(warnings),
    )


def with_built(
    files: ModelFiles,
    config: EngineConfig,
    precision: Precision,
    meter: Meter,
    cancel: CancelToken | None,
    group: Group,
) -> tuple[ModelFiles, list[str]]:
    """The files with what "build" makes of them, made now if it is not there; and what there is to warn of.

    Where it cannot be kept it is made in memory, as it is read. Of several processes rank 0 does it.
    """
    if config.build is None:
        return files, []
    plain = next(name for name, dtype in DTYPES.items() if dtype is precision.compute)

    def telling(part: str) -> OnProgress:
        what = {"high": "high-noise expert", "low": "low-noise expert", "t5": "text encoder"}[part]
        return lambda event: meter.emit("load", event.step, event.total, message=f"Making the {what}: {event.message}")

    def work() -> Iterator[tuple[str, torch.Tensor]]:
        if find_prebuilt(files, config, plain) is None:
            check_expert_pair(open_checkpoint(files.high), open_checkpoint(files.low), config.task)
            build_prebuilt(files, config, plain, device=precision.device, on_progress=telling, cancel=cancel)
        yield from ()

    try:
        deque(group.broadcast_stream(work()), maxlen=0)
        return replace(files, prebuilt=find_prebuilt(files, config, plain)), []
    except OutputError as error:
        return files, [f"The model was made in memory, and will be again at the next start. {error}"]


def choose_attention(config: EngineConfig, files: ModelFiles, precision: Precision) -> tuple[Choice, Choice]:
    """The backends for the video's tokens and for the text, tried on heads of the model's own size."""
    shapes = expert_weights(files, "high", config).shapes
    dit_config = DiTConfig.from_checkpoint(files.architecture, shapes)
    config.check_heads(dit_config.num_heads)
    names = (config.self_attn_1_type, config.cross_attn_1_type)
    choices = {
        name: resolve_attention(
            name, precision.device, precision.compute, strict=config.attention_strict, head_dim=dit_config.head_dim
        )
        for name in dict.fromkeys(names)
    }
    return choices[names[0]], choices[names[1]]


def place(
    files: ModelFiles,
    config: EngineConfig,
    precision: Precision,
    self_attention: Choice,
    cross_attention: Choice,
    warnings: list[str],
    cancel: CancelToken | None,
    group: Group,
) -> Placement:
    """The weights where the plan says, and with less on the device when loading runs out of memory: a warning more.

    Several processes do not try again: the memory may have run out on one of them only.
    """
    parts = (files, config, precision, self_attention, cross_attention)
    planner = planner_for(files, config, precision, group)
    if planner is None and config.lazy_load:
        plan = from_disk(config)
        return within_memory(lambda: offloaded(*parts, plan, cancel=cancel, group=group), "while loading the model")
    if planner is None:
        if config.cpu_offload is True:
            device = precision.device.type.upper()
            warnings.append(f"cpu_offload has no effect: {device} has no memory of its own to offload from.")
        return within_memory(lambda: Resident(*parts, cancel=cancel, group=group), "while loading the model")
    plan, lowered = planner.plan(USUAL), False
    while True:
        try:
            placement = within_memory(
                lambda plan=plan: offloaded(*parts, plan, planner=planner, cancel=cancel, group=group),
                "while loading the model",
            )
            break
        except OutOfMemory as error:
            failure = error
        lower = plan.reduce_memory("denoise")
        if lower is None or group.size > 1:
            raise failure
        plan, lowered = planner.counted(lower, USUAL, f"After the memory ran out: {describe(lower)}."), True
    if lowered:
        warnings.append(f"The device ran out of memory while loading; the model was loaded with {describe(plan)}.")
        placement.keep_below(plan)
    return placement


def group_for(config: EngineConfig) -> Group:
    """The processes that torchrun started for this model, or this one alone.

    Raises ConfigError before anything is loaded if they do not fit the configuration.
    """
    environment = Environment.read()
    config.check_world(environment.world_size or 1, enable_cfg=True)
    return join(environment) if environment.distributed else ALONE


def within_memory(call: Callable[[], T], when: str) -> T:
    """`call()`, with an allocator's error turned into OutOfMemory with advice.

    The new error is raised outside of the `except` block, where the old one is no longer its context: through that
    one's traceback every tensor of the failed step would stay alive. A context manager could not do this.
    """
    try:
        return call()
    except (torch.OutOfMemoryError, MemoryError) as error:
        failure = str(error)
    except RuntimeError as error:  # the CPU allocator has no type of its own
        if not re.search(r"DefaultCPUAllocator|not enough memory|cannot allocate", str(error), re.IGNORECASE):
            raise
        failure = str(error)
    free_memory()
    first_line = failure.strip().splitlines()[0][:200] if failure.strip() else "no details"
    raise OutOfMemory(
        f"Out of memory {when} ({first_line}). "
        "Make the video smaller or shorter, turn offload on, or take an FP8 preset."
    )
