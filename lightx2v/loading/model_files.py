"""From an EngineConfig to the files of a model: both experts, text encoder, tokenizer, VAE, architecture.

A folder in the official layout needs no more than its name; every part can also be named by itself. A relative path is
looked for below `models_dir`, the working folder, the project, and in and beside the model. All that is missing is
named in one error, with the places that were looked at and what to do. A name on the Hub is looked for in the cache
that all programs share; nothing is fetched here (hub/).
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..config.model_paths import PROJECT
from ..errors import CheckpointError, short_path
from ..hub import find_cached

if TYPE_CHECKING:
    from ..config.engine_config import EngineConfig

VAE_NAME = "Wan2.1_VAE.pth"
T5_NAME = "models_t5_umt5-xxl-enc-{}.pth"
SHARED_FOLDERS = ("distill_int8", "distill_fp8", "distill_models", "int8", "fp8", "original", "")
"""Where below the model folder LightX2V looks for T5 and VAE, in its order."""

ARCHITECTURE_FOLDERS = (
    "",
    "low_noise_model",
    "high_noise_model",
    "distill_models/low_noise_model",
    "original",
    "transformer",
)
DIFFUSERS_FOLDERS = {"high": "transformer", "low": "transformer_2"}


@dataclass(frozen=True, slots=True, kw_only=True)
class PrebuiltFiles:
    """Files made of a model's: with LoRAs merged, or in 8 bits. `t5` is None where it is taken as it is."""

    high: Path
    low: Path
    t5: Path | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFiles:
    """Where a model's parts are. `architecture` is the DiT's config.json, None where a model has none.

    `prebuilt` are read in place of the experts and the text encoder where they are there.
    """

    high: Path
    low: Path
    t5: Path
    tokenizer: Path
    vae: Path
    architecture: dict[str, Any] | None
    prebuilt: PrebuiltFiles | None = None


def locate(config: EngineConfig) -> ModelFiles:
    """The files that `config` means, all of them there; else one CheckpointError that names all that are not."""
    search = _Search(config)
    high, low = search.expert("high"), search.expert("low")
    t5, tokenizer, vae = search.text_encoder(), search.tokenizer(), search.vae()
    if search.missing or not (high and low and t5 and tokenizer and vae):
        raise CheckpointError(
            "The model is not complete.\n"
            + "\n".join(f"- {line}" for line in search.missing)
            + "\nSet model_path to a folder in the Wan2.2 layout (such as Wan-AI/Wan2.2-T2V-A14B, downloaded), "
            "or name these files in the configuration."
        )
    architecture = _architecture(search.model, high, low)
    return ModelFiles(high=high, low=low, t5=t5, tokenizer=tokenizer, vae=vae, architecture=architecture)


