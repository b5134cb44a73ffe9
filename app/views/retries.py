"""Retry options: buttons for a failed run, and the changed settings that each of them runs."""

from __future__ import annotations

from dataclasses import replace

from lightx2v.config.engine_config import EngineConfig
from lightx2v.config.request import Request
from lightx2v.jobs.store import Job

from ..strings import Words

SMALLER = 480 * 832


def retry_options(words: Words, job: Job | None, *, offload: bool) -> dict[str, str]:
    """{act: label} of the buttons for a run that did not succeed, the most promising first.

    `offload` says whether visitors may change that setting here.
    """
    if job is None or job.state in ("queued", "running", "succeeded"):
        return {}
    options: dict[str, str] = {}
    if job.error is not None and job.error["type"] == "OutOfMemory":
        if offload and job.config.cpu_offload is not True:
            options["retry_offload"] = words("retry_offload")
        if (size := smaller_size(job.request)) is not None:
            options["retry_smaller"] = words("retry_smaller", size=f"{size[1]} × {size[0]}")
        if (frames := fewer_frames(job.request)) is not None:
            options["retry_shorter"] = words("retry_shorter", n=frames)
    return options | {"retry": words("retry")}


def apply_retry(act: str, job: Job) -> tuple[EngineConfig, Request] | None:
    """Engine and request with the change that `act` stands for; None for an unknown or impossible one."""
    if act == "retry_offload":
        return replace(job.config, cpu_offload=True), job.request
    if act == "retry_smaller" and (size := smaller_size(job.request)) is not None:
        return job.config, replace(job.request, height=size[0], width=size[1])
    if act == "retry_shorter" and (frames := fewer_frames(job.request)) is not None:
        return job.config, replace(job.request, frames=frames)
    return (job.config, job.request) if act == "retry" else None


def smaller_size(request: Request) -> tuple[int, int] | None:
    """(height, width) of about the same shape: the official 480p one, or half the area of a video that is small."""
    ratio = request.width / request.height
    large = request.area > 1.05 * SMALLER
    if large and 1.6 < max(ratio, 1 / ratio) < 1.9:
        return (480, 832) if ratio > 1 else (832, 480)
    scale = ((SMALLER if large else request.area / 2) / request.area) ** 0.5
    height, width = (max(32, round(side * scale / 16) * 16) for side in (request.height, request.width))
    return (height, width) if height * width < request.area else None


def fewer_frames(request: Request) -> int | None:
    """About half as many frames, of the form 4n + 1."""
    frames = (request.frames // 2 - 1) // 4 * 4 + 1
    return frames if 1 <= frames < request.frames else None
