"""Where weights live while a run needs them: `with placement.expert("high") as dit`.

The models and the denoising loop do not know it: a placement hands out each part on the device and takes it back.
`Resident` keeps all parts on the device; `Offloaded` moves those that do not fit there in and out.
"""

import logging
import math

import torch

from ..config.architecture import DiTConfig
from ..config.engine_config import EngineConfig
from ..cost.machine import host_memory
from ..cost.memory_ladder import MemoryLadder, MemoryPlanner, usable
from ..cost.memory_plan import ATTENTION_BYTES, ModelSize, OffloadOptions
from ..loading.expert_loras import ExpertLoras, match_loras
from ..loading.model_files import ModelFiles
from ..loading.networks import Precision, expert_dtypes, expert_weights
from ..weights.checkpoint import open_checkpoint
from .device_copies import Copies, copies_for
from .host_slabs import HostSlabs
from .offloaded import Offloaded
from .resident import LoadInputs, Resident

log = logging.getLogger("lightx2v.offload")

Placement = Resident | Offloaded
"""Hands out the parts of a model, on the device. A part may be used inside its `with` block only."""


def planner_for(inputs: LoadInputs) -> MemoryPlanner | None:
    """The planner for this model and machine; None where the device has no memory of its own to offload from."""
    files, config, precision, group = inputs.files, inputs.config, inputs.precision, inputs.group
    if precision.device.type != "cuda":
        return None
    free = [torch.cuda.mem_get_info(precision.device)[0], host_memory()[0]]
    free = [free[0] + inputs.kept.device_bytes, free[1] + inputs.kept.host_bytes]
    # All processes plan alike: for the smallest device, and for an equal share of host memory.
    everywhere = group.all_gather_json(free)
    vram = usable(min(vram for vram, _ in everywhere), config.vram_gb)
    ram = min(ram for _, ram in everywhere) // group.size
    if files.prebuilt is None and config.build:
        ram = 2**62  # weights that no file holds cannot stay on disk
    model, options = model_sizes(files, config, precision), OffloadOptions.of(config)
    return MemoryPlanner(vram=vram, ram=ram, model=model, options=options)


def limit_memory(device: torch.device, vram_gb: float | None) -> None:
    """Let the allocator hand out no more than a card of `vram_gb` GB has: beyond it a run is out of memory, as on such
    a card, and moves more of the weights off. None takes an earlier limit away."""
    if device.type == "cuda":
        total = torch.cuda.mem_get_info(device)[1]
        torch.cuda.set_per_process_memory_fraction(usable(total, vram_gb) / total, device)


def load_offloaded(inputs: LoadInputs, ladder: MemoryLadder, *, copies: Copies | None = None) -> Offloaded:
    """Load the model for the ladder's plan: parts that will not stay on the device go to host memory at once."""
    log.info("Placement: %s", ladder.plan)
    device = inputs.precision.device
    slabs = inputs.kept.take_slabs() or HostSlabs(pin=device.type == "cuda")
    try:
        placement = Offloaded(
            Resident(inputs, ladder.plan, slabs),
            ladder=ladder,
            device=device,
            copies=copies or copies_for(device),
            dtype_of=expert_dtypes(inputs.precision),
            read_ahead=inputs.group.size == 1,  # several processes read together, between their other exchanges
            slabs=slabs,
        )
    except BaseException:
        slabs.close()
        raise
    slabs.trim()  # what the last model needed and this one does not
    return placement


def model_sizes(files: ModelFiles, config: EngineConfig, precision: Precision) -> ModelSize:
    """The sizes for the planner, from the files' headers."""
    weights = expert_weights(files, "high", config)
    inside = {name: math.prod(shape) for name, shape in weights.shapes.items() if name.startswith("blocks.")}
    counted = sum(math.prod(weights.plain_shapes.get(name, weights.shapes[name])) for name in inside)
    bytewise = {*weights.formats, *weights.blocks}
    stored = sum(count * (1 if name in bytewise else precision.compute.itemsize) for name, count in inside.items())
    prebuilt_text = files.prebuilt.t5 if files.prebuilt else None
    text, vae = open_checkpoint(prebuilt_text or files.t5), open_checkpoint(files.vae)
    text_sizes = sorted(math.prod(entry.shape) * min(2, entry.dtype.itemsize) for _, entry in text.entries())
    return ModelSize(
        dit=DiTConfig.from_checkpoint(files.architecture, weights.plain_shapes),
        weight=stored / counted,
        dequantised=bool(weights.blocks),
        compute=precision.compute.itemsize,
        vae_element=precision.vae.itemsize,
        text=sum(text_sizes[:-1]),  # the largest tensor is the token table, which stays in the file
        vae=sum(map(math.prod, vae.shapes.values())) * precision.vae.itemsize,
        loras=sum(
            lora.checkpoint.nbytes if weights.blocks else lora.elements * precision.compute.itemsize
            for which in ("high", "low")
            for lora in match_loras(config.lora_configs, which, weights, config)
            if not config.build
        ),
        attention=ATTENTION_BYTES.get(config.self_attn_1_type, 0),
        loras_beside=any(lora.varies for lora in config.lora_configs)
        or (config.lora_dynamic_apply if weights.blocks else ExpertLoras.dynamic(weights, config)),
    )
