"""FoundModel: found files combined to a model that runs, and what does not fit together.

`settings` are those of a preset file: the starting settings are a shipped preset's for the same task and kind of model,
the files are the found ones. A text encoder, VAE or tokenizer that is not found comes from the Hub, as in any preset.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..config.architecture import INPUT_CHANNELS, MODEL_KIND, DiTConfig
from ..config.engine_config import FILE_KEYS
from ..config.phases import Expert
from ..config.presets import PRESETS, Resolved, read_json, resolve
from ..config.request import Task
from ..errors import CheckpointError, byte_size
from .found_file import QUANTISED, FoundFile

SMALL_MODEL = 1024
"""A model of fewer channels is a small one, such as the demo's, and starts from the demo's settings."""
SMALL_VAE, SMALL_TOKENIZER = 96, 1_000_000
"""The same for a VAE's channels and for the bytes of a tokenizer."""
_MODEL_KEYS = (
    *FILE_KEYS,
    *("preset", "model_cls", "model_path", "task", "build", "lora_configs", "lora_dynamic_apply"),
    *("dit_quantized", "dit_quant_scheme", "t5_quantized", "t5_quant_scheme"),
)
"""Keys of a shipped preset that say which model it loads."""


_OF_WAN_2_1 = re.compile(r"wan[ _.-]?2[ _.]1(?![0-9])", re.IGNORECASE)


@dataclass(frozen=True, slots=True, kw_only=True)
class PlacedLora:
    """A LoRA for one expert, or by its name for both ("auto")."""

    file: FoundFile
    expert: Expert | str = "auto"
    strength: float = 1.0

    def to_json(self) -> dict[str, Any]:
        name = {"high": "high_noise_model", "low": "low_noise_model"}.get(self.expert, "auto")
        return {"name": name, "path": str(self.file.path), "strength": self.strength}


