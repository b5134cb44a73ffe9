"""The routes under /v1/videos: those of OpenAI's API, which vLLM-Omni, SGLang and FastVideo also have; and events.

A job continues when its client disconnects; DELETE stops it.
"""

import contextlib
from typing import Annotated, Literal

from anyio import CapacityLimiter
from anyio.to_thread import run_sync
from fastapi import APIRouter, Header, Path, Query, Request
from starlette.responses import FileResponse, StreamingResponse

from ..errors import BadRequest, quoted
from ..jobs.store import UnknownJob
from ..media.video_stills import STILLS
from .auth import owner_of
from .event_stream import EventStreams
from .openapi import SUBMISSION, error_responses, request_body, serves_file
from .request_bodies import RemixBody, VideoBody
from .responses import VIDEO_STATUS, Deleted, Lora, LoraList, Model, ModelList, Video, VideoList, download
from .service import Service
from .submit import Submitter

VARIANTS = ["video", "original", *STILLS]
NOT_FOUND = error_responses(404)

Id = Annotated[
    str, Path(min_length=1, max_length=200, description="The job's id, or the client_id of the request that made it.")
]


def video_routes(service: Service, submitter: Submitter) -> APIRouter:
    router = APIRouter(prefix="/v1", tags=["videos"], responses=error_responses())
    names = service.file_names

    @router.post("/videos", openapi_extra=request_body(VideoBody), responses=SUBMISSION)
    async def create_video(request: Request) -> Video:
        """Queue a video. The body is JSON, or a form with the images as files."""
        job, warnings = await submitter.submit(request, VideoBody)
        return Video.from_job(job, names, warnings)

    @router.post("/videos/{id}/remix", openapi_extra=request_body(RemixBody), responses=SUBMISSION | NOT_FOUND)
    async def remix_video(request: Request, id: Id) -> Video:
        """Queue another video with the settings of a job, also its seed and images, and a new prompt."""
        return Video.from_job(await submitter.remix(request, id), names)

    @router.get("/models")
    def list_models() -> ModelList:
        """List the values of `model`: this server's presets, the default first."""
        presets = service.presets.items()
        return ModelList(data=[Model(id=name, task=p.engine.task, title=p.preset.title) for name, p in presets])

    @router.get("/loras")
    def list_loras() -> LoraList:
        """List the LoRAs that a request may name in `loras[].path`, by id or by a file's name."""
        return LoraList(data=[Lora.of(lora) for lora in service.loras().values()])

    _add_queries(router, service)
    _add_actions(router, service)
    return router


def _add_queries(router: APIRouter, service: Service) -> None:
    names, streams = service.file_names, EventStreams(service)
    stills = CapacityLimiter(1)  # others wait without holding a thread that the other routes need

    @router.get("/videos", responses=error_responses(404, 422))
    def list_videos(
        request: Request,
        limit: Annotated[int, Query(ge=1, le=100)] = 20,
        after: Annotated[str | None, Query(max_length=200, description="Start after the job with this id.")] = None,
        order: Annotated[Literal["asc", "desc"], Query(description="desc: the newest first.")] = "desc",
    ) -> VideoList:
        """List your jobs, page by page: `after` is the `last_id` of the page before."""
        jobs = service.jobs.list(owner_of(request), limit=limit + 1, after=after or None, oldest_first=order == "asc")
        data = [Video.from_job(job, names) for job in jobs[:limit]]
        first, last = (data[0].id, data[-1].id) if data else (None, None)
        return VideoList(data=data, first_id=first, last_id=last, has_more=len(jobs) > limit)

    @router.get("/videos/{id}", responses=error_responses(404, 422))
    def retrieve_video(request: Request, id: Id) -> Video:
        """Show a job: its place in the queue, its progress, its times."""
        return Video.from_job(service.job(owner_of(request), id), names)

    @serves_file(router, "/videos/{id}/content")
    async def retrieve_content(
        request: Request,
        id: Id,
        variant: Annotated[str, Query(description="What to download.", json_schema_extra={"enum": VARIANTS})] = "video",
    ) -> FileResponse:
        """Download the finished video, its original without interpolation, or a JPEG: its middle frame, or up to 25
        frames in rows of five. Range requests work."""
        owner = owner_of(request)
        if (find := {"video": service.video, "original": service.original}.get(variant)) is not None:
            return download(*await run_sync(find, owner, id))
        if variant not in STILLS:
            raise BadRequest(f"variant is {quoted(variant)}; expected one of {', '.join(VARIANTS)}. Choose one.")
        return download(*await run_sync(service.picture, owner, id, variant, limiter=stills), "image/jpeg")

    @router.get(
        "/videos/{id}/events",
        response_class=StreamingResponse,
        responses={200: {"content": {"text/event-stream": {}}}, **error_responses(404, 422, 429)},
    )
    def watch_video(
        request: Request,
        id: Id,
        last_event_id: Annotated[int, Header(ge=0, le=2**53, description="Continue after this event.")] = 0,
    ) -> StreamingResponse:
        """Stream progress as server-sent events until the job ends, from the start or after Last-Event-ID."""
        owner = owner_of(request)
        return streams.open(owner, service.job(owner, id), last_event_id)


def _add_actions(router: APIRouter, service: Service) -> None:
    jobs = service.jobs

    @router.post("/videos/{id}/requeue", responses=error_responses(404, 422, 429))
    def requeue_video(request: Request, id: Id) -> Video:
        """Run a job again that failed, was cancelled or was interrupted."""
        return Video.from_job(jobs.requeue(service.job(owner_of(request), id).id), service.file_names)

    @router.delete("/videos/{id}", responses=error_responses(404, 422))
    def delete_video(request: Request, id: Id) -> Deleted:
        """Cancel a job that has not ended, within one step; remove one that has, and its video."""
        job = service.job(owner_of(request), id)
        if over := job.over:
            with contextlib.suppress(UnknownJob):  # another request has removed it
                jobs.delete(job.id)
        else:
            job = jobs.cancel(job.id)
        return Deleted(id=job.id, deleted=over, status=VIDEO_STATUS[job.state], cancelling=job.cancelling)
