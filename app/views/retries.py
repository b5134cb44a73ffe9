"""Retry options: a failed run with changed settings, by the button for each."""

from collections.abc import Mapping
from dataclasses import replace

from lightx2v.config.engine_config import EngineConfig
from lightx2v.config.request import Request
from lightx2v.jobs.store import Job

from ..strings import Words

SMALLER = 480 * 832


def retry_options(job: Job | None, *, offload: bool) -> dict[str, tuple[EngineConfig, Request]]:
    """{act: what its button runs} for a run that did not succeed, the most promising first.

    `offload` says whether visitors may change that setting here.
    """
    if job is None or job.state in ("queued", "running", "succeeded"):
        return {}
    config, request = job.config, job.request
    options: dict[str, tuple[EngineConfig, Request]] = {}
    if job.error is not None and job.error["type"] == "OutOfMemory":
        if offload and config.cpu_offload is not True:
            options["retry_offload"] = replace(config, cpu_offload=True), request
        if (size := smaller_size(request)) is not None:
            options["retry_smaller"] = config, replace(request, height=size[0], width=size[1])
        if (frames := fewer_frames(request)) is not None:
            options["retry_shorter"] = config, replace(request, frames=frames)
    return options | {"retry": (config, request)}


def retry_labels(words: Words, options: Mapping[str, tuple[EngineConfig, Request]]) -> dict[str, str]:
    return {act: words(act, size=f"{run.width} × {run.height}", n=run.frames) for act, (_, run) in options.items()}


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
