"""ComfyUI's extra_model_paths.yaml: the other folders in which a ComfyUI looks for models.

    comfyui:                              # a section of any name
        base_path: ~/models               # optional; relative to the file
        is_default: true                  # in ComfyUI these files come first in a list
        loras: loras/                     # a folder of a kind
        diffusion_models: |               # several of them
            diffusion_models/
            unet/

Read as ComfyUI reads it (comfyanonymous/ComfyUI, utils/extra_config.py).
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from ..errors import short_path

log = logging.getLogger("lightx2v.catalog")

NAME = "extra_model_paths.yaml"
KINDS = (
    *("checkpoints", "diffusion_models", "unet", "unet_gguf", "diffusers"),
    *("text_encoders", "clip", "clip_gguf", "vae", "loras"),
)
"""Kinds of ComfyUI, and of its nodes for GGUF, whose folders may hold something for a model here."""
MAX_BYTES = 1 << 20
MAX_FOLDERS = 200


def extra_folders(models: Path) -> list[Path]:
    """The folders that the file beside a ComfyUI's folder `models` names, as far as they exist. A warning names a file
    that cannot be read, which is left out, and what is no folder."""
    for file in (models / NAME, models.parent / NAME):
        if os.path.isfile(file):
            return list(dict.fromkeys(_read(file)))[:MAX_FOLDERS]
    return []


def _read(file: Path) -> Iterator[Path]:
    try:
        if file.stat().st_size > MAX_BYTES:
            raise ValueError(f"it has more than {MAX_BYTES} bytes")
        content = yaml.safe_load(file.read_bytes())
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        why = " ".join(str(error).split()) or type(error).__name__
        log.warning("%s cannot be read and is left out: %.200s. Correct it, or remove it.", short_path(file, 2), why)
        return
    sections = content.values() if isinstance(content, dict) else [] if content is None else [content]
    for section in sections:
        if isinstance(section, dict):
            yield from _folders(section, file)
        elif section is not None:
            log.warning("%s: %s is left out; expected folders by kind.", short_path(file, 2), _said(section))


def _folders(section: dict[Any, Any], file: Path) -> Iterator[Path]:
    base = section.get("base_path") or ""
    root = file.parent.absolute() / os.path.expandvars(os.path.expanduser(_said(base)))
    for kind in KINDS:
        value = section.get(kind)
        lines = value if isinstance(value, list) else _said(value or "").split("\n")
        for line in filter(None, map(str.strip, map(_said, lines))):
            folder = Path(os.path.normpath(root / line))
            if "\0" not in line and os.path.isdir(folder):
                yield folder
            else:
                log.warning("%s: there is no folder %s for %s.", short_path(file, 2), short_path(folder), kind)


def _said(value: Any) -> str:
    """A value as text. Of lists and mappings only what they are: with YAML's aliases a short file names huge ones."""
    return f"a {type(value).__name__}" if isinstance(value, (list, dict, set, tuple)) else str(value)
