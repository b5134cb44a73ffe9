"""LightX2V's routes, so that its clients work unchanged: tasks, videos by file name, state of queue and service.

Four things are better than in LightX2V: the settings of a request take effect, a cancelled task stops within a step
and stays cancelled, results support Range requests, and no setting of one request stays for the next.
"""

from typing import Annotated

from fastapi import APIRouter, Path, Request
from starlette.responses import FileResponse

from ..config.environment import Environment
from ..jobs.queries import ALL
from ..jobs.store import Job
from .auth import owner_of
from .openapi import SUBMISSION, error_responses, request_body, serves_file
from .request_bodies import TaskBody
from .responses import (
    TASK_STATUS,
    Metadata,
    QueueStatus,
    ServiceStatus,
    Stopped,
    Task,
    TaskCreated,
    download,
    public_path,
    task_id,
)
from .service import HISTORY, Service
from .submit import Submitter

Id = Annotated[str, Path(min_length=1, max_length=200, description="The task's id: yours, or the server's.")]


def task_routes(service: Service, submitter: Submitter) -> APIRouter:
    router = APIRouter(prefix="/v1", tags=["tasks"], responses=error_responses())
    _add_queue(router, service)  # before the tasks, where a route would take `queue` for a task's id
    _add_service(router, service)
    _add_tasks(router, service, submitter)
    return router


def _add_queue(router: APIRouter, service: Service) -> None:
    names, jobs = service.file_names, service.jobs

    @router.get("/tasks/")
    def list_tasks(request: Request) -> dict[str, Task]:
        """List your tasks by id, the newest first."""
        return {task_id(job): Task.from_job(job, names) for job in jobs.list(owner_of(request), limit=HISTORY)}

    @router.get("/tasks/queue/status")
    def queue_status(request: Request) -> QueueStatus:
        running, waiting = _active_jobs(service)
        return QueueStatus(
            is_processing=bool(running),
            current_task=next(iter(_own_ids(request, running)), None),
            pending_count=len(waiting),
            active_count=len(running) + len(waiting),
            queue_size=jobs.max_queue,
            queue_available=max(0, jobs.max_queue - len(waiting)),
        )

    @serves_file(router, "/files/download/{name:path}")
    def download_named(request: Request, name: Annotated[str, Path(max_length=200)]) -> FileResponse:
        """Download a finished video by its file name (`save_result_path`): the newest one with this name."""
        return download(*service.video_named(owner_of(request), name))


def _add_service(router: APIRouter, service: Service) -> None:
    @router.get("/service/status")
    def service_status(request: Request) -> ServiceStatus:
        running, waiting = _active_jobs(service)
        counts = service.jobs.counts()
        return ServiceStatus(
            service_status="busy" if running else "idle",
            current_task=next(iter(_own_ids(request, running)), None),
            active_tasks=_own_ids(request, [*running, *waiting]),
            pending_tasks=_own_ids(request, waiting),
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


def _add_tasks(router: APIRouter, service: Service, submitter: Submitter) -> None:
    names, jobs = service.file_names, service.jobs

    @router.post("/tasks/video/", openapi_extra=request_body(TaskBody), responses=SUBMISSION)
    @router.post("/tasks/video/form", openapi_extra=request_body(TaskBody), responses=SUBMISSION)
    @router.post("/tasks/", openapi_extra=request_body(TaskBody), responses=SUBMISSION, deprecated=True)
    @router.post("/tasks/video", include_in_schema=False)
    @router.post("/tasks", include_in_schema=False)
    async def create_task(request: Request) -> TaskCreated:
        """Queue a video. The body is JSON, or a form with the images as files."""
        job, warnings = await submitter.submit(request, TaskBody)
        return TaskCreated(
            task_id=task_id(job),
            task_status=TASK_STATUS[job.state],
            save_result_path=names.of(job.id),
            position=job.position,
            warnings=list(warnings),
        )

    @router.get("/tasks/{id}/status", responses=error_responses(404, 422))
    def task_status(request: Request, id: Id) -> Task:
        return Task.from_job(service.job(owner_of(request), id), names)

    @serves_file(router, "/tasks/{id}/result")
    def task_result(request: Request, id: Id) -> FileResponse:
        """Download the finished video. Range requests work."""
        return download(*service.video(owner_of(request), id))

    @router.delete("/tasks/all/running")
    def stop_all_tasks(request: Request) -> Stopped:
        """Cancel all of your tasks that are waiting or running."""
        owner = owner_of(request)
        own = jobs.list(owner, limit=ALL, states=("queued", "running"))
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


def _active_jobs(service: Service) -> tuple[list[Job], list[Job]]:
    """The running jobs, the oldest first, and the waiting ones in their order, of all owners."""
    active = service.jobs.list(limit=ALL, states=("queued", "running"), oldest_first=True)
    waiting = sorted((job for job in active if job.state == "queued"), key=lambda job: job.position or 0)
    return [job for job in active if job.state == "running"], waiting


def _own_ids(request: Request, jobs: list[Job]) -> list[str]:
    """The ids of those jobs that belong to the client."""
    return [task_id(job) for job in jobs if job.owner == owner_of(request)]
