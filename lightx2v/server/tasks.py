"""LightX2V's routes: /v1/tasks, /v1/files and /v1/service, so that its clients work unchanged.

What is different is for the better: settings of a request count, a cancelled task stops within a step and stays
cancelled, results answer to Range, and nothing of one request stays for the next.
"""

from __future__ import annotations

from typing import Annotated

from anyio import CapacityLimiter
from anyio.to_thread import run_sync
from fastapi import APIRouter, Path, Request
from starlette.responses import FileResponse

from ..config import Environment
from ..jobs import Job
from .answers import (
    Metadata,
    QueueStatus,
    ServiceStatus,
    Stopped,
    Task,
    TaskCreated,
    created,
    public_path,
    task,
    task_id,
)
from .bodies import TaskBody, read_body
from .documents import body_of, refusals
from .keys import owner_of
from .service import Service
from .videos import _FILE, HEADERS

Id = Annotated[str, Path(min_length=1, max_length=200, description="The task's id, yours or the one it was given.")]
HISTORY = 1000


def task_routes(service: Service, submissions: CapacityLimiter) -> APIRouter:
    """`submissions` bounds how many requests are read and their pictures fetched at one time."""
    router = APIRouter(prefix="/v1", tags=["tasks"])
    names, jobs = service.names, service.jobs

    @router.post("/tasks/video/", openapi_extra=body_of(TaskBody), responses=refusals(413, 415, 422, 429, 507))
    @router.post("/tasks/video/form", openapi_extra=body_of(TaskBody), responses=refusals(413, 415, 422, 429, 507))
    @router.post(
        "/tasks/", openapi_extra=body_of(TaskBody), responses=refusals(413, 415, 422, 429, 507), deprecated=True
    )
    @router.post("/tasks/video", include_in_schema=False)
    @router.post("/tasks", include_in_schema=False)
    async def create_task(request: Request) -> TaskCreated:
        """Queues a video. The body is JSON, or a form where pictures are files."""
        body, files = await read_body(request, TaskBody)
        owner = owner_of(request)
        job = await run_sync(lambda: service.submit(owner, body.wish(files)), limiter=submissions)
        return created(job, names)

    @router.get("/tasks/")
    def list_tasks(request: Request) -> dict[str, Task]:
        """Your tasks by id, the newest first."""
        return {task_id(job): task(job, names) for job in jobs.list(owner_of(request), limit=HISTORY)}

    @router.get("/tasks/queue/status")
    def queue_status(request: Request) -> QueueStatus:
        running, waiting = _active(service)
        return QueueStatus(
            is_processing=bool(running),
            current_task=_own(request, running),
            pending_count=len(waiting),
            active_count=len(running) + len(waiting),
            queue_size=jobs.max_queue,
            queue_available=max(0, jobs.max_queue - len(waiting)),
        )

    @router.get("/tasks/{id}/status", responses=refusals(404, 422))
    def task_status(request: Request, id: Id) -> Task:
        return task(service.job(owner_of(request), id), names)

    @router.get(
        "/tasks/{id}/result",
        response_class=FileResponse,
        responses={200: _FILE, 206: _FILE, **refusals(404, 422), 416: {"description": "No such range."}},
    )
    def task_result(request: Request, id: Id) -> FileResponse:
        """The finished video. Ranges are served."""
        path, name = service.video(owner_of(request), id)
        return FileResponse(path, media_type="video/mp4", filename=name, headers=HEADERS)

    @router.delete("/tasks/all/running")
    def stop_all_tasks(request: Request) -> Stopped:
        """Cancels all of your tasks that wait or run."""
        owner = owner_of(request)
        mine = [job for jobs_ in _active(service) for job in jobs_ if job.owner == owner]
        for job in mine:
            jobs.cancel(job.id)
        if not mine:
            return Stopped(stop_status="do_nothing", reason="No task of yours is waiting or running.")
        return Stopped(stop_status="success", reason=f"{len(mine)} tasks are cancelled.")

    @router.delete("/tasks/{id}", responses=refusals(404, 422))
    def stop_task(request: Request, id: Id) -> Stopped:
        """Cancels a task, within one step if it runs."""
        job = service.job(owner_of(request), id)
        if job.over:
            return Stopped(stop_status="do_nothing", reason=f"The task is {task(job, names).status} already.")
        jobs.cancel(job.id)
        return Stopped(stop_status="success", reason="The task is cancelled.")

    @router.get(
        "/files/download/{name:path}",
        response_class=FileResponse,
        responses={200: _FILE, 206: _FILE, **refusals(404, 422), 416: {"description": "No such range."}},
    )
    def download(request: Request, name: Annotated[str, Path(max_length=200)]) -> FileResponse:
        """A finished video by the name it was given (`save_result_path`); of several the newest."""
        path, own = service.named(owner_of(request), name)
        return FileResponse(path, media_type="video/mp4", filename=own, headers=HEADERS)

    @router.get("/service/status")
    def service_status(request: Request) -> ServiceStatus:
        running, waiting = _active(service)
        counts, owner = jobs.counts(), owner_of(request)
        return ServiceStatus(
            service_status="busy" if running else "idle",
            current_task=_own(request, running),
            active_tasks=[task_id(job) for job in (*running, *waiting) if job.owner == owner],
            pending_tasks=[task_id(job) for job in waiting if job.owner == owner],
            queue_size=len(waiting),
            total_tasks=sum(counts.values()),
            completed_tasks=counts["succeeded"],
            failed_tasks=counts["failed"],
        )

    @router.get("/service/metadata")
    def service_metadata() -> Metadata:
        engine = service.presets[service.default].engine
        return Metadata(
            nproc_per_node=Environment.read().world_size or 1,
            model_cls=engine.model_cls,
            model_path=public_path(engine.model_path),
            task=engine.task,
        )

    return router


def _active(service: Service) -> tuple[list[Job], list[Job]]:
    """Everybody's running job, and those that wait in their order."""
    found = service.jobs.list(limit=service.jobs.max_queue + 10, states=("queued", "running"))
    waiting = sorted((job for job in found if job.state == "queued"), key=lambda job: job.position or 0)
    return [job for job in found if job.state == "running"], waiting


def _own(request: Request, running: list[Job]) -> str | None:
    return next((task_id(job) for job in running if job.owner == owner_of(request)), None)
