"""A job's progress as server-sent events.

    event: progress    {"stage": "denoise", "step": 3, "total": 40, …}
    event: state       {"status": "in_progress"}
    event: video       the whole job, once it is over; the stream ends

Ids are the numbers of the job's log, so a client that lost the line goes on where it was (Last-Event-ID).
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.responses import StreamingResponse

from ..errors import Busy
from ..jobs.store import Job, JobEvent, UnknownJob
from .responses import VIDEO_STATUS, Step, Video
from .service import Service

POLL_SECONDS = 0.25
"""EventStreams look instead of waiting, so that a hundred of them hold no threads."""
ALIVE_SECONDS = 15.0
MAX_STREAMS = 100


class EventStreams:
    """The open streams of one server; more than MAX_STREAMS are refused."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._open = 0

    def open(self, owner: str, job: Job, after: int) -> StreamingResponse:
        if self._open >= MAX_STREAMS:
            raise Busy(f"{MAX_STREAMS} clients are watching already. Ask GET /v1/videos/{job.id} instead.")
        headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        return StreamingResponse(self._lines(owner, job.id, after), media_type="text/event-stream", headers=headers)

    async def _lines(self, owner: str, id: str, after: int) -> AsyncIterator[str]:
        self._open += 1
        silent = 0.0
        try:
            while True:
                job, events = await run_in_threadpool(self._look, owner, id, after)
                for event in events:
                    after = event.id
                    yield _message(event.kind, _content(event), after)
                if job is None or job.over:
                    if job is not None:
                        yield _message("video", Video.from_job(job, self._service.file_names).model_dump())
                    return
                silent = 0.0 if events else silent + POLL_SECONDS
                if silent >= ALIVE_SECONDS:
                    silent = 0.0
                    yield ": still here\n\n"
                await asyncio.sleep(POLL_SECONDS)
        finally:
            self._open -= 1

    def _look(self, owner: str, id: str, after: int) -> tuple[Job | None, list[JobEvent]]:
        """The job and then its events: what came before the end is never missed. Nothing once it was deleted."""
        try:
            job = self._service.job(owner, id)
            return job, self._service.jobs.events(id, after)
        except (UnknownJob, Busy):
            return None, []


def _content(event: JobEvent) -> dict[str, Any]:
    if event.kind == "state":
        return {"status": VIDEO_STATUS[event.data["state"]], "error": event.data.get("error")}
    return Step(**{name: event.data[name] for name in Step.model_fields}).model_dump()


def _message(kind: str, content: dict[str, Any], id: int | None = None) -> str:
    number = "" if id is None else f"id: {id}\n"
    return f"{number}event: {kind}\ndata: {json.dumps(content, ensure_ascii=False)}\n\n"
