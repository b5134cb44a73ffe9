"""What may make a failed run succeed, and the changed request that a remedy's button runs."""

from __future__ import annotations

from dataclasses import replace

from lightx2v.config.engine_config import EngineConfig
from lightx2v.config.request import Request
from lightx2v.jobs.store import Job

from ..strings import Words
from .stage import RetryOption

SMALLER = 480 * 832
RETRY = "retry"


def retry_options(words: Words, job: Job | None, *, offload: bool) -> list[RetryOption]:
    """Buttons for a run that did not succeed, the most promising first. `offload`: whether that may be changed here."""
    if job is None or job.state in ("queued", "running", "succeeded"):
        return []
    options = []
    if job.error is not None and job.error["type"] == "OutOfMemory":
        request = job.request
        if offload and job.config.cpu_offload is not True:
            options.append(RetryOption(act="retry_offload", label=words("retry_offload")))
        if (smaller := smaller_size(request)) is not None:
            options.append(
                RetryOption(act="retry_smaller", label=words("retry_smaller", size=f"{smaller[1]} × {smaller[0]}"))
            )
        if (frames := fewer_frames(request)) is not None:
            options.append(RetryOption(act="retry_shorter", label=words("retry_shorter", n=frames)))
    return [*options, RetryOption(act=RETRY, label=words("retry"))]


def apply_retry(act: str, job: Job) -> tuple[EngineConfig, Request] | None:
    """Engine and request with the change that `act` stands for; None where it changes nothing."""
    if act == "retry_offload":
        return replace(job.config, cpu_offload=True), job.request
    if act == "retry_smaller" and (size := smaller_size(job.request)) is not None:
        return job.config, replace(job.request, height=size[0], width=size[1])
    if act == "retry_shorter" and (frames := fewer_frames(job.request)) is not None:
        return job.config, replace(job.request, frames=frames)
    return (job.config, job.request) if act == RETRY else None


def smaller_size(request: Request) -> tuple[int, int] | None:
    """(height, width) of about the same shape: the official one at 480p, or half the area where it is small already."""
    ratio = request.width / request.height
    if request.area > 1.05 * SMALLER and 1.6 < max(ratio, 1 / ratio) < 1.9:
        return (480, 832) if ratio > 1 else (832, 480)
    scale = ((SMALLER if request.area > 1.05 * SMALLER else request.area / 2) / request.area) ** 0.5
    height, width = (max(32, round(side * scale / 16) * 16) for side in (request.height, request.width))
    return (height, width) if height * width < request.area else None


def fewer_frames(request: Request) -> int | None:
    """About half as many, of the form 4n + 1."""
    frames = (request.frames // 2 - 1) // 4 * 4 + 1
    return frames if 1 <= frames < request.frames else None
