"""From a request of either family to a queued job."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from anyio import CapacityLimiter
from anyio.to_thread import run_sync
from starlette.requests import Request as HttpRequest

from ..jobs.store import Job
from .auth import owner_of
from .limits import MAX_BODY
from .request_bodies import TaskBody, VideoBody, read_body
from .service import Service

AT_ONCE = 16
"""Submitter that are worked on at one time, each for up to ten seconds while its pictures are fetched."""

BODIES = 4 * MAX_BODY
"""Bytes of large bodies in memory at one time, as they came; read, they are a few times that. Others wait unread."""
SMALL = 1_000_000
"""Bytes that every connection may send; without a picture no body is larger."""
LOOK_SECONDS = 0.05


class Submitter:
    """All of one server's, so that together they are bounded."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._places = CapacityLimiter(AT_ONCE)
        self._room = BODIES

    async def job(self, request: HttpRequest, kind: type[VideoBody] | type[TaskBody]) -> Job:
        """The job that the body asks for, queued."""
        owner = owner_of(request)
        async with self._space(request):
            body, files = await read_body(request, kind)
            return await run_sync(lambda: self._service.submit(owner, body.video_request(files)), limiter=self._places)

    @asynccontextmanager
    async def _space(self, request: HttpRequest) -> AsyncIterator[None]:
        """Waits until there is memory for a large body: what it says it takes, or the most where it says nothing."""
        length = request.headers.get("content-length", "")
        size = min(int(length), MAX_BODY) if length.isdecimal() and len(length) < 16 else MAX_BODY
        size = size if size > SMALL else 0
        while self._room < size:  # looking, so that a client that leaves meanwhile can keep nothing
            await asyncio.sleep(LOOK_SECONDS)
        self._room -= size
        try:
            yield
        finally:
            self._room += size
