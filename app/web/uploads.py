"""UploadLimit: how many bytes of a visitor's uploads stay on the disk.

A job has copies of its pictures, so an upload is needed only until its run is queued. The oldest ones of a visitor go
when new ones exceed the bound, and those of everybody when all together do. gradio removes
files that are unused for an hour (`delete_cache` of the page); the page touches those that it shows.
"""

import json
import logging
import re
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable
from pathlib import Path

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .forged_events import respond

log = logging.getLogger("lightx2v.page")

EVERYBODY = 10
"""All visitors together may keep ten times the bytes of one."""
_FOLDER, _PART = re.compile(r"[0-9a-f]{64}"), re.compile(r"tmp\w{8}")
"""How gradio names the folder of an uploaded file, and a file that is being uploaded."""


class Uploads:
    """The uploaded files by their visitors, the oldest first. `each` is the bytes that one visitor may keep."""

    def __init__(self, each: int) -> None:
        self._each, self._files = each, OrderedDict[Path, tuple[str, int]]()
        self._coming: dict[str, int] = {}
        self._lock = threading.Lock()

    def begin(self, visitor: str, size: int) -> bool:
        """Reserve room for an upload of `size` bytes; False while the visitor, or all, are uploading too much."""
        with self._lock:
            own, all_ = self._coming.get(visitor, 0), sum(self._coming.values())
            if own and own + size > self._each or all_ + size > EVERYBODY * self._each:
                return False
            self._coming[visitor] = own + size
        return True

    def end(self, visitor: str, size: int) -> None:
        """Give the reserved room back."""
        with self._lock:
            self._coming[visitor] -= size
            if not self._coming[visitor]:
                del self._coming[visitor]

    def keep(self, visitor: str, paths: Iterable[Path]) -> None:
        """Count these new files as the visitor's, and remove the oldest ones beyond the bounds."""
        with self._lock:
            for path in [path for path in self._files if not path.is_file()]:  # gradio has removed it
                del self._files[path]
            new = [path for path in paths if path.is_file()]
            for path in new:
                self._files.pop(path, None)
                self._files[path] = visitor, path.stat().st_size
            self._remove_beyond(self._each, [path for path, (owner, _) in self._files.items() if owner == visitor], new)
            self._remove_beyond(EVERYBODY * self._each, list(self._files), new)

    def _remove_beyond(self, limit: int, files: list[Path], new: list[Path]) -> None:
        total = sum(self._files[path][1] for path in files)
        for path in files:
            if total <= limit or path in new:
                break
            total -= self._files.pop(path)[1]
            _remove(path)


def remove_leftovers(folder: Path) -> None:
    """Remove the uploads of a process that was killed. Call this before the page is served."""
    for found in folder.iterdir() if folder.is_dir() else ():
        if _PART.fullmatch(found.name) and found.is_file():
            _remove(found)
        elif _FOLDER.fullmatch(found.name) and found.is_dir():
            for file in found.iterdir():
                _remove(file)


def _remove(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
        if _FOLDER.fullmatch(path.parent.name) and not any(path.parent.iterdir()):
            path.parent.rmdir()
    except OSError as error:
        log.warning("an upload could not be removed: %s", error.strerror)


class UploadLimit:
    """ASGI middleware around gradio's upload route. `visitor_of` names who sends a request, `largest` is the bytes of
    a request without a length."""

    def __init__(
        self, app: ASGIApp, *, uploads: Uploads, visitor_of: Callable[[Scope, Headers], str], largest: int
    ) -> None:
        self._app, self._uploads, self._visitor_of, self._largest = app, uploads, visitor_of, largest

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST" or scope["path"].rstrip("/") != "/gradio_api/upload":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        visitor = self._visitor_of(scope, headers)
        length = headers.get("content-length", "")
        size = min(int(length), self._largest) if length.isdecimal() and len(length) < 16 else self._largest
        if not self._uploads.begin(visitor, size):
            message = "Too much is being uploaded at once. Wait until the other uploads have ended, and send it again."
            await respond(429, "Busy", message, {"Retry-After": "10"})(scope, receive, send)
            return
        status, body = 0, b""

        async def send_and_note(message: Message) -> None:
            nonlocal status, body
            status = message.get("status", status)
            body += message.get("body", b"")
            await send(message)

        try:
            await self._app(scope, receive, send_and_note)
        finally:
            self._uploads.end(visitor, size)
        if status == 200:
            self._uploads.keep(visitor, map(Path, json.loads(body)))
