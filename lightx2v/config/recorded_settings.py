"""What a video says about how it was made: enough to make it again; of pictures their names, and not their places."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .engine_config import EngineConfig
from .request import Request

PICTURES = ("image_path", "last_frame_path")


def recorded_settings(preset: str, config: EngineConfig, request: Request, video: str | Path | None) -> dict[str, Any]:
    """What goes into the file `video`. A picture is named as it was given, if that was relative, or by its place below
    the video's folder or the working one; any other by its bare name. Its content's hash tells it from a namesake."""
    asked = request.to_json()
    pictures = {name: asked[name] for name in PICTURES if asked[name]}
    asked |= {name: _portable(Path(path), video) for name, path in pictures.items()}
    hashes = {name: _content_hash(Path(path)) for name, path in pictures.items()}
    return {"preset": preset, "engine": _homeless(config.to_json()), "request": _homeless(asked), "pictures": hashes}


def find_picture(settings: Mapping[str, Any], name: str, video: str | Path) -> Path | None:
    """The picture `name` (of PICTURES) of a video's settings, in the working folder or beside the video; None where
    it is not there, or another one of that name is."""
    hashes = settings.get("pictures")
    known = hashes.get(name) if isinstance(hashes, Mapping) else None
    path = Path(os.path.expanduser(str(settings["request"][name])))
    places = (place for place in (path, Path(video).parent / path) if os.path.isfile(place))
    return next((place for place in places if known is None or known == _content_hash(place)), None)


def _portable(path: Path, video: str | Path | None) -> str:
    whole = Path(os.path.expanduser(path))
    if not whole.is_absolute():
        return str(path)
    whole = whole.parent.resolve() / whole.name  # a link is named as it is, not as what it leads to
    folders = [Path(video).parent.resolve()] if video else []
    folder = next((each for each in (*folders, Path.cwd()) if whole.is_relative_to(each)), whole.parent)
    return str(whole.relative_to(folder))


def _content_hash(path: Path) -> str | None:
    try:
        with open(os.path.expanduser(path), "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()[:16]
    except OSError:
        return None


def _homeless(value: Any) -> Any:
    """JSON with every path below the user's home folder written as ~/…, which all readers of paths here expand."""
    if isinstance(value, dict):
        return {key: _homeless(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_homeless(item) for item in value]
    home = str(Path.home()).rstrip(os.sep) + os.sep
    return f"~/{value.removeprefix(home)}" if isinstance(value, str) and value.startswith(home) else value
