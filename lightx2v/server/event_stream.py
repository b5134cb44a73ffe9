"""EventStreams: the progress of jobs as server-sent events.

    event: progress    {"stage": "denoise", "step": 3, "total": 40, …}
    event: state       {"status": "in_progress"}; after a restart {"status": "queued", "note": "The program ended …"}
    event: video       the whole job, once it is over; the stream ends

Event ids increase within a job, so a client that lost its connection continues with Last-Event-ID.
"""

import asyncio
import contextlib
import json
import threading
from collections.abc import AsyncIterator
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from ..errors import Busy
from ..jobs.store import Job, JobEvent, UnknownJob
from .responses import VIDEO_STATUS, Step, Video
from .service import Service

PAUSE_SECONDS = 0.1
"""Least time between two reads of a stream: events that come faster arrive together."""
ALIVE_SECONDS = 15.0
"""Without an event for so long a comment is sent, so that proxies keep the connection."""
MAX_STREAMS = 100


class EventStreams:
    """The open streams of one server, at most MAX_STREAMS. A waiting stream holds no thread."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._places = threading.Semaphore(MAX_STREAMS)

    def open(self, owner: str, job: Job, after: int) -> StreamingResponse:
        """The job's events after the one with the id `after`, until the job is over."""
        if not self._places.acquire(blocking=False):  # here and not in the stream, which begins later
            raise Busy(f"{MAX_STREAMS} event streams are already open. Poll GET /v1/videos/{job.id} instead.")
        return _CountedStream(self._lines(owner, job.id, after), self._places)

    async def _lines(self, owner: str, id: str, after: int) -> AsyncIterator[str]:
        loop, changed = asyncio.get_running_loop(), asyncio.Event()

        def wake() -> None:
            with contextlib.suppress(RuntimeError):  # the loop was closed before the stream
                loop.call_soon_threadsafe(changed.set)

        with self._service.jobs.listening(wake):
            while True:
                changed.clear()
                job, events = await run_in_threadpool(self._read, owner, id, after)
                for event in events:
                    after = event.id
                    yield _message(event.kind, _content(event), after)
                if job is None or job.over:
                    if job is not None:
                        yield _message("video", Video.from_job(job, self._service.file_names).model_dump())
                    return
                await asyncio.sleep(PAUSE_SECONDS)
                try:
                    async with asyncio.timeout(ALIVE_SECONDS):
                        await changed.wait()
                except TimeoutError:
                    yield ": still running\n\n"

    def _read(self, owner: str, id: str, after: int) -> tuple[Job | None, list[JobEvent]]:
        """The job, then its events, so that those before its end are never missed. None once it is deleted."""
        try:
            job = self._service.job(owner, id)
            return job, self._service.jobs.events(id, after)
        except (UnknownJob, Busy):
            return None, []


class _CountedStream(StreamingResponse):
    """A stream that gives its place back however it ends, even before its first line."""

    def __init__(self, lines: AsyncIterator[str], places: threading.Semaphore) -> None:
        headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        super().__init__(lines, media_type="text/event-stream", headers=headers)
        self._places = places

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._places.release()


def _content(event: JobEvent) -> dict[str, Any]:
    if event.kind == "state":
        optional = {name: event.data[name] for name in ("note",) if name in event.data}
        return {"status": VIDEO_STATUS[event.data["state"]], "error": event.data.get("error"), **optional}
    return Step.model_validate(event.data).model_dump()


def _message(kind: str, content: dict[str, Any], id: int | None = None) -> str:
    number = "" if id is None else f"id: {id}\n"
    return f"{number}event: {kind}\ndata: {json.dumps(content, ensure_ascii=False)}\n\n"
