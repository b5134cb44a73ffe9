"""LightX2V's task routes, so that its clients work unchanged.

What is different is for the better: settings of a request count, a cancelled task stops within a step and stays
cancelled, results answer to Range, and nothing of one request stays for the next.
"""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Path, Request
from starlette.responses import FileResponse

from .auth import owner_of
from .openapi import SUBMISSION, error_responses, request_body
from .request_bodies import TaskBody
from .responses import Stopped, Task, TaskCreated, created, task
from .service import Service
from .status_routes import active
from .submit import Submitter
from .video_file import VIDEO, video_file

Id = Annotated[str, Path(min_length=1, max_length=200, description="The task's id, yours or the one it was given.")]


def task_routes(service: Service, submissions: Submitter) -> APIRouter:
    router = APIRouter(prefix="/v1", tags=["tasks"], responses=error_responses())
    names, jobs = service.file_names, service.jobs

    @router.post("/tasks/video/", openapi_extra=request_body(TaskBody), responses=SUBMISSION)
    @router.post("/tasks/video/form", openapi_extra=request_body(TaskBody), responses=SUBMISSION)
    @router.post("/tasks/", openapi_extra=request_body(TaskBody), responses=SUBMISSION, deprecated=True)
    @router.post("/tasks/video", include_in_schema=False)
    @router.post("/tasks", include_in_schema=False)
    async def create_task(request: Request) -> TaskCreated:
        """Queues a video. The body is JSON, or a form where pictures are files."""
        return created(await submissions.job(request, TaskBody), names)

    @router.get("/tasks/{id}/status", responses=error_responses(404, 422))
    def task_status(request: Request, id: Id) -> Task:
        return task(service.job(owner_of(request), id), names)

    @router.get("/tasks/{id}/result", **VIDEO)
    def task_result(request: Request, id: Id) -> FileResponse:
        """The finished video. Ranges are served."""
        return video_file(*service.video(owner_of(request), id))

    @router.delete("/tasks/all/running")
    def stop_all_tasks(request: Request) -> Stopped:
        """Cancels all of your tasks that wait or run."""
        owner = owner_of(request)
        mine = [job for jobs_ in active(service) for job in jobs_ if job.owner == owner]
        for job in mine:
            jobs.cancel(job.id)
        if not mine:
            return Stopped(stop_status="do_nothing", reason="No task of yours is waiting or running.")
        return Stopped(stop_status="success", reason=f"{len(mine)} tasks are cancelled.")

    @router.delete("/tasks/{id}", responses=error_responses(404, 422))
    def stop_task(request: Request, id: Id) -> Stopped:
        """Cancels a task, within one step if it runs."""
        job = service.job(owner_of(request), id)
        if job.over:
            return Stopped(stop_status="do_nothing", reason=f"The task is {task(job, names).status} already.")
        jobs.cancel(job.id)
        return Stopped(stop_status="success", reason="The task is cancelled.")

    return router
