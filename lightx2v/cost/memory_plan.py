"""Where the weights live during a run: a `MemoryPlan`, and the sizes and options that it follows from."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Literal

from ..config.architecture import PATCH, DiTConfig
from ..config.engine_config import EngineConfig
from ..config.magcache import forwards_of
from ..config.request import Request

Mode = Literal["resident", "swap", "stream"]
Part = Literal["resident", "move", "stream"]
Stage = Literal["text", "image", "denoise", "decode"]

LESS = ("resident", "swap", "move", "stream")
"""Modes, and places of a part, from most to least device memory."""

GIB = 2**30
PREFETCH_SLOTS = 3
"""Slots for streamed blocks: one in use, one full, one being filled."""

VAE_WEIGHTS = 126_900_000
TEXT_BLOCKS = 24
TEXT_WEIGHTS = 4_631_000_000
"""UMT5-XXL without its token table, which stays in the file."""
TABLE_WEIGHTS = 256_384 * 4096


ATTENTION_BYTES = {"sol_attn": 4, "int8_kitchen": 4, "auto_fast": 4}
"""What these attention backends take for each token and channel: queries, keys and values in 8 bits, and sums of their
blocks. Measured for sol_attn on an H200: 3.75."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSize:
    """A model's sizes in bytes (`text`, `vae`, `loras`) and bytes per value (`weight`, `compute`, `vae_element`).

    `weight` counts for the blocks' matrices on the device (1 for FP8), `compute` for the products. `dequantised`: the
    matrices are in GGUF blocks, and a block that runs also has them in the dtype of products. `loras` is the size
    of both experts' LoRAs in low-rank form. They take device memory if they run beside the weights. They do so always
    with `loras_beside`, otherwise only if the weights stay on disk. Those that are added to dequantised weights wait
    where the weights do. `attention`: bytes that the attention kernel takes for each token and channel.
    """

    dit: DiTConfig = field(default_factory=DiTConfig)
    weight: float = 2
    dequantised: bool = False
    compute: int = 2
    vae_element: int = 2
    text: int = TEXT_WEIGHTS * 2
    vae: int = VAE_WEIGHTS * 2
    loras: int = 0
    loras_beside: bool = False
    attention: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """One video: tokens of the DiT, CFG branches, and latent height and width. `residuals`: branches for which the
    denoising keeps what all blocks added, for forwards that are skipped. `avoided`: negative prompts that no branch of
    their own reads. `rife`: RIFE adds frames."""

    tokens: int
    height: int
    width: int
    branches: int = 2
    residuals: int = 0
    avoided: int = 0
    rife: bool = False

    @classmethod
    def of(
        cls, latent_shape: tuple[int, ...], *, guided: bool, residuals: int = 0, avoided: int = 0, rife: bool = False
    ) -> Workload:
        _, frames, height, width = latent_shape
        return cls(
            tokens=frames * (height // PATCH) * (width // PATCH),
            height=height,
            width=width,
            branches=1 + guided,
            residuals=residuals,
            avoided=avoided,
            rife=rife,
        )


def workload_of(request: Request) -> Workload:
    """The work of a request, at its height and width."""
    forwards, guided = forwards_of(request), any(request.guided)
    residuals = max(len(forwards.reused(step)) for step in range(request.steps))
    return Workload.of(
        request.latent_shape,
        guided=guided,
        residuals=residuals,
        avoided=int(request.nag and not guided),
        rife=request.interpolator == "rife",
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class OffloadOptions:
    """The options of a configuration; `MemoryPlanner` decides those that are "auto"."""

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
    `sequential_cfg`: the prompts go through the whole DiT one after the other. `from_disk`: host memory has no room
    for the experts, so they are read from disk unless both stay on the device.
    `bytes`: the expected device memory of each stage.
    """

    mode: Mode
    resident_blocks: int
    prefetch_slots: int = PREFETCH_SLOTS
    text: Part = "resident"
    vae: Part = "resident"
    keep_experts: bool = True
    tiling: bool = False
    tiling_allowed: bool = True
    sequential_cfg: bool = False
    from_disk: bool = False
    bytes: dict[str, int] = field(default_factory=dict)
    reason: str = ""

    @property
    def reads_disk(self) -> bool:
        """Whether runs read the experts' blocks from disk."""
        return self.from_disk and self.mode != "resident"

    @property
    def cache_text_kv(self) -> bool:
        """Whether the experts keep a prompt's keys and values from step to step.

        Computing them takes less time than copying a block, so streamed blocks compute them anew.
        """
        return self.mode != "stream"

    def to_json(self) -> dict[str, Any]:
        """The plan for reports, whose keys keep their earlier names."""
        names = {"ring": "prefetch_slots", "together": "keep_experts", "apart": "sequential_cfg", "lazy": "reads_disk"}
        keys = "mode resident_blocks ring text vae together tiling apart lazy bytes reason"
        return {key: getattr(self, names.get(key, key)) for key in keys.split()}

    def __str__(self) -> str:
        """The reason and the expected bytes."""
        gib = ", ".join(f"{stage} {size / GIB:.1f}" for stage, size in self.bytes.items())
        return f"{self.reason} Expected on the device, in GiB: {gib}." if gib else self.reason

    @property
    def summary(self) -> str:
        """The plan in a few words."""
        experts = {
            "resident": "both experts stay on the device",
            "swap": "one expert is on the device at a time",
            "stream": f"{self.resident_blocks or 'none'} of an expert's blocks stay on the device, the others stream",
        }
        details = {
            "the weights stay on disk": self.reads_disk,
            "the text encoder waits in host memory": self.text != "resident",
            "the experts leave the device while the text encoder or the VAE runs": not self.keep_experts,
            "the VAE works in tiles": self.tiling,
            "the prompts run one after the other": self.sequential_cfg,
        }
        return ", ".join([experts[self.mode], *(words for words, true in details.items() if true)])

    def limited_to(self, limit: MemoryPlan) -> MemoryPlan:
        """This plan, reduced so that no part of it takes more device memory than in `limit`."""
        return replace(
            self,
            mode=max(self.mode, limit.mode, key=LESS.index),
            resident_blocks=min(self.resident_blocks, limit.resident_blocks),
            prefetch_slots=min(self.prefetch_slots, limit.prefetch_slots),
            text=max(self.text, limit.text, key=LESS.index),
            vae=max(self.vae, limit.vae, key=LESS.index),
            keep_experts=self.keep_experts and limit.keep_experts,
            tiling=self.tiling or limit.tiling,
            sequential_cfg=self.sequential_cfg or limit.sequential_cfg,
        )

    def share(self, stage: Stage) -> tuple[object, ...]:
        """The choices that decide how much memory `stage` takes."""
        parts = self.text == "resident", self.vae == "resident"
        if stage == "denoise":
            return *parts, self.mode, self.resident_blocks, self.prefetch_slots, self.sequential_cfg
        return *parts, self.keep_experts and self.mode, self.text if stage == "text" else self.tiling


def plan_from_disk(config: EngineConfig) -> MemoryPlan:
    """For a device without memory of its own: nothing is offloaded, and the experts' blocks are read as they run."""
    return MemoryPlan(
        mode="stream",
        resident_blocks=0,
        tiling=config.use_tiling_vae is True,
        tiling_allowed=config.use_tiling_vae is not False,
        from_disk=True,
        reason="The weights stay on disk and are read as they are needed.",
    )