@dataclass(frozen=True, slots=True, kw_only=True)
class FoundModel:
    """Two experts and, as far as they are found, the other parts. `name` tells nothing of folders."""

    name: str
    high: FoundFile
    low: FoundFile
    text_encoder: FoundFile | None = None
    vae: FoundFile | None = None
    tokenizer: FoundFile | None = None
    loras: tuple[PlacedLora, ...] = ()

    @property
    def task(self) -> Task:
        return self.high.task or "t2v"

    @property
    def variant(self) -> str:
        """One of config.presets.VARIANTS."""
        if self.high.distilled and self.low.distilled:
            return "distill_fp8" if self._quantisation else "distill_merged"
        return "distill_lora" if any(lora.file.distilled for lora in self.loras) else "base"

    @property
    def files(self) -> list[FoundFile]:
        """Each file once."""
        parts = (self.high, self.low, self.text_encoder, self.vae, *(lora.file for lora in self.loras))
        return list({file.path: file for file in parts if file is not None}.values())

    @property
    def summary(self) -> str:
        """Its quantisation and the size of its experts."""
        kinds = dict.fromkeys(filter(None, (self.high.quantisation, self.low.quantisation)))
        return f"{' and '.join(kinds)}, {byte_size(self.high.size + self.low.size)}"

    @property
    def problems(self) -> tuple[str, ...]:
        """What keeps these files from running together; empty for a model that runs."""
        return tuple(misfits(self))

    def settings(self, start: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """The content of a preset file. CheckpointError where the files do not fit together.

        `start` is the content of another preset, whose settings of the video are to be used.
        """
        if problem := next(iter(self.problems), ""):
            raise CheckpointError(problem)
        if start is None:
            start = starting_settings(self.task, self.variant, self.high.width)
        settings = {key: value for key, value in start.items() if key not in _MODEL_KEYS}
        settings |= {
            "preset": {"title": self.name, "summary": self.summary, "task": self.task, "variant": self.variant},
            "task": self.task,
            **self._experts(),
            **self._other_parts(),
        }
        if self.loras:
            settings["lora_configs"] = [lora.to_json() for lora in self.loras]
            settings["lora_dynamic_apply"] = self._quantisation in QUANTISED
        return settings

    def resolved(self) -> Resolved:
        """The settings as `resolve` gives those of a preset, under the model's name."""
        resolved = resolve(self.settings())
        return replace(resolved, preset=replace(resolved.preset, name=self.name))

    @property
    def _quantisation(self) -> str:
        """The format of both experts; "" where one is not quantised."""
        return self.high.quantisation if self.high.quantised and self.low.quantised else ""

    def _experts(self) -> dict[str, Any]:
        kind = "quantized" if self._quantisation else "original"
        settings: dict[str, Any] = {
            f"{expert}_noise_{kind}_ckpt": str(file.path) for expert, file in (("high", self.high), ("low", self.low))
        }
        if self._quantisation:
            settings |= {"dit_quantized": True, "dit_quant_scheme": scheme(self.high)}
        return settings

    def _other_parts(self) -> dict[str, Any]:
        settings: dict[str, Any] = {}
        if (encoder := self.text_encoder) is not None and encoder.quantised:
            settings |= {
                "t5_quantized": True,
                "t5_quant_scheme": scheme(encoder),
                "t5_quantized_ckpt": str(encoder.path),
            }
        elif encoder is not None:
            settings["t5_original_ckpt"] = str(encoder.path)
        if self.vae is not None:
            settings["vae_path"] = str(self.vae.path)
        if self.tokenizer is not None:
            settings["t5_tokenizer_path"] = str(self.tokenizer.path)
            complete = self.text_encoder is not None and self.vae is not None
            if complete and (root := _model_root(self.tokenizer.path, self.high)) is not None:
                settings["model_path"] = str(root)
        return settings


def scheme(file: FoundFile) -> str:
    """LightX2V's name for the format of a quantised file."""
    return f"gguf-{file.quantisation}" if file.gguf else f"{file.quantisation}-sgl"


def starting_settings(task: Task, variant: str, width: int) -> dict[str, Any]:
    """The content of the shipped preset for this task and kind of model, large or small."""
    if width and width < SMALL_MODEL:
        name = f"demo_{task}_{variant if variant in ('base', 'distill_lora') else variant.removeprefix('distill_')}"
    else:
        name = f"{task}_{variant}"
    return read_json(PRESETS / f"{name}.json")


def misfits(model: FoundModel) -> Iterator[str]:
    """Why these files cannot make a video together, the gravest reason first."""
    high, low = model.high, model.low
    for role, file in (("high-noise expert", high), ("low-noise expert", low)):
        if file.kind != "expert":
            yield f"{file.name} is of the kind {file.kind}, not expert. Choose an expert's file as {role}."
            return
        if file.problem:
            yield file.problem
    if high.path == low.path:
        yield f"{high.name} is given for both experts. Choose the other half of the pair for one of them."
    elif high.task != low.task:
        yield f"{high.name} is {_kind(high)}, {low.name} is {_kind(low)}. Choose two experts for the same task."
    elif high.width != low.width:
        yield f"{high.name} has {high.width} channels, {low.name} has {low.width}: they are two models. Choose a pair."
    for part, file in (("text encoder", model.text_encoder), ("VAE", model.vae)):
        if file is not None and file.kind != part:
            yield f"{file.name} is of the kind {file.kind}, not {part}. Choose a {part}'s file."
        elif file is not None and file.problem:
            yield file.problem
    if (encoder := model.text_encoder) is not None and encoder.text_width != high.text_width:
        yield (
            f"{encoder.name} gives {encoder.text_width} channels, {high.name} takes {high.text_width}. Choose the text "
            "encoder of this model."
        )
    for lora in model.loras:
        if lora.file.kind != "LoRA":
            yield f"{lora.file.name} is of the kind {lora.file.kind}, not LoRA. Choose a LoRA's file."
        elif lora.file.width and high.width and lora.file.width != high.width:
            yield (
                f"The LoRA {lora.file.name} is for a model of {lora.file.width} channels, {high.name} has "
                f"{high.width}. Choose a LoRA for this model."
            )


def doubts(model: FoundModel) -> Iterator[str]:
    """What looks like a mistake and is left to the person who chose it."""
    for role, other, file in (("high", "low", model.high), ("low", "high", model.low)):
        if file.expert == other:
            yield f"{file.name} is by its name the {other}-noise expert and is used for {role} noise."
        elif _OF_WAN_2_1.search(file.name):
            yield f"{file.name} is by its name of Wan2.1, which has one model for high and low noise."
    if model.high.distilled != model.low.distilled and not model.loras:
        yield "One expert is distilled and the other is not. Set the number of steps for each by hand."


def _kind(expert: FoundFile) -> str:
    channels = INPUT_CHANNELS[expert.task or "t2v"]
    return f"for {MODEL_KIND[channels]} ({channels} input channels)"


def fits(part: FoundFile, expert: FoundFile) -> bool:
    """Whether a text encoder, VAE or tokenizer belongs to models like this expert: full-size or small ones."""
    small = bool(expert.width) and expert.width < SMALL_MODEL
    if part.kind == "text encoder":
        return part.text_width == expert.text_width
    if part.kind == "VAE":
        return (part.width < SMALL_VAE) == small
    return _model_root(part.path, expert) is not None if small else part.size >= SMALL_TOKENIZER


def _model_root(tokenizer: Path, expert: FoundFile) -> Path | None:
    """The model folder in the official layout around this tokenizer, if its architecture is the expert's."""
    root = tokenizer.parents[1]
    if not any((root / place / "config.json").is_file() for place in ("high_noise_model", "low_noise_model")):
        return None
    try:
        shape = DiTConfig.from_folder(root)
    except (OSError, ValueError):
        return None
    return root if (shape.dim, shape.in_dim) == (expert.width, INPUT_CHANNELS[expert.task or "t2v"]) else None
