"""Which weights live on the device, and how much memory each stage of a run takes: counted before anything is loaded.

    plan = choose(FreeMemory(vram=…, ram=…), ModelSize(), Workload(tokens=32_760, …))
    plan.mode, plan.resident_blocks, plan.tiling, plan.bytes, plan.reason

Four ways, the fastest that fits: both experts on the device; one, with the other one swapped in place; the first blocks
of one, with the rest streamed; all streamed. `MemoryPlan.reduce_memory` is the next smaller one after an
out-of-memory error.

Only arithmetic, so the page can say what will happen before it does. Bytes are those of tensors; what the allocator
and the CUDA context take besides is in `RESERVE` and `SLACK`.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Literal

from ..config.engine_config import EngineConfig
from .run_time import DiTShape

Mode = Literal["resident", "swap", "stream"]
Part = Literal["resident", "move", "stream"]
Stage = Literal["text", "image", "denoise", "decode"]

GIB = 2**30
RESERVE = GIB * 3 // 4
"""Left alone: cuBLAS and cuDNN workspaces, other programs' growth."""
SLACK = 1.08
"""What the allocator loses to rounding and fragments, as a factor on everything but the weights."""
RING = 3
"""Slots for streamed blocks: one in use, one full, one being filled."""

CHUNK = 16384
"""Tokens in the feed-forward at once, as in models/dit.py."""

HEAD = 128
"""Channels of a head: its rotation is as many float32 values per token."""

VAE_WEIGHTS = 126_900_000
TEXT_BLOCKS = 24
TEXT_WEIGHTS = 4_631_000_000
"""UMT5-XXL without its token table, which stays in the file."""

