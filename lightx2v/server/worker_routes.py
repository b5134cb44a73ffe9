"""The routes under /v1/workers, for the operator of the server: what each worker does, and its drain."""

from typing import Annotated

from fastapi import APIRouter, Depends, Path

from ..jobs.queue import JobManager
from ..jobs.store import UnknownJob
from .auth import check_operator
from .openapi import error_responses
from .responses import Worker, WorkerList

Name = Annotated[str, Path(min_length=1, max_length=200, description="The worker's id, as in the list.")]


def worker_routes(jobs: JobManager) -> APIRouter:
    router = APIRouter(
        prefix="/v1", tags=["workers"], dependencies=[Depends(check_operator)], responses=error_responses()
    )

    @router.get("/workers")
    def list_workers() -> WorkerList:
        """List the workers: what each has loaded, runs and uses. With API keys, only the operator's opens it."""
        return WorkerList(data=[Worker.of(worker) for worker in jobs.workers()])

    @router.post("/workers/{id:path}/drain", responses=error_responses(404, 422))
    def drain_worker(id: Name) -> Worker:
        """Take a worker out of service: its job goes on elsewhere at the step where it stops, and it takes no other."""
        return _set(id, drained=True)

    @router.post("/workers/{id:path}/resume", responses=error_responses(404, 422))
    def resume_worker(id: Name) -> Worker:
        """Put a drained worker back into service."""
        return _set(id, drained=False)

    def _set(id: str, *, drained: bool) -> Worker:
        jobs.drain(id, drained)
        found = next((worker for worker in jobs.workers() if worker.name == id), None)
        if found is None:
            raise UnknownJob("There is no worker with this id. GET /v1/workers lists them.")
        return Worker.of(found)

    return router
