"""Submitter: reads the bodies of either API into queued jobs, within bounds on memory and threads."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

from anyio import CapacityLimiter
from anyio.to_thread import run_sync
from starlette.requests import Request as HttpRequest

from ..jobs.store import Job
from .auth import owner_of
from .foreign_fields import ignored
from .limits import MAX_BODY
from .request_bodies import RemixBody, TaskBody, VideoBody, read_body
from .service import Service

THREADS = 16
"""Submissions in work at one time, each for up to ten seconds while the server fetches its images."""

LARGE_BODIES = 4 * MAX_BODY
"""Bytes of large bodies in memory at one time, as received; parsed, they take a few times that. Others wait unread."""
SMALL = 1_000_000
"""Bytes of a body that never waits; a body without an image is smaller than this."""
POLL_SECONDS = 0.05


class Submitter:
    """One for a whole server, because its bounds hold for all requests together."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._threads = CapacityLimiter(THREADS)
        self._free_bytes = LARGE_BODIES

    async def submit(self, request: HttpRequest, kind: type[VideoBody] | type[TaskBody]) -> tuple[Job, Sequence[str]]:
        """Queue the job that the body describes. Returns it with warnings about the body."""
        owner = owner_of(request)
        async with self._memory_for(request):
            body, files = await read_body(request, kind)
            job = await run_sync(lambda: self._service.submit(owner, body.video_request(files)), limiter=self._threads)
            return job, ignored(body)

    async def remix(self, request: HttpRequest, id: str) -> Job:
        """Queue a job with the settings of the job `id` and the prompt in the body."""
        owner = owner_of(request)
        body, _ = await read_body(request, RemixBody)
        return await run_sync(lambda: self._service.remix(owner, id, body.prompt), limiter=self._threads)

    @asynccontextmanager
    async def _memory_for(self, request: HttpRequest) -> AsyncIterator[None]:
        """Wait until there is memory for a large body: for its Content-Length, or for MAX_BODY without one."""
        length = request.headers.get("content-length", "")
        size = min(int(length), MAX_BODY) if length.isdecimal() and len(length) < 16 else MAX_BODY
        size = size if size > SMALL else 0
        while self._free_bytes < size:  # polling, so that a client that disconnects meanwhile reserves nothing
            await asyncio.sleep(POLL_SECONDS)
        self._free_bytes -= size
        try:
            yield
        finally:
            self._free_bytes += size
