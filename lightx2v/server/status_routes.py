"""LightX2V's other routes: the state of the queue and of the service, the list of tasks, and videos by file name."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Path, Request
from starlette.responses import FileResponse

from ..config.environment import Environment
from ..jobs.store import Job
from .auth import owner_of
from .openapi import VIDEO, error_responses
from .responses import Metadata, QueueStatus, ServiceStatus, Task, public_path, task_id, video_file
from .service import HISTORY, Service


def status_routes(service: Service) -> APIRouter:
    """Include these before the task routes, one of which would take `queue` for a task's id."""
    router = APIRouter(prefix="/v1", tags=["tasks"], responses=error_responses())
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

    @router.get("/files/download/{name:path}", **VIDEO)
    def download(request: Request, name: Annotated[str, Path(max_length=200)]) -> FileResponse:
        """Download a finished video by its file name (`save_result_path`): the newest one with this name."""
        return video_file(*service.video_named(owner_of(request), name))

    @router.get("/service/status")
    def service_status(request: Request) -> ServiceStatus:
        running, waiting = _active_jobs(service)
        counts = jobs.counts()
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

    return router


def _active_jobs(service: Service) -> tuple[list[Job], list[Job]]:
    """The running job and the waiting ones in their order, of all owners."""
    active = service.jobs.list(limit=service.jobs.max_queue + 10, states=("queued", "running"))
    waiting = sorted((job for job in active if job.state == "queued"), key=lambda job: job.position or 0)
    return [job for job in active if job.state == "running"], waiting


def _own_ids(request: Request, jobs: list[Job]) -> list[str]:
    """The ids of those jobs that belong to the client."""
    return [task_id(job) for job in jobs if job.owner == owner_of(request)]
