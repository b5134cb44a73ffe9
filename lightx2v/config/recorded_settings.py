"""The settings that a video file carries, from which it can be made again. It names pictures, not their folders."""

import hashlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .engine_config import EngineConfig
from .folders import expand, working_folder
from .request import Request

PICTURES = ("image_path", "last_frame_path")


def recorded_settings(
    preset: str, config: EngineConfig, request: Request, video: str | Path | None, files: Sequence[Any] = ()
) -> dict[str, Any]:
    """The settings to store in the file `video`. A relative picture path stays as it is. An absolute one becomes
    relative to the folder of the video or to the working folder, or else a bare name. A hash of its content identifies
    the picture. `files` describe the model's files."""
    request_json = request.to_json()
    pictures = {name: request_json[name] for name in PICTURES if request_json[name]}
    request_json |= {name: _portable(Path(path), video) for name, path in pictures.items()}
    hashes = {name: content_hash(path) for name, path in pictures.items()}
    return {
        "preset": preset,
        "engine": _abbreviate_home(config.to_json()),
        "request": _abbreviate_home(request_json),
        "pictures": hashes,
        "files": list(files),
    }


def find_picture(settings: Mapping[str, Any], name: str, video: str | Path) -> Path | None:
    """The picture `name` (of PICTURES) of a video's settings, in the working folder or beside the video. None if it is
    in neither, or if a file of that name has other content."""
    hashes = settings.get("pictures")
    known = hashes.get(name) if isinstance(hashes, Mapping) else None
    path = expand(str(settings["request"][name]))
    places = (place for place in (path, Path(video).parent / path) if os.path.isfile(place))
    return next((place for place in places if known is None or known == content_hash(place)), None)


def _portable(path: Path, video: str | Path | None) -> str:
    whole = expand(path)
    if not whole.is_absolute():
        return str(path)
    whole = whole.parent.resolve() / whole.name  # a link keeps its own name
    folders = [Path(video).parent.resolve()] if video else []
    folder = next((each for each in (*folders, working_folder()) if whole.is_relative_to(each)), whole.parent)
    return str(whole.relative_to(folder))


def content_hash(path: str | Path) -> str | None:
    """Names the content of a picture; None if it cannot be read."""
    try:
        with open(os.path.expanduser(path), "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()[:16]
    except OSError:
        return None


def _abbreviate_home(value: Any) -> Any:
    """JSON with every path below the home folder written as ~/…, which every reader of paths here expands."""
    if isinstance(value, dict):
        return {key: _abbreviate_home(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_abbreviate_home(item) for item in value]
    home = os.path.expanduser("~").rstrip(os.sep) + os.sep
    return f"~/{value.removeprefix(home)}" if isinstance(value, str) and value.startswith(home) else value
