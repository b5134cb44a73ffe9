"""/v1/videos: the routes that OpenAI's API has, and vLLM-Omni, SGLang and FastVideo after it; and progress events.

A job goes on when its client leaves; DELETE stops it.
"""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Header, Path, Query, Request
from starlette.responses import FileResponse, StreamingResponse

from ..jobs.store import UnknownJob
from .auth import owner_of
from .event_stream import EventStreams
from .openapi import SUBMISSION, error_responses, request_body
from .request_bodies import VideoBody
from .responses import Deleted, Model, ModelList, Video, VideoList, deleted, video
from .service import HISTORY, Service
from .submit import Submitter
from .video_file import VIDEO, video_file

Id = Annotated[str, Path(min_length=1, max_length=200, description="The job's id, or the client_id it was sent with.")]


def video_routes(service: Service, submissions: Submitter) -> APIRouter:
    router = APIRouter(prefix="/v1", tags=["videos"], responses=error_responses())
    names, jobs, streams = service.file_names, service.jobs, EventStreams(service)

    @router.post("/videos", openapi_extra=request_body(VideoBody), responses=SUBMISSION)
    async def create_video(request: Request) -> Video:
        """Queues a video. The body is JSON, or a form where pictures are files."""
        return video(await submissions.job(request, VideoBody), names)

    @router.get("/videos", responses=error_responses(422))
    def list_videos(
        request: Request,
        limit: Annotated[int, Query(ge=1, le=100)] = 20,
        after: Annotated[str | None, Query(max_length=200, description="Begin after this job.")] = None,
    ) -> VideoList:
        """Your jobs, the newest first."""
        found = jobs.list(owner_of(request), limit=limit + 1 if after is None else HISTORY)
        if after is not None:
            ids = [job.id for job in found]
            found = found[ids.index(after) + 1 :] if after in ids else []
        data = [video(job, names) for job in found[:limit]]
        first, last = (data[0].id, data[-1].id) if data else (None, None)
        return VideoList(data=data, first_id=first, last_id=last, has_more=len(found) > limit)

    @router.get("/videos/{id}", responses=error_responses(404, 422))
    def retrieve_video(request: Request, id: Id) -> Video:
        """A job: its place in the queue, its progress, its times."""
        return video(service.job(owner_of(request), id), names)

    @router.get("/videos/{id}/content", **VIDEO)
    def retrieve_content(request: Request, id: Id) -> FileResponse:
        """The finished video. Ranges are served."""
        return video_file(*service.video(owner_of(request), id))

    @router.get(
        "/videos/{id}/events",
        response_class=StreamingResponse,
        responses={200: {"content": {"text/event-stream": {}}}, **error_responses(404, 422, 429)},
    )
    def watch_video(
        request: Request,
        id: Id,
        last_event_id: Annotated[int, Header(ge=0, le=2**53, description="Go on after this event.")] = 0,
    ) -> StreamingResponse:
        """Progress as server-sent events, from the beginning or after Last-Event-ID, until the job is over."""
        owner = owner_of(request)
        return streams.of(owner, service.job(owner, id), last_event_id)

    @router.post("/videos/{id}/requeue", responses=error_responses(404, 422, 429))
    def requeue_video(request: Request, id: Id) -> Video:
        """Runs a job again that failed, was cancelled or interrupted."""
        return video(jobs.requeue(service.job(owner_of(request), id).id), names)

    @router.delete("/videos/{id}", responses=error_responses(404, 422))
    def delete_video(request: Request, id: Id) -> Deleted:
        """Cancels a job that has not ended, within one step; removes one that has, and its video."""
        job = service.job(owner_of(request), id)
        if not job.over:
            return deleted(jobs.cancel(job.id), gone=False)
        try:
            jobs.delete(job.id)
        except UnknownJob:  # somebody was faster
            pass
        return deleted(job, gone=True)

    @router.get("/models")
    def list_models() -> ModelList:
        """What `model` may be: the presets of this server, the default one first."""
        offered = [
            Model(id=name, task=preset.engine.task, title=preset.preset.title)
            for name, preset in service.presets.items()
        ]
        return ModelList(data=offered)

    return router
