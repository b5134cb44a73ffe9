"""Recovery of jobs from the videos in the folder, which carry their settings, where the list of jobs was lost; and the
removal of saved steps that no job needs."""

import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..config.engine_config import EngineConfig
from ..config.recorded_settings import PICTURES, find_picture
from ..config.request import Request
from ..errors import BadRequest, LightX2VError, short_path
from ..media.mp4 import probe, read_settings
from ..media.video_writer import original_path
from .files import JobFiles
from .store import JobStore, UnknownJob

log = logging.getLogger("lightx2v.jobs")

WARNING = "The list of jobs was lost: this one comes from the settings in its video, so its times are not known."


@dataclass(frozen=True, slots=True, kw_only=True)
class RecoveredJob:
    """What a video says of the job that made it. `report` has the fields of Result.report that are known."""

    id: str
    config: EngineConfig
    request: Request
    preset: str
    time: float
    report: dict[str, Any]


def recover_jobs(store: JobStore, files: JobFiles) -> None:
    """Add the jobs of all videos that the store does not know. They belong to no owner: the files do not name one."""
    for video in files.strays(store.ids()):
        try:
            job = recover(video)
        except BadRequest as error:
            log.warning("%s belongs to no job: %s", video.name, error)
            continue
        with store.transaction():
            store.add(job.id, job.config, job.request, owner="", preset=job.preset, client_id=None, time=job.time)
            store.finish(job.id, "succeeded", job.time, result=job.report)
        log.warning("The job of %s was recovered from its settings.", video.name)


def recover(video: Path) -> RecoveredJob:
    """The job that made `<id>.mp4`. BadRequest where the file does not say, or says it in another version's words."""
    settings, info = read_settings(video), probe(video)
    try:
        config, request = EngineConfig.from_json(settings["engine"]), Request.from_json(settings["request"])
        pictures = {name: str(path) for name in PICTURES if (path := _picture(settings, name, video))}
        request, preset = replace(request, **pictures), str(settings.get("preset") or "")
        stat = video.stat()
    except (LightX2VError, OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise BadRequest(f"The settings in {short_path(video, 1)} cannot be used: {error!s:.200}") from None
    report = {
        "path": video.name,
        "original_path": kept.name if (kept := original_path(video)).is_file() else None,
        "preset": preset,
        "seed": request.seed,
        "height": info.height,
        "width": info.width,
        "frames": info.frames,
        "fps": info.fps,
        "sampler": request.solver,
        "file_bytes": stat.st_size,
        "timings": {"seconds": {}, "steps": [], "experts": {}, "total": 0.0, "peak_vram": None, "peak_rss": 0},
        "warnings": [WARNING],
        "request": request.to_json(),
        "config": config.to_json(),
    }
    return RecoveredJob(id=video.stem, config=config, request=request, preset=preset, time=stat.st_mtime, report=report)


def remove_useless_steps(store: JobStore, files: JobFiles) -> None:
    """Remove the saved steps of jobs that had ended when the program was killed."""
    for id in files.with_steps():
        try:
            useless = store.job(id).state in ("succeeded", "cancelled")
        except UnknownJob:
            useless = True
        if useless:
            files.steps(id).remove()


def _picture(settings: dict[str, Any], name: str, video: Path) -> Path | None:
    return find_picture(settings, name, video) if settings["request"].get(name) else None