class _Search:
    """One look through the disk. `missing` gathers a line for every part that was not found."""

    def __init__(self, config: EngineConfig) -> None:
        self.config = config
        self.missing: list[str] = []
        self.model = self._resolve(config.model_path, beside_model=False)
        if self.model is not None and not self.model.is_dir():
            self.model = None

    def expert(self, which: str) -> Path | None:
        """Quantised if asked for, else the named original, else the folder of the official layout."""
        config = self.config
        quantized: str | None = getattr(config, f"{which}_noise_quantized_ckpt") if config.dit_quantized else None
        named = quantized or getattr(config, f"{which}_noise_original_ckpt")
        if named:
            key = f"{which}_noise_{'quantized' if quantized else 'original'}_ckpt"
            return self._named(f"{which}-noise expert", key, named)
        folders = (f"{which}_noise_model", DIFFUSERS_FOLDERS[which])
        return self._in_model(f"{which}-noise expert", folders, Path.is_dir)

    def text_encoder(self) -> Path | None:
        config = self.config
        named = (config.t5_quantized_ckpt if config.t5_quantized else None) or config.t5_original_ckpt
        if named:
            key = "t5_quantized_ckpt" if config.t5_quantized and config.t5_quantized_ckpt else "t5_original_ckpt"
            return self._named("text encoder", key, named)
        places = [*_below(SHARED_FOLDERS, T5_NAME.format("bf16")), "text_encoder"]
        if config.t5_quantized:
            kind = (config.t5_quant_scheme or "fp8").partition("-")[0]
            quantized = [*_below(SHARED_FOLDERS, T5_NAME.format(kind))]
            places = [*quantized, *places] if config.build else quantized  # what is built may be built from bf16
        return self._in_model("text encoder", places, Path.exists)

    def tokenizer(self) -> Path | None:
        if self.config.t5_tokenizer_path:
            return self._named("tokenizer", "t5_tokenizer_path", self.config.t5_tokenizer_path)
        return self._in_model("tokenizer", ("google/umt5-xxl", "tokenizer"), Path.is_dir)

    def vae(self) -> Path | None:
        if self.config.vae_path:
            return self._named("VAE", "vae_path", self.config.vae_path, inside=VAE_NAME)
        return self._in_model("VAE", [*_below(SHARED_FOLDERS, VAE_NAME)], Path.is_file)

    def _named(self, part: str, key: str, value: str, *, inside: str = "") -> Path | None:
        """A path that the configuration names. `inside` is the file to take where it names a folder."""
        path = self._resolve(value)
        if path is not None and inside and path.is_dir():
            path = path / inside if (path / inside).exists() else None
        if path is None:
            places = ", ".join(short_path(place) for place in self._places(value)) or "nowhere"
            self.missing.append(f"{part}: {key} is {short_path(value, 3)}; looked for {places}.")
        return path

    def _in_model(self, part: str, places: Iterable[str], exists: Any) -> Path | None:
        """The first of these places below the model folder."""
        places = list(places)
        if self.model is None:
            self.missing.append(f"{part}: there is no folder {short_path(self.config.model_path, 3)} (model_path).")
            return None
        for place in places:
            if exists(self.model / place):
                return self.model / place
        self.missing.append(f"{part}: looked in {short_path(self.model)} for {', '.join(places)}.")
        return None

    def _resolve(self, value: str | None, *, beside_model: bool = True) -> Path | None:
        places = self._places(value, beside_model=beside_model) if value else []
        return next((place for place in places if place.exists()), None)

    def _places(self, value: str, *, beside_model: bool = True) -> list[Path]:
        """Where a path of the configuration may be, in the order in which it is looked for."""
        path = Path(value).expanduser()
        if path.is_absolute():
            return [path]
        roots = [Path.cwd(), PROJECT]  # the demo's presets say `assets/demo/…` wherever the program is started from
        if self.config.models_dir:
            roots.insert(0, Path(self.config.models_dir).expanduser())
        if beside_model and self.model is not None:
            roots += [self.model, self.model.parent, self.model.parent.parent]
        cached = find_cached(value)
        return [root / path for root in dict.fromkeys(roots)] + ([cached] if cached else [])


def _below(folders: Iterable[str], name: str) -> Iterable[str]:
    return (f"{folder}/{name}" if folder else name for folder in folders)


def _architecture(model: Path | None, high: Path, low: Path) -> dict[str, Any] | None:
    """The first config.json that describes a DiT: beside the experts, then where LightX2V looks."""
    folders = [path for path in (low, high) if path.is_dir()]
    if model is not None:
        folders += [model / folder for folder in ARCHITECTURE_FOLDERS]
    for folder in folders:
        path = folder / "config.json"
        if not path.is_file():
            continue
        try:
            content = json.loads(path.read_text("utf-8"))
        except (ValueError, OSError, RecursionError) as error:
            raise CheckpointError(
                f"{short_path(path)} is not valid JSON ({error!s:.100}). Download it again."
            ) from None
        if isinstance(content, dict) and ("num_layers" in content or "dim" in content):
            return content
    return None
