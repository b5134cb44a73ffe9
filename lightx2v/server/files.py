"""A finished video as an answer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from starlette.responses import FileResponse

from .documents import refusals

_HEADERS = {"X-Content-Type-Options": "nosniff", "Cache-Control": "private"}
_VIDEO: dict[str, Any] = {
    "content": {"video/mp4": {"schema": {"type": "string", "format": "binary"}}},
    "description": "The video, or the part that was asked for.",
}
FILE_ANSWERS: dict[int | str, dict[str, Any]] = {
    200: _VIDEO,
    206: _VIDEO,
    416: {"description": "There is no such range."},
    **refusals(404, 422),
}
"""`responses` of a route that gives a video."""


def video_file(path: Path, name: str) -> FileResponse:
    """The video as a download of this name. Ranges are served."""
    return FileResponse(path, media_type="video/mp4", filename=name, headers=_HEADERS)
