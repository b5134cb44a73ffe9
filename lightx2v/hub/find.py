"""Find the files of a configuration on this machine: local paths first, then the Hub's cache."""

import os
from collections.abc import Sequence
from pathlib import Path

from ..config.engine_config import EngineConfig, hub_name
from ..config.folders import expand
from ..config.model_paths import ModelPart, parts, search_roots
from ..errors import LoraError, short_path
from .cache import CachedRepo, standard_cache


def find(path: str, config: EngineConfig) -> Path | None:
    """The file or folder of a path in the configuration: a local one, or one in the shared cache."""
    return next((place for place in local_places(path, config) if os.path.exists(place)), None) or find_cached(path)


def find_part(part: ModelPart, config: EngineConfig) -> Path | None:
    """The file or folder of one part of the model."""
    if part.path:
        place = find(part.path, config)
        if place is not None and part.file and place.is_dir() and not any(place.glob("*.safetensors")):
            place /= part.file
        return place if place is not None and place.exists() else None
    model = local_model_folder(config)
    if model is None:
        names = (f"{config.model_path}/{candidate}" for candidate in part.candidates)
        return next(filter(None, map(find_cached, names)), None)
    for candidate in part.candidates:
        place = model / candidate
        if place.is_dir() if candidate.endswith("/") else place.is_file():
            return place
    return None


def find_all(config: EngineConfig, also: Sequence[str] = ()) -> dict[str, Path | None]:
    """{name: its place, or None} of all files and folders that loading needs, the model's parts and the LoRAs, and of
    the paths `also`."""
    places = {part.name: find_part(part, config) for part in parts(config)}
    return places | {path: find(path, config) for path in (*(lora.path for lora in config.lora_configs), *also)}


def find_cached(name: str) -> Path | None:
    """A file, a folder with all its shards, or a repository in the shared cache, by its name on the Hub."""
    hub = hub_name(name)
    return CachedRepo(standard_cache(), hub[0]).find(hub[1]) if hub else None


def find_lora(path: str, config: EngineConfig) -> Path:
    """The file of a LoRA. LoraError if it is in none of the places where a path of the configuration may be."""
    place = find(path, config)
    if place is not None:
        return place
    hub, looked = hub_name(path), dict.fromkeys(short_path(place, 3) for place in local_places(path, config))
    raise LoraError(
        f"There is no LoRA {short_path(path, 3)}. Looked for {', '.join(looked)}. "
        + (f"Download it with: hf download {hub[0]} {hub[1]}" if hub and hub[1] else "Check the path.")
    )


def model_folder(config: EngineConfig) -> Path | None:
    """The folder of the model on this machine: a local one, or the repository's in the shared cache."""
    return local_model_folder(config) or find_cached(config.model_path)


def local_model_folder(config: EngineConfig) -> Path | None:
    path = expand(config.model_path)
    return next((root / path for root in search_roots(config) if (root / path).is_dir()), None)


def local_places(path: str, config: EngineConfig) -> list[Path]:
    """Where a path of the configuration may be, in order: below a search root, or in or beside the model."""
    relative = expand(path)
    if relative.is_absolute():
        return [relative]
    model = model_folder(config)
    around = [model, model.parent, model.parent.parent] if model else []
    return [root / relative for root in dict.fromkeys([*search_roots(config), *around])]