DECODE_ELEMENTS = 300_000
"""Values alive per latent pixel (8 x 8 pixels) while decoding: the memory of the past and the last stage's work."""
TILE = (32, 8)
"""A tile's largest side and overlap in latent pixels, as in models/tiling.py."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FreeMemory:
    """Free memory in bytes: of the device before anything is loaded, and of the host."""

    vram: int
    ram: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSize:
    """Sizes and bytes per value: `weight` of the blocks' matrices on the device (1 for FP8), `compute` of products.

    `loras` are the bytes of both experts' LoRAs in low-rank form. They are on the device where they run beside the
    weights: always with `loras_beside`, else where the weights stay on disk.
    """

    dit: DiTShape = field(default_factory=DiTShape)
    weight: float = 2
    compute: int = 2
    vae_element: int = 2
    text: int = TEXT_WEIGHTS * 2
    vae: int = VAE_WEIGHTS * 2
    loras: int = 0
    loras_beside: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """One video: tokens of the DiT, guidance branches, and latent height and width."""

    tokens: int
    height: int
    width: int
    branches: int = 2

    @classmethod
    def of(cls, latent_shape: tuple[int, ...], *, guided: bool) -> Workload:
        _, frames, height, width = latent_shape
        return cls(tokens=frames * (height // 2) * (width // 2), height=height, width=width, branches=1 + guided)


@dataclass(frozen=True, slots=True, kw_only=True)
class OffloadOptions:
    """What a configuration leaves open ("auto") and what it says."""

    cpu_offload: bool | Literal["auto"] = "auto"
    granularity: str = "model"
    text_offload: bool | Literal["auto"] = "auto"
    vae_offload: bool | Literal["auto"] = "auto"
    tiling: bool | Literal["auto"] = "auto"
    from_disk: bool = False

    @classmethod
    def of(cls, config: EngineConfig) -> OffloadOptions:
        return cls(
            cpu_offload=config.cpu_offload,
            granularity="model" if config.offload_granularity == "model" else "block",
            text_offload=config.t5_cpu_offload,
            vae_offload=config.vae_cpu_offload,
            tiling=config.use_tiling_vae,
            from_disk=config.lazy_load,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryPlan:
    """Where the weights live during a run.

    `resident_blocks` blocks of one expert stay on the device; the others take turns in `prefetch_slots` slots.
    `keep_experts`: the experts keep their device memory while the text encoder and the VAE run.
    `sequential_cfg`: the prompts go through the whole DiT one after the other. `from_disk`: weights stay on disk.
    `host_fits`: host memory has room for the experts. `bytes`: the expected device memory of each stage.
    """

    mode: Mode
    resident_blocks: int
    prefetch_slots: int = RING
    text: Part = "resident"
    vae: Part = "resident"
    keep_experts: bool = True
    tiling: bool = False
    tiling_allowed: bool = True
    sequential_cfg: bool = False
    from_disk: bool = False
    host_fits: bool = True
    bytes: dict[str, int] = field(default_factory=dict)
    reason: str = ""

    @property
    def cache_text_kv(self) -> bool:
        """Whether the experts keep a prompt's keys and values from step to step. Making them takes less time than a
        block's copy, so they are made anew where blocks are streamed."""
        return self.mode != "stream"

    def to_json(self) -> dict[str, Any]:
        """For reports, under the keys that they always had."""
        return {
            "mode": self.mode,
            "resident_blocks": self.resident_blocks,
            "ring": self.prefetch_slots,
            "text": self.text,
            "vae": self.vae,
            "together": self.keep_experts,
            "tiling": self.tiling,
            "apart": self.sequential_cfg,
            "lazy": self.from_disk,
            "bytes": self.bytes,
            "reason": self.reason,
        }

    def __str__(self) -> str:
        """The reason, and the bytes that are expected."""
        gib = ", ".join(f"{stage} {size / GIB:.1f}" for stage, size in self.bytes.items())
        return f"{self.reason} Expected on the device, in GiB: {gib}." if gib else self.reason

    def reduce_memory(self, stage: Stage) -> MemoryPlan | None:
        """The next smaller plan after `stage` ran out of memory; None where nothing is left to give."""
        if self.mode == "resident" and self.text == "resident":
            return replace(self, text="move")
        if self.mode == "resident":
            if not self.host_fits:
                return None
            return replace(self, mode="swap", vae="move", keep_experts=stage == "denoise")
        if self.text == "resident" or self.vae == "resident":
            return replace(self, text="move" if self.text == "resident" else self.text, vae="move")
        if stage != "denoise" and self.keep_experts:
            return replace(self, keep_experts=False)
        if stage == "text":
            return replace(self, text="stream") if self.text == "move" else None
        if stage in ("image", "decode"):
            return replace(self, tiling=True) if not self.tiling and self.tiling_allowed else None
        if self.mode == "swap":
            return replace(self, mode="stream", resident_blocks=self.resident_blocks // 2)
        if self.resident_blocks:
            return replace(self, resident_blocks=self.resident_blocks // 2)
        if not self.sequential_cfg:
            return replace(self, sequential_cfg=True)
        return replace(self, prefetch_slots=2) if self.prefetch_slots > 2 else None


def block_weights(shape: DiTShape) -> int:
    """Parameters of one block."""
    d, f = shape.dim, shape.ffn_dim
    attention = 4 * (d * d + d) + 2 * d
    return 2 * attention + 2 * d * f + f + d + 2 * d + 6 * d


def outside_weights(shape: DiTShape) -> tuple[int, int]:
    """Parameters outside of the blocks: (those kept in float32, the text embedding's)."""
    d, frequencies, out = shape.dim, 256, 16
    patch = 4 * shape.in_dim * d + d
    time = frequencies * d + d + d * d + d + 6 * d * d + 6 * d
    head = d * 4 * out + 4 * out + 2 * d
    text = shape.text_dim * d + d + d * d + d
    return patch + time + head, text


def block_bytes(model: ModelSize) -> int:
    return int(block_weights(model.dit) * model.weight)


def outside_bytes(model: ModelSize) -> int:
    wide, text = outside_weights(model.dit)
    return 4 * wide + model.compute * text


def expert_bytes(model: ModelSize) -> int:
    return block_bytes(model) * model.dit.num_layers + outside_bytes(model)


def denoise_bytes(
    model: ModelSize, workload: Workload, *, sequential_cfg: bool = False, cache_text_kv: bool = True
) -> int:
    """Activations at the peak of a block, and the prompts' keys and values; weights not counted.

    Per token and channel: the residual in float32, one for each branch that is not `apart`; then the normed input,
    queries, keys and values, or these without the input and with the attention's output. 8-bit products add their
    input in 8 bits. The feed-forward goes by chunks: its input and two inner tensors.
    """
    d, e, branches = model.dit.dim, model.compute, 1 if sequential_cfg else workload.branches
    attention = workload.tokens * d * (4 * e + (model.weight < e))
    feed_forward = min(CHUNK, workload.tokens) * (d + 2 * model.dit.ffn_dim) * e
    rotations = workload.tokens * HEAD * 4
    text = workload.branches * model.dit.text_len * d * e * 2 * (model.dit.num_layers if cache_text_kv else 1)
    return 4 * workload.tokens * d * branches + max(attention, feed_forward) + rotations + text


def decode_bytes(model: ModelSize, workload: Workload, *, tiling: bool = False) -> int:
    """Decoding, besides the VAE's weights. Tiles are one after another, finished frames lie in host memory."""
    height, width = (tile_side(side) if tiling else side for side in (workload.height, workload.width))
    return height * width * DECODE_ELEMENTS * model.vae_element


def tile_side(side: int) -> int:
    """As in models/tiling.py: equal tiles, as few as possible."""
    size, overlap = TILE
    count = max(1, -(-(side - overlap) // (size - overlap)))
    return -(-(side + (count - 1) * overlap) // count)


def stage_bytes(plan: MemoryPlan, model: ModelSize, workload: Workload) -> dict[str, int]:
    """Device memory of each stage, in the order of a run."""
    per_block = block_bytes(model)
    if plan.mode == "resident":
        experts = 2 * expert_bytes(model)
    else:
        streamed = model.dit.num_layers - plan.resident_blocks
        experts = outside_bytes(model) + per_block * (plan.resident_blocks + min(plan.prefetch_slots, streamed))
    staying = (model.text if plan.text == "resident" else 0) + (model.vae if plan.vae == "resident" else 0)
    staying += model.loras if model.loras_beside or plan.from_disk else 0
    beside = staying + (experts if plan.keep_experts else 0)
    text = {"resident": 0, "move": model.text, "stream": model.text * RING // TEXT_BLOCKS}[plan.text]
    vae = model.vae if plan.vae != "resident" else 0
    work = {
        "text": 64 * 2**20,
        "denoise": denoise_bytes(model, workload, sequential_cfg=plan.sequential_cfg, cache_text_kv=plan.cache_text_kv),
        "decode": decode_bytes(model, workload, tiling=plan.tiling),
    }
    weights = {"text": beside + text, "denoise": staying + experts, "decode": beside + vae}
    return {stage: int(weights[stage] + SLACK * work[stage]) for stage in work}


def host_bytes(plan: MemoryPlan, model: ModelSize) -> int:
    """The weights that wait in host memory; what is read from disk as it is needed is none of them."""
    experts = 0 if plan.mode == "resident" or plan.from_disk else 2 * expert_bytes(model)
    text = 0 if plan.text == "resident" else model.text
    return int(experts + text + (0 if plan.vae == "resident" else model.vae))


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryPlanner:
    """`choose` for one loaded model on one machine."""

    free: FreeMemory
    model: ModelSize
    options: OffloadOptions

    def plan(self, workload: Workload) -> MemoryPlan:
        return choose(self.free, self.model, workload, self.options)

    def counted(self, plan: MemoryPlan, workload: Workload, reason: str) -> MemoryPlan:
        """Another plan with its bytes for `workload`."""
        return replace(plan, bytes=stage_bytes(plan, self.model, workload), reason=reason)


def choose(free: FreeMemory, model: ModelSize, workload: Workload, options: OffloadOptions | None = None) -> MemoryPlan:
    """The fastest plan whose every stage fits into the device, within what is wished; the smallest if none does."""
    options = options or OffloadOptions()
    room = free.vram - RESERVE
    lazy = options.from_disk or 2 * expert_bytes(model) + model.text > free.ram
    variants = [each for plan in _candidates(model, options, lazy=lazy) for each in _variants(plan, options)]
    if options.tiling == "auto":  # tiles are not exact, so they are the last resort
        variants += [replace(each, tiling=True) for each in variants]
    for plan in variants:
        needed = stage_bytes(plan, model, workload)
        if max(needed.values()) <= room:
            return replace(plan, bytes=needed, reason=_reason(plan, model, free, fits=True))
    least = min(variants, key=lambda plan: max(stage_bytes(plan, model, workload).values()))
    return replace(least, bytes=stage_bytes(least, model, workload), reason=_reason(least, model, free, fits=False))


def from_disk(config: EngineConfig) -> MemoryPlan:
    """For a device whose memory is the host's: nothing is offloaded, and the experts' blocks are read as they run."""
    return MemoryPlan(
        mode="stream",
        resident_blocks=0,
        tiling=config.use_tiling_vae is True,
        tiling_allowed=config.use_tiling_vae is not False,
        from_disk=True,
        reason="The weights stay on disk and are read as they are needed.",
    )


def _candidates(model: ModelSize, options: OffloadOptions, *, lazy: bool) -> list[MemoryPlan]:
    """Modes from fast to small. Streaming is free where a block computes longer than its copy takes; as many resident
    blocks as fit make it free elsewhere too."""
    layers = model.dit.num_layers
    both = MemoryPlan(
        mode="resident",
        resident_blocks=layers,
        tiling=options.tiling is True,
        tiling_allowed=options.tiling is not False,
        host_fits=not lazy,
    )
    swap = replace(both, mode="swap", text="move", vae="move", from_disk=lazy)
    stream = [replace(swap, mode="stream", resident_blocks=count) for count in range(layers - RING - 1, -1, -1)]
    least = replace(swap, mode="stream", resident_blocks=0)
    small = [replace(least, sequential_cfg=True), replace(least, sequential_cfg=True, prefetch_slots=2)]
    if options.cpu_offload is False:
        return [both]
    if options.cpu_offload is True:
        return [swap, *stream, *small] if options.granularity == "model" else [least, *small]
    return [*([] if options.from_disk else [both]), swap, *stream, *small]


def _variants(plan: MemoryPlan, options: OffloadOptions) -> list[MemoryPlan]:
    """A mode with text encoder and VAE in all the places they may have, from fast to small."""
    moved = options.text_offload is True or (options.text_offload == "auto" and plan.mode != "resident")
    texts: list[Part] = ["resident"] if options.text_offload is False else ["move", "stream"]
    if not moved and options.text_offload == "auto":
        texts.insert(0, "resident")
    vae = plan.vae if options.vae_offload == "auto" else "move" if options.vae_offload else "resident"
    places = (True, False) if plan.mode != "resident" else (True,)
    return [replace(plan, text=text, vae=vae, keep_experts=keep_experts) for text in texts for keep_experts in places]


def _reason(plan: MemoryPlan, model: ModelSize, free: FreeMemory, *, fits: bool) -> str:
    available = f"{free.vram / GIB:.0f} GiB of device memory are free"
    layers = model.dit.num_layers
    what = {
        "resident": "both experts stay on the device",
        "swap": "one expert is on the device at a time",
        "stream": f"{plan.resident_blocks} of {layers} blocks stay on the device, the others stream",
    }[plan.mode]
    more = [
        *(["the weights stay on disk"] if plan.from_disk and plan.mode != "resident" else []),
        *(["the LoRAs run beside them"] if plan.from_disk and plan.mode != "resident" and model.loras else []),
        *(["the VAE works in tiles"] if plan.tiling else []),
        *(["the prompts take turns"] if plan.sequential_cfg else []),
    ]
    text = f"{available}: " + ", ".join([what, *more]) + "."
    return text if fits else text + " It may not be enough."
