"""A finished video as a response."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from starlette.responses import FileResponse

from .openapi import error_responses

_HEADERS = {"X-Content-Type-Options": "nosniff", "Cache-Control": "private"}
_RESPONSE = {
    "content": {"video/mp4": {"schema": {"type": "string", "format": "binary"}}},
    "description": "The video, or the requested range.",
}
VIDEO: dict[str, Any] = {
    "response_class": FileResponse,
    "responses": {
        200: _RESPONSE,
        206: _RESPONSE,
        416: {"description": "Invalid range."},
        **error_responses(404, 422),
    },
}
"""Arguments of a route that returns a video."""


def video_file(path: Path, name: str) -> FileResponse:
    """The video as a download with this name. Range requests work."""
    return FileResponse(path, media_type="video/mp4", filename=name, headers=_HEADERS)
