"""Find the files of a configuration on this machine: local paths first, then the Hub's cache."""

from __future__ import annotations

import os
from pathlib import Path

from ..config.engine_config import EngineConfig, hub_name
from ..config.model_paths import search_roots
from ..errors import LoraError, short_path
from .cache import CachedRepo, standard_cache


def find(name: str, config: EngineConfig) -> Path | None:
    """The file or folder that a path of the configuration means: a local one, or one in the shared cache."""
    roots = [Path(name).expanduser()] if Path(name).expanduser().is_absolute() else local_candidates(name, config)
    local = next((path for path in roots if path.exists()), None)
    return local or find_cached(name)


def find_cached(name: str) -> Path | None:
    """A file, a folder with all its parts, or a repository of the shared cache, by its name on the Hub."""
    hub = hub_name(name)
    return CachedRepo(standard_cache(), hub[0]).find(hub[1]) if hub else None


def find_lora(path: str, config: EngineConfig) -> Path:
    """The file of a LoRA: absolute, below one of the places where the configuration's files are looked for, or in the
    shared cache. LoraError where it is nowhere."""
    given, model = (Path(os.path.expanduser(name)) for name in (path, config.model_path))
    roots = [*search_roots(config), model, model.parent]
    places = [given] if given.is_absolute() else [root / given for root in dict.fromkeys(roots)]
    found = next((place for place in places if os.path.exists(place)), None) or find_cached(path)
    if found is not None:
        return found
    hub, looked = hub_name(path), dict.fromkeys(short_path(place, 3) for place in places)
    raise LoraError(
        f"There is no LoRA {short_path(path, 3)}. Looked for {', '.join(looked)}. "
        + (f"Download it with: hf download {hub[0]} {hub[1]}" if hub and hub[1] else "Check the path.")
    )


def local_candidates(name: str, config: EngineConfig) -> list[Path]:
    return [root / Path(name).expanduser() for root in search_roots(config)]
