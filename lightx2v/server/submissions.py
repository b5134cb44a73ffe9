"""From a request of either family to a queued job."""

from __future__ import annotations

from anyio import CapacityLimiter
from anyio.to_thread import run_sync
from starlette.requests import Request as HttpRequest

from ..jobs import Job
from .bodies import TaskBody, VideoBody, read_body
from .keys import owner_of
from .service import Service

AT_ONCE = 16
"""Submissions that are worked on at one time, each for up to ten seconds while its pictures are fetched."""


class Submissions:
    """All of one server's, so that together they are bounded."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._places = CapacityLimiter(AT_ONCE)

    async def job(self, request: HttpRequest, kind: type[VideoBody] | type[TaskBody]) -> Job:
        """The job that the body asks for, queued."""
        body, files = await read_body(request, kind)
        owner = owner_of(request)
        return await run_sync(lambda: self._service.submit(owner, body.wish(files)), limiter=self._places)
