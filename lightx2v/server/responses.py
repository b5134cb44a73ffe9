"""What clients get back, in the words of the two families, made from jobs. No paths of this machine are in it."""

from __future__ import annotations

import re
from typing import Any, Literal

from pydantic import BaseModel, Field

from ..errors import Busy, LightX2VError
from ..jobs.store import Job, State
from .file_names import FileNames

VideoStatus = Literal["queued", "in_progress", "completed", "failed", "cancelled", "interrupted"]
TaskStatus = Literal["pending", "processing", "completed", "failed", "cancelled"]

_VIDEO_STATUS: dict[State, VideoStatus] = {
    "queued": "queued",
    "running": "in_progress",
    "succeeded": "completed",
    "failed": "failed",
    "cancelled": "cancelled",
    "interrupted": "interrupted",
}
_TASK_STATUS: dict[State, TaskStatus] = {
    "queued": "pending",
    "running": "processing",
    "succeeded": "completed",
    "failed": "failed",
    "cancelled": "cancelled",
    "interrupted": "failed",  # LightX2V has no word for it; error_type says Interrupted
}


class ErrorDetail(BaseModel):
    type: str
    message: str
    position: int | None = Field(None, description="With 429: the place that the job would have had in the queue.")


class ErrorResponse(BaseModel):
    """Every error looks like this."""

    error: ErrorDetail


class Step(BaseModel):
    """Where a running job is: `step` of `total` inside `stage` is done."""

    stage: str
    step: int
    total: int
    expert: str | None = None
    seconds: float = Field(description="Since the run began.")
    eta: float | None = Field(None, description="Seconds left.")


class Video(BaseModel):
    """A job."""

    id: str
    object: Literal["video"] = "video"
    model: str
    status: VideoStatus
    progress: int = Field(description="Per cent of the denoising steps; 100 when the video is there.")
    step: Step | None = None
    cancelling: bool = Field(False, description="Asked to stop; it does within a step.")
    position: int | None = Field(None, description="In the queue, 1 is next.")
    starts_in: float | None = Field(None, description="Seconds, as far as they can be predicted.")
    created_at: int
    started_at: int | None = None
    completed_at: int | None = None
    prompt: str
    seed: int
    size: str
    seconds: str
    fps: float
    num_frames: int
    client_id: str | None = None
    file_name: str
    error: ErrorDetail | None = None
    timings: dict[str, Any] | None = Field(None, description="Seconds per stage and step, memory peaks in bytes.")
    warnings: list[str] = []


class VideoList(BaseModel):
    object: Literal["list"] = "list"
    data: list[Video]
    first_id: str | None
    last_id: str | None
    has_more: bool


class Deleted(BaseModel):
    """`deleted` is false for a job that had not ended: it is cancelled, and a second DELETE removes it."""

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


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[Model]


class TaskCreated(BaseModel):
    task_id: str
    task_status: TaskStatus
    save_result_path: str
    position: int | None = None


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


class Health(BaseModel):
    status: str


def video(job: Job, names: FileNames) -> Video:
    request, result = job.request, job.result or {}
    height, width = result.get("height", request.height), result.get("width", request.width)
    return Video(
        id=job.id,
        model=job.preset,
        status=video_status(job.state),
        progress=percent(job),
        step=step(job),
        cancelling=job.cancelling,
        position=job.position,
        starts_in=job.starts_in,
        created_at=int(job.created),
        started_at=None if job.started is None else int(job.started),
        completed_at=None if job.finished is None else int(job.finished),
        prompt=request.prompt,
        seed=request.seed,
        size=f"{width}x{height}",
        seconds=f"{request.seconds:.4g}",
        fps=request.fps,
        num_frames=request.frames,
        client_id=job.client_id,
        file_name=names.of(job.id),
        error=None
        if job.error is None
        else ErrorDetail(type=job.error["type"], message=job.error["message"], position=None),
        timings=result.get("timings"),
        warnings=result.get("warnings", []),
    )


def video_status(state: State) -> VideoStatus:
    return _VIDEO_STATUS[state]


def deleted(job: Job, *, gone: bool) -> Deleted:
    return Deleted(id=job.id, deleted=gone, status=video_status(job.state), cancelling=job.cancelling)


def created(job: Job, names: FileNames) -> TaskCreated:
    id = task_id(job)
    return TaskCreated(
        task_id=id, task_status=_TASK_STATUS[job.state], save_result_path=names.of(job.id), position=job.position
    )


def task(job: Job, names: FileNames) -> Task:
    return Task(
        task_id=task_id(job),
        status=_TASK_STATUS[job.state],
        start_time=job.started,
        end_time=job.finished,
        error=None if job.error is None else job.error["message"],
        error_type=None if job.error is None else job.error["type"],
        save_result_path=names.of(job.id),
        position=job.position,
        progress=step(job),
    )


def task_id(job: Job) -> str:
    """The client's own id where it gave one."""
    return job.client_id or job.id


def step(job: Job) -> Step | None:
    event = job.progress
    if event is None:
        return None
    return Step(
        stage=event.stage, step=event.step, total=event.total, expert=event.expert, seconds=event.seconds, eta=event.eta
    )


def percent(job: Job) -> int:
    """Of the denoising steps, where nearly all of the time goes."""
    if job.state == "succeeded":
        return 100
    event = job.progress
    if event is None or event.stage in ("download", "load", "text", "image"):
        return 0
    return min(99, 100 * event.step // event.total) if event.stage == "denoise" and event.total else 99


def problem(error: LightX2VError, *, position: int | None = None) -> ErrorResponse:
    name = type(error).__name__
    known = ErrorDetail(type=name, message=str(error), position=position if isinstance(error, Busy) else None)
    return ErrorResponse(error=known)


def public_path(name: str) -> str:
    """A Hub name as it is; of a path of this machine the last part only."""
    return name if re.fullmatch(r"[\w.-]+/[\w.-]+", name) else name.replace("\\", "/").rstrip("/").rpartition("/")[2]
