"""The folders that hold models: those that were told, and those of other programs where they usually are."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path

from ..config.environment import Environment
from ..config.folders import expand, working_folder
from ..errors import ConfigError, OutputError, quoted, short_path
from ..hub.cache import standard_cache
from .comfy_paths import extra_folders

USUAL = ("ComfyUI/models", "Wan2GP/ckpts", "Wan2GP/loras")
"""Folders of ComfyUI and Wan2GP, below the home folder, the working folder or the folder beside it."""
MAX_FOLDERS = 50


def model_folders(told: Iterable[str | Path] = (), environment: Environment | None = None) -> list[Path]:
    """Every folder to scan, each once: those in `told`, in LIGHTX2V_MODEL_DIRS, in the user's settings, the usual ones
    that exist, and what an extra_model_paths.yaml beside them names. ConfigError if one that was told is no folder."""
    environment = environment or Environment.read()
    named = [Path(os.path.expanduser(folder)) for folder in (*told, *environment.model_dirs)]
    for folder in named:
        check_folder(folder)
    folders = [*named, *told_folders()]
    if environment.models_dir:
        folders.append(expand(environment.models_dir))
    resolved = [folder.resolve() for folder in [*folders, *usual_folders()] if os.path.isdir(folder)]
    resolved += [extra.resolve() for folder in dict.fromkeys(resolved) for extra in extra_folders(folder)]
    # A folder inside another one is scanned with it.
    return [
        each
        for each in dict.fromkeys(resolved)
        if not any(each.is_relative_to(other) for other in resolved if other != each)
    ]


def usual_folders() -> list[Path]:
    """Where ComfyUI, Wan2GP and huggingface_hub keep models, as far as these folders exist."""
    home = Path(os.path.expanduser("~"))
    here = working_folder()
    around = dict.fromkeys([home, home / "Documents", here, here.parent])
    places = [*(place / name for place in around for name in USUAL), standard_cache()]
    return [place for place in places if os.path.isdir(place)]


def check_folder(folder: Path) -> Path:
    """`folder` if it is one. ConfigError otherwise."""
    if "\0" in str(folder) or not os.path.isdir(folder):
        raise ConfigError(f"There is no folder {short_path(folder)}. Give a folder that holds model files.")
    return folder


def told_folders() -> list[Path]:
    """The folders that the user told once and for all."""
    try:
        content = json.loads(_file().read_text("utf-8"))
    except FileNotFoundError:
        return []
    except (OSError, ValueError, RecursionError):
        raise ConfigError(f"{short_path(_file())} cannot be read as JSON. Correct it, or delete it.") from None
    if not isinstance(content, list) or not all(isinstance(item, str) for item in content):
        raise ConfigError(f"{short_path(_file())} holds {quoted(content)}; expected a list of folders.")
    return [Path(item) for item in content[:MAX_FOLDERS]]


def tell_folder(folder: str | Path) -> None:
    """Remember a folder. ConfigError if it is none, OutputError if that cannot be stored."""
    known, path = told_folders(), check_folder(Path(os.path.expanduser(folder))).absolute()
    if path not in known:
        _store([*known, path])


def forget_folder(folder: str | Path) -> None:
    """Forget a folder that was told. The files in it stay."""
    path = Path(os.path.expanduser(folder)).absolute()
    known = told_folders()
    if path not in known:
        names = ", ".join(short_path(each) for each in known) or "none"
        raise ConfigError(f"{short_path(path)} is none of the folders that were told: {names}.")
    _store([each for each in known if each != path])


def _store(folders: list[Path]) -> None:
    if len(folders) > MAX_FOLDERS:
        raise ConfigError(f"At most {MAX_FOLDERS} folders can be told. Tell a folder above them instead.")
    file = _file()
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        new = file.with_name(f"{file.name}.{os.getpid()}.new")
        new.write_text(json.dumps([str(folder) for folder in folders], indent=1), "utf-8")
        os.replace(new, file)
    except OSError as error:
        raise OutputError(f"{short_path(file)} cannot be written: {error.strerror}. Check its folder.") from None


def _file() -> Path:
    return Environment.read().user_folder / "model_dirs.json"
