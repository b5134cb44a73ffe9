"""Which weights live on the device, and how much memory each stage of a run takes: counted before anything is loaded.

    plan = choose(Machine(vram=…, ram=…), Model(), Need(tokens=32_760, …))
    plan.mode, plan.resident_blocks, plan.tiling, plan.bytes, plan.reason

Four ways, the fastest that fits: both experts on the device; one, with the other one swapped in place; the first blocks
of one, with the rest streamed; all streamed. `Plan.lower` is the next smaller way, for when counting was too hopeful.

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
class Machine:
    """Free memory in bytes: of the device before anything is loaded, and of the host."""

    vram: int
    ram: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
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
class Need:
    """One video: tokens of the DiT, guidance branches, and latent height and width."""

    tokens: int
    height: int
    width: int
    branches: int = 2

    @classmethod
    def of(cls, latent_shape: tuple[int, ...], *, guided: bool) -> Need:
        _, frames, height, width = latent_shape
        return cls(tokens=frames * (height // 2) * (width // 2), height=height, width=width, branches=1 + guided)


@dataclass(frozen=True, slots=True, kw_only=True)
class Wishes:
    """What a configuration leaves open ("auto") and what it says."""

    cpu_offload: bool | Literal["auto"] = "auto"
    granularity: str = "model"
    text_offload: bool | Literal["auto"] = "auto"
    vae_offload: bool | Literal["auto"] = "auto"
    tiling: bool | Literal["auto"] = "auto"
    lazy: bool = False

    @classmethod
    def of(cls, config: EngineConfig) -> Wishes:
        return cls(
            cpu_offload=config.cpu_offload,
            granularity="model" if config.offload_granularity == "model" else "block",
            text_offload=config.t5_cpu_offload,
            vae_offload=config.vae_cpu_offload,
            tiling=config.use_tiling_vae,
            lazy=config.lazy_load,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """`resident_blocks` of one expert stay, `ring` slots take turns with the others. `together`: the experts keep their
    device memory while the text encoder and the VAE run. `apart`: the prompts take turns in the whole DiT. `lazy`:
    weights stay on disk. `host_fits`: host memory has room for the experts. `bytes`: expected on the device, by stage.
    """

    mode: Mode
    resident_blocks: int
    ring: int = RING
    text: Part = "resident"
    vae: Part = "resident"
    together: bool = True
    tiling: bool = False
    tiling_allowed: bool = True
    apart: bool = False
    lazy: bool = False
    host_fits: bool = True
    bytes: dict[str, int] = field(default_factory=dict)
    reason: str = ""

    @property
    def keep_text(self) -> bool:
        """Whether the experts keep a prompt's keys and values from step to step. Making them takes less time than a
        block's copy, so they are made anew where blocks are streamed."""
        return self.mode != "stream"

    def to_json(self) -> dict[str, Any]:
        names = "mode resident_blocks ring text vae together tiling apart lazy bytes reason"
        return {name: getattr(self, name) for name in names.split()}

    def __str__(self) -> str:
        """The reason, and the bytes that are expected."""
        gib = ", ".join(f"{stage} {size / GIB:.1f}" for stage, size in self.bytes.items())
        return f"{self.reason} Expected on the device, in GiB: {gib}." if gib else self.reason

    def lower(self, stage: Stage) -> Plan | None:
        """The next smaller plan after `stage` ran out of memory; None where nothing is left to give."""
        if self.mode == "resident" and self.text == "resident":
            return replace(self, text="move")
        if self.mode == "resident":
            if not self.host_fits:
                return None
            return replace(self, mode="swap", vae="move", together=stage == "denoise")
        if self.text == "resident" or self.vae == "resident":
            return replace(self, text="move" if self.text == "resident" else self.text, vae="move")
        if stage != "denoise" and self.together:
            return replace(self, together=False)
        if stage == "text":
            return replace(self, text="stream") if self.text == "move" else None
        if stage in ("image", "decode"):
            return replace(self, tiling=True) if not self.tiling and self.tiling_allowed else None
        if self.mode == "swap":
            return replace(self, mode="stream", resident_blocks=self.resident_blocks // 2)
        if self.resident_blocks:
            return replace(self, resident_blocks=self.resident_blocks // 2)
        if not self.apart:
            return replace(self, apart=True)
        return replace(self, ring=2) if self.ring > 2 else None


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


def block_bytes(model: Model) -> int:
    return int(block_weights(model.dit) * model.weight)


def outside_bytes(model: Model) -> int:
    wide, text = outside_weights(model.dit)
    return 4 * wide + model.compute * text


def expert_bytes(model: Model) -> int:
    return block_bytes(model) * model.dit.num_layers + outside_bytes(model)


def denoise_bytes(model: Model, need: Need, *, apart: bool = False, keep_text: bool = True) -> int:
    """Activations at the peak of a block, and the prompts' keys and values; weights not counted.

    Per token and channel: the residual in float32, one for each branch that is not `apart`; then the normed input,
    queries, keys and values, or these without the input and with the attention's output. 8-bit products add their
    input in 8 bits. The feed-forward goes by chunks: its input and two inner tensors.
    """
    d, e, branches = model.dit.dim, model.compute, 1 if apart else need.branches
    attention = need.tokens * d * (4 * e + (model.weight < e))
    feed_forward = min(CHUNK, need.tokens) * (d + 2 * model.dit.ffn_dim) * e
    rotations = need.tokens * HEAD * 4
    text = need.branches * model.dit.text_len * d * e * 2 * (model.dit.num_layers if keep_text else 1)
    return 4 * need.tokens * d * branches + max(attention, feed_forward) + rotations + text


def decode_bytes(model: Model, need: Need, *, tiling: bool = False) -> int:
    """Decoding, besides the VAE's weights. Tiles are one after another, finished frames lie in host memory."""
    height, width = (tile_side(side) if tiling else side for side in (need.height, need.width))
    return height * width * DECODE_ELEMENTS * model.vae_element


def tile_side(side: int) -> int:
    """As in models/tiling.py: equal tiles, as few as possible."""
    size, overlap = TILE
    count = max(1, -(-(side - overlap) // (size - overlap)))
    return -(-(side + (count - 1) * overlap) // count)


def stage_bytes(plan: Plan, model: Model, need: Need) -> dict[str, int]:
    """Device memory of each stage, in the order of a run."""
    per_block = block_bytes(model)
    if plan.mode == "resident":
        experts = 2 * expert_bytes(model)
    else:
        streamed = model.dit.num_layers - plan.resident_blocks
        experts = outside_bytes(model) + per_block * (plan.resident_blocks + min(plan.ring, streamed))
    staying = (model.text if plan.text == "resident" else 0) + (model.vae if plan.vae == "resident" else 0)
    staying += model.loras if model.loras_beside or plan.lazy else 0
    beside = staying + (experts if plan.together else 0)
    text = {"resident": 0, "move": model.text, "stream": model.text * RING // TEXT_BLOCKS}[plan.text]
    vae = model.vae if plan.vae != "resident" else 0
    work = {
        "text": 64 * 2**20,
        "denoise": denoise_bytes(model, need, apart=plan.apart, keep_text=plan.keep_text),
        "decode": decode_bytes(model, need, tiling=plan.tiling),
    }
    weights = {"text": beside + text, "denoise": staying + experts, "decode": beside + vae}
    return {stage: int(weights[stage] + SLACK * work[stage]) for stage in work}


def host_bytes(plan: Plan, model: Model) -> int:
    """The weights that wait in host memory; what is read from disk as it is needed is none of them."""
    experts = 0 if plan.mode == "resident" or plan.lazy else 2 * expert_bytes(model)
    text = 0 if plan.text == "resident" else model.text
    return int(experts + text + (0 if plan.vae == "resident" else model.vae))


@dataclass(frozen=True, slots=True, kw_only=True)
class Planner:
    """`choose` for one loaded model on one machine."""

    machine: Machine
    model: Model
    wishes: Wishes

    def plan(self, need: Need) -> Plan:
        return choose(self.machine, self.model, need, self.wishes)

    def counted(self, plan: Plan, need: Need, reason: str) -> Plan:
        """Another plan with its bytes for `need`."""
        return replace(plan, bytes=stage_bytes(plan, self.model, need), reason=reason)


def choose(machine: Machine, model: Model, need: Need, wishes: Wishes | None = None) -> Plan:
    """The fastest plan whose every stage fits into the device, within what is wished; the smallest if none does."""
    wishes = wishes or Wishes()
    room = machine.vram - RESERVE
    lazy = wishes.lazy or 2 * expert_bytes(model) + model.text > machine.ram
    variants = [each for plan in _candidates(model, wishes, lazy=lazy) for each in _variants(plan, wishes)]
    if wishes.tiling == "auto":  # tiles are not exact, so they are the last resort
        variants += [replace(each, tiling=True) for each in variants]
    for plan in variants:
        needed = stage_bytes(plan, model, need)
        if max(needed.values()) <= room:
            return replace(plan, bytes=needed, reason=_reason(plan, model, machine, fits=True))
    least = min(variants, key=lambda plan: max(stage_bytes(plan, model, need).values()))
    return replace(least, bytes=stage_bytes(least, model, need), reason=_reason(least, model, machine, fits=False))


def from_disk(config: EngineConfig) -> Plan:
    """For a device whose memory is the host's: nothing is offloaded, and the experts' blocks are read as they run."""
    return Plan(
        mode="stream",
        resident_blocks=0,
        tiling=config.use_tiling_vae is True,
        tiling_allowed=config.use_tiling_vae is not False,
        lazy=True,
        reason="The weights stay on disk and are read as they are needed.",
    )


def _candidates(model: Model, wishes: Wishes, *, lazy: bool) -> list[Plan]:
    """Modes from fast to small. Streaming is free where a block computes longer than its copy takes; as many resident
    blocks as fit make it free elsewhere too."""
    layers = model.dit.num_layers
    both = Plan(
        mode="resident",
        resident_blocks=layers,
        tiling=wishes.tiling is True,
        tiling_allowed=wishes.tiling is not False,
        host_fits=not lazy,
    )
    swap = replace(both, mode="swap", text="move", vae="move", lazy=lazy)
    stream = [replace(swap, mode="stream", resident_blocks=count) for count in range(layers - RING - 1, -1, -1)]
    least = replace(swap, mode="stream", resident_blocks=0)
    small = [replace(least, apart=True), replace(least, apart=True, ring=2)]
    if wishes.cpu_offload is False:
        return [both]
    if wishes.cpu_offload is True:
        return [swap, *stream, *small] if wishes.granularity == "model" else [least, *small]
    return [*([] if wishes.lazy else [both]), swap, *stream, *small]


def _variants(plan: Plan, wishes: Wishes) -> list[Plan]:
    """A mode with text encoder and VAE in all the places they may have, from fast to small."""
    moved = wishes.text_offload is True or (wishes.text_offload == "auto" and plan.mode != "resident")
    texts: list[Part] = ["resident"] if wishes.text_offload is False else ["move", "stream"]
    if not moved and wishes.text_offload == "auto":
        texts.insert(0, "resident")
    vae = plan.vae if wishes.vae_offload == "auto" else "move" if wishes.vae_offload else "resident"
    places = (True, False) if plan.mode != "resident" else (True,)
    return [replace(plan, text=text, vae=vae, together=together) for text in texts for together in places]


def _reason(plan: Plan, model: Model, machine: Machine, *, fits: bool) -> str:
    free = f"{machine.vram / GIB:.0f} GiB of device memory are free"
    layers = model.dit.num_layers
    what = {
        "resident": "both experts stay on the device",
        "swap": "one expert is on the device at a time",
        "stream": f"{plan.resident_blocks} of {layers} blocks stay on the device, the others stream",
    }[plan.mode]
    more = [
        *(["the weights stay on disk"] if plan.lazy and plan.mode != "resident" else []),
        *(["the LoRAs run beside them"] if plan.lazy and plan.mode != "resident" and model.loras else []),
        *(["the VAE works in tiles"] if plan.tiling else []),
        *(["the prompts take turns"] if plan.apart else []),
    ]
    text = f"{free}: " + ", ".join([what, *more]) + "."
    return text if fits else text + " It may not be enough."
