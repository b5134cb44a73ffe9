"""LightX2V's task routes, so that its clients work unchanged.

Four things are better than in LightX2V: the settings of a request take effect, a cancelled task stops within a step
and stays cancelled, results support Range requests, and no setting of one request stays for the next.
"""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Path, Request
from starlette.responses import FileResponse

from .auth import owner_of
from .openapi import SUBMISSION, VIDEO, error_responses, request_body
from .request_bodies import TaskBody
from .responses import TASK_STATUS, Stopped, Task, TaskCreated, video_file
from .service import Service
from .submit import Submitter

Id = Annotated[str, Path(min_length=1, max_length=200, description="The task's id: yours, or the server's.")]


def task_routes(service: Service, submitter: Submitter) -> APIRouter:
    router = APIRouter(prefix="/v1", tags=["tasks"], responses=error_responses())
    names, jobs = service.file_names, service.jobs

    @router.post("/tasks/video/", openapi_extra=request_body(TaskBody), responses=SUBMISSION)
    @router.post("/tasks/video/form", openapi_extra=request_body(TaskBody), responses=SUBMISSION)
    @router.post("/tasks/", openapi_extra=request_body(TaskBody), responses=SUBMISSION, deprecated=True)
    @router.post("/tasks/video", include_in_schema=False)
    @router.post("/tasks", include_in_schema=False)
    async def create_task(request: Request) -> TaskCreated:
        """Queue a video. The body is JSON, or a form with the images as files."""
        return TaskCreated.from_job(await submitter.submit(request, TaskBody), names)

    @router.get("/tasks/{id}/status", responses=error_responses(404, 422))
    def task_status(request: Request, id: Id) -> Task:
        return Task.from_job(service.job(owner_of(request), id), names)

    @router.get("/tasks/{id}/result", **VIDEO)
    def task_result(request: Request, id: Id) -> FileResponse:
        """Download the finished video. Range requests work."""
        return video_file(*service.video(owner_of(request), id))

    @router.delete("/tasks/all/running")
    def stop_all_tasks(request: Request) -> Stopped:
        """Cancel all of your tasks that are waiting or running."""
        owner = owner_of(request)
        own = jobs.list(owner, limit=jobs.max_queue + 10, states=("queued", "running"))
        for job in own:
            jobs.cancel(job.id)
        if not own:
            return Stopped(stop_status="do_nothing", reason="None of your tasks is waiting or running.")
        return Stopped(stop_status="success", reason=f"Cancelled {len(own)} tasks.")

    @router.delete("/tasks/{id}", responses=error_responses(404, 422))
    def stop_task(request: Request, id: Id) -> Stopped:
        """Cancel a task, within one step if it is running."""
        job = service.job(owner_of(request), id)
        if job.over:
            return Stopped(stop_status="do_nothing", reason=f"The task is already {TASK_STATUS[job.state]}.")
        jobs.cancel(job.id)
        return Stopped(stop_status="success", reason="The task is cancelled.")

    return router
