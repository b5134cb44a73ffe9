"""ModelFiles: the files of an EngineConfig's model: both experts, text encoder, tokenizer, VAE, architecture.

A folder in the official layout needs only its name; a configuration may also name each part. `config.model_paths.parts`
lists where each part may be, `hub.find_part` looks there and in the shared cache. Nothing is downloaded here.
"""

from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from ..config.architecture import read_config
from ..config.engine_config import EngineConfig
from ..config.model_paths import ARCHITECTURE_FOLDERS, ModelPart, parts
from ..errors import CheckpointError, short_path
from ..hub import find_part, local_places, model_folder


@dataclass(frozen=True, slots=True, kw_only=True)
class PrebuiltFiles:
    """A model's files from the prebuilt cache: LoRAs merged, or in 8 bits. `t5` is None where it is used as it is."""

    high: Path
    low: Path
    t5: Path | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFiles:
    """Where a model's parts are. `architecture` is the content of the DiT's config.json, None where a model has none.

    The engine reads `prebuilt`, where there are any, instead of the experts and the text encoder.
    """

    high: Path
    low: Path
    t5: Path
    tokenizer: Path
    vae: Path
    architecture: dict[str, Any] | None
    prebuilt: PrebuiltFiles | None = None


def locate(config: EngineConfig) -> ModelFiles:
    """The files of `config`. One CheckpointError names all that are missing, and where it looked for them."""
    places: dict[str, Path] = {}
    missing = []
    for part in parts(config):
        place = find_part(part, config)
        if place is not None:
            places[part.title] = place
        elif part.title != "architecture":  # a model may have none
            missing.append(_absence(part, config))
    if missing:
        raise CheckpointError(
            "The model is not complete.\n"
            + "\n".join(f"- {line}" for line in missing)
            + "\nSet model_path to a folder in the Wan2.2 layout (such as Wan-AI/Wan2.2-T2V-A14B, downloaded), "
            "or name these files in the configuration."
        )
    high, low = places["high-noise expert"], places["low-noise expert"]
    return ModelFiles(
        high=high,
        low=low,
        t5=places["text encoder"],
        tokenizer=places["tokenizer"],
        vae=places["VAE"],
        architecture=_architecture(model_folder(config), high, low),
    )


def _absence(part: ModelPart, config: EngineConfig) -> str:
    if part.path:
        places = ", ".join(short_path(place) for place in local_places(part.path, config))
        return f"{part.title}: {part.key} is {short_path(part.path, 3)}; looked for {places}."
    model = model_folder(config)
    if model is None:
        return f"{part.title}: there is no folder {short_path(config.model_path, 3)} (model_path)."
    places = ", ".join(place.rstrip("/") for place in part.candidates)
    return f"{part.title}: looked in {short_path(model)} for {places}."


def _architecture(model: Path | None, high: Path, low: Path) -> dict[str, Any] | None:
    """The first config.json that describes a DiT: beside the experts, then where LightX2V looks.

    One beside an expert that cannot be read is an error, even if another would do: its weights may be damaged, too.
    """
    beside = [read_config(path) for path in _configs([low, high])]
    elsewhere = (
        read_config(path) for path in _configs([model / folder for folder in ARCHITECTURE_FOLDERS] if model else [])
    )
    found = (content for content in chain(beside, elsewhere) if "num_layers" in content or "dim" in content)
    return next(found, None)


def _configs(folders: list[Path]) -> list[Path]:
    return [path for folder in folders if (path := folder / "config.json").is_file()]
