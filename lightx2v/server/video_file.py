"""A finished video as an answer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from starlette.responses import FileResponse

from .openapi import error_responses

_HEADERS = {"X-Content-Type-Options": "nosniff", "Cache-Control": "private"}
_ANSWER = {
    "content": {"video/mp4": {"schema": {"type": "string", "format": "binary"}}},
    "description": "The video, or the part that was asked for.",
}
VIDEO: dict[str, Any] = {
    "response_class": FileResponse,
    "responses": {
        200: _ANSWER,
        206: _ANSWER,
        416: {"description": "There is no such range."},
        **error_responses(404, 422),
    },
}
"""What a route that gives a video says of itself."""


def video_file(path: Path, name: str) -> FileResponse:
    """The video as a download of this name. Ranges are served."""
    return FileResponse(path, media_type="video/mp4", filename=name, headers=_HEADERS)
