"""LightX2V's other routes: how the queue and the service stand, and videos by their names."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Path, Request
from starlette.responses import FileResponse

from ..config.environment import Environment
from ..jobs.store import Job
from .auth import owner_of
from .openapi import error_responses
from .responses import Metadata, QueueStatus, ServiceStatus, Task, public_path, task, task_id
from .service import HISTORY, Service
from .video_file import VIDEO, video_file


def status_routes(service: Service) -> APIRouter:
    """To be included before the task routes, one of which would take `queue` for a task's id."""
    router = APIRouter(prefix="/v1", tags=["tasks"], responses=error_responses())
    names, jobs = service.file_names, service.jobs

    @router.get("/tasks/")
    def list_tasks(request: Request) -> dict[str, Task]:
        """Your tasks by id, the newest first."""
        return {task_id(job): task(job, names) for job in jobs.list(owner_of(request), limit=HISTORY)}

    @router.get("/tasks/queue/status")
    def queue_status(request: Request) -> QueueStatus:
        running, waiting = active(service)
        return QueueStatus(
            is_processing=bool(running),
            current_task=_own(request, running),
            pending_count=len(waiting),
            active_count=len(running) + len(waiting),
            queue_size=jobs.max_queue,
            queue_available=max(0, jobs.max_queue - len(waiting)),
        )

    @router.get("/files/download/{name:path}", **VIDEO)
    def download(request: Request, name: Annotated[str, Path(max_length=200)]) -> FileResponse:
        """A finished video by the name it was given (`save_result_path`); of several the newest."""
        return video_file(*service.named(owner_of(request), name))

    @router.get("/service/status")
    def service_status(request: Request) -> ServiceStatus:
        running, waiting = active(service)
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


def active(service: Service) -> tuple[list[Job], list[Job]]:
    """Everybody's running job, and those that wait in their order."""
    found = service.jobs.list(limit=service.jobs.max_queue + 10, states=("queued", "running"))
    waiting = sorted((job for job in found if job.state == "queued"), key=lambda job: job.position or 0)
    return [job for job in found if job.state == "running"], waiting


def _own(request: Request, running: list[Job]) -> str | None:
    return next((task_id(job) for job in running if job.owner == owner_of(request)), None)
