"""The JSON bodies of responses, for LightX2V's task routes and for /v1/videos. They hold no path of this machine."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field
from starlette.responses import FileResponse, JSONResponse

from ..catalog.catalog import FoundLora
from ..jobs.pool import Activity, WorkerState
from ..jobs.store import Job, State
from .file_names import FileNames

VideoStatus = Literal["queued", "in_progress", "completed", "failed", "cancelled", "interrupted"]
TaskStatus = Literal["pending", "processing", "completed", "failed", "cancelled"]

_STATUS: dict[State, tuple[VideoStatus, TaskStatus]] = {
    "queued": ("queued", "pending"),
    "running": ("in_progress", "processing"),
    "succeeded": ("completed", "completed"),
    "failed": ("failed", "failed"),
    "cancelled": ("cancelled", "cancelled"),
    "interrupted": ("interrupted", "failed"),  # LightX2V has no such status; error_type says Interrupted
}
VIDEO_STATUS: dict[State, VideoStatus] = {state: video for state, (video, _) in _STATUS.items()}
TASK_STATUS: dict[State, TaskStatus] = {state: task for state, (_, task) in _STATUS.items()}


class ErrorDetail(BaseModel):
    type: str
    code: str = Field(description="The same as `type`, under the name that OpenAI's clients read.")
    message: str
    position: int | None = Field(None, description="With 429: the place in the queue that the job would have had.")


class ErrorResponse(BaseModel):
    """The body of every error."""

    error: ErrorDetail


class Step(BaseModel):
    """The progress of a running job: `step` of the `total` steps of this stage are done."""

    model_config = ConfigDict(from_attributes=True)

    stage: str
    step: int
    total: int
    expert: str | None = None
    seconds: float = Field(description="Seconds since the run began.")
    eta: float | None = Field(None, description="Estimated seconds left.")
    resumed_after: int = Field(0, description="Denoising steps that were done before a restart; 0 without one.")


class Video(BaseModel):
    """A job."""

    id: str
    object: Literal["video"] = "video"
    model: str
    status: VideoStatus
    progress: int = Field(description="Per cent of the denoising steps; 100 when the video is ready.")
    step: Step | None = None
    cancelling: bool = Field(False, description="True once the job has been asked to stop; it stops within a step.")
    position: int | None = Field(None, description="Place in the queue; 1 is next.")
    starts_in: float | None = Field(None, description="Seconds until the job starts, if they can be predicted.")
    created_at: int
    started_at: int | None = None
    completed_at: int | None = None
    prompt: str
    remixed_from_video_id: str | None = Field(None, description="The job whose settings this one has taken.")
    seed: int
    size: str
    seconds: str
    fps: float
    num_frames: int
    client_id: str | None = None
    file_name: str
    error: ErrorDetail | None = None
    timings: dict[str, Any] | None = Field(None, description="Seconds per stage and per step; memory peaks in bytes.")
    warnings: list[str] = []

    @classmethod
    def from_job(cls, job: Job, names: FileNames, warnings: Sequence[str] = ()) -> Self:
        """`warnings` are about the body that was sent; those of the run follow them."""
        request, result = job.request, job.result or {}
        height, width = result.get("height", request.height), result.get("width", request.width)
        return cls(
            id=job.id,
            model=job.preset,
            status=VIDEO_STATUS[job.state],
            progress=percent(job),
            step=None if job.progress is None else Step.model_validate(job.progress),
            cancelling=job.cancelling,
            position=job.position,
            starts_in=job.starts_in,
            created_at=int(job.created),
            started_at=None if job.started is None else int(job.started),
            completed_at=None if job.finished is None else int(job.finished),
            prompt=request.prompt,
            remixed_from_video_id=job.source,
            seed=request.seed,
            size=f"{width}x{height}",
            seconds=f"{request.seconds:.4g}",
            fps=request.video_fps,
            num_frames=request.video_frames,
            client_id=job.client_id,
            file_name=names.of(job.id),
            error=None if job.error is None else ErrorDetail(**job.error, code=job.error["type"], position=None),
            timings=result.get("timings"),
            warnings=[*warnings, *result.get("warnings", [])],
        )


class VideoList(BaseModel):
    object: Literal["list"] = "list"
    data: list[Video]
    first_id: str | None
    last_id: str | None
    has_more: bool


class Deleted(BaseModel):
    """`deleted` is false for a job that had not ended: DELETE cancels it, and a second DELETE removes it."""

    id: str
    object: Literal["video.deleted"] = "video.deleted"
    deleted: bool
    status: VideoStatus
    cancelling: bool = False


class Model(BaseModel):
    id: str
    object: Literal["model"] = "model"
    task: str
    title: str


class Lora(BaseModel):
    id: str
    object: Literal["lora"] = "lora"
    task: str | None = None
    files: list[str] = Field(description="The files' names: a pair, or one file for one expert or both.")
    experts: list[str] = Field(description='"high" and "low", as far as it has a file for them.')
    rank: int
    trigger_words: list[str] = []
    trained_for: str = ""

    @classmethod
    def of(cls, lora: FoundLora) -> Self:
        experts = [name for name, file in (("high", lora.high), ("low", lora.low)) if file is not None]
        return cls(
            id=lora.name,
            task=lora.first.task,
            files=[file.name for file in lora.files],
            experts=experts,
            rank=lora.first.rank,
            trigger_words=list(lora.triggers),
            trained_for=lora.first.trained_for,
        )


class LoraList(BaseModel):
    object: Literal["list"] = "list"
    data: list[Lora]


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[Model]


class TaskCreated(BaseModel):
    task_id: str
    task_status: TaskStatus
    save_result_path: str
    position: int | None = None
    warnings: list[str] = []


class Task(BaseModel):
    task_id: str
    status: TaskStatus
    start_time: float | None
    end_time: float | None
    error: str | None
    error_type: str | None
    save_result_path: str
    position: int | None = None
    progress: Step | None = None

    @classmethod
    def from_job(cls, job: Job, names: FileNames) -> Self:
        error = job.error or {}
        return cls(
            task_id=task_id(job),
            status=TASK_STATUS[job.state],
            start_time=job.started,
            end_time=job.finished,
            error=error.get("message"),
            error_type=error.get("type"),
            save_result_path=names.of(job.id),
            position=job.position,
            progress=None if job.progress is None else Step.model_validate(job.progress),
        )


class Stopped(BaseModel):
    stop_status: Literal["success", "do_nothing"]
    reason: str


class QueueStatus(BaseModel):
    is_processing: bool
    current_task: str | None
    pending_count: int
    active_count: int
    queue_size: int
    queue_available: int


class ServiceStatus(BaseModel):
    service_status: Literal["idle", "busy"]
    current_task: str | None
    active_tasks: list[str]
    pending_tasks: list[str]
    queue_size: int
    total_tasks: int
    completed_tasks: int
    failed_tasks: int


class Metadata(BaseModel):
    nproc_per_node: int
    model_cls: str
    model_path: str
    task: str


class Worker(BaseModel):
    """A worker, where it is, and what it does. Memory in bytes: of its GPU where it has one."""

    id: str
    object: Literal["worker"] = "worker"
    status: Activity
    drained: bool = Field(description="Out of service: it takes no job.")
    machine: str
    device: str
    memory_used: int | None
    memory: int | None
    model: str | None = Field(description="The model that is loaded.")
    job: str | None = Field(description="The id of the job that it runs.")
    progress: int | None = Field(description="Per cent of that job.")

    @classmethod
    def of(cls, worker: WorkerState) -> Self:
        status, job = worker.status, worker.job
        return cls(
            id=worker.name,
            status=worker.state,
            drained=worker.paused,
            machine=status.machine,
            device=worker.device,
            memory_used=status.memory_used,
            memory=status.memory_total,
            model=public_path(worker.loaded.preset) if worker.loaded is not None else None,
            job=None if job is None else job.id,
            progress=None if job is None else percent(job),
        )


class WorkerList(BaseModel):
    object: Literal["list"] = "list"
    data: list[Worker]


class Health(BaseModel):
    status: str


def error_response(
    status: int, kind: str, message: str, headers: Mapping[str, str] | None = None, *, position: int | None = None
) -> JSONResponse:
    """An error in the form of ErrorResponse."""
    content = ErrorResponse(error=ErrorDetail(type=kind, code=kind, message=message, position=position))
    return JSONResponse(content.model_dump(exclude_none=True), status_code=status, headers=headers)


def download(path: Path, name: str, media_type: str = "video/mp4") -> FileResponse:
    """The file as a download with this name. Range requests and HEAD work."""
    headers = {"X-Content-Type-Options": "nosniff", "Cache-Control": "private"}
    return FileResponse(path, media_type=media_type, filename=name, headers=headers)


def task_id(job: Job) -> str:
    """The client's own id if it gave one, else the job's."""
    return job.client_id or job.id


def percent(job: Job) -> int:
    """Per cent of the denoising steps, which take nearly all of the time."""
    if job.state == "succeeded":
        return 100
    progress = job.progress
    if progress is None or progress.stage in ("download", "load", "text", "image"):
        return 0
    return min(99, 100 * progress.step // progress.total) if progress.stage == "denoise" and progress.total else 99


def public_path(name: str) -> str:
    """A Hub name unchanged; of a path on this machine only the last part."""
    return name if re.fullmatch(r"[\w.-]+/[\w.-]+", name) else name.replace("\\", "/").rstrip("/").rpartition("/")[2]
