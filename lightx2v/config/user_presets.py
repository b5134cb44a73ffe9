"""The presets that a user saved: JSON files in the user's folder, which every front end finds by name."""

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import ConfigError, OutputError, quoted, short_path
from .environment import Environment

NAME = re.compile(r"[^\W_][\w.+-]{0,119}")
MAX_BYTES = 240
"""File systems take names of 255 bytes with the ending."""


def user_presets() -> dict[str, Path]:
    """{name: file} of all saved presets."""
    return {path.stem: path for path in sorted(_folder().glob("*.json")) if NAME.fullmatch(path.stem)}


def user_preset(name: str) -> Path | None:
    """The file of the saved preset with this name."""
    path = _folder() / f"{name}.json"
    return path if NAME.fullmatch(name) and os.path.isfile(path) else None


def check_name(name: str, taken: Mapping[str, Any] | set[str]) -> str:
    """`name` without blanks around it, if a preset may be saved under it. `taken` are the names of other presets."""
    name = name.strip()
    if not NAME.fullmatch(name) or len(name.encode()) > MAX_BYTES:
        raise ConfigError(
            f"{quoted(name)} cannot be a preset's name. Use letters, digits and . _ + - without spaces, at most 120 "
            "(80 Chinese ones)."
        )
    if name in taken or user_preset(name) is not None:
        raise ConfigError(f"There is a preset {quoted(name)} already, which stays as it is. Choose another name.")
    return name


def save_preset(name: str, content: Mapping[str, Any], taken: set[str]) -> Path:
    """Save the content of a preset under a new name. ConfigError for a name that is taken or impossible, OutputError
    where the file cannot be written."""
    path = _folder() / f"{check_name(name, taken)}.json"
    text = json.dumps(content, ensure_ascii=False, indent=4) + "\n"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        raise ConfigError(f"There is a preset {quoted(path.stem)} already. Choose another name.") from None
    except OSError as error:
        raise OutputError(f"{short_path(path)} cannot be written: {error.strerror}. Check its folder.") from None
    return path


def _folder() -> Path:
    return Environment.read().user_folder / "presets"
