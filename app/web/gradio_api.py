"""Four endpoints for gradio_client, MCP and scripts: generate, status, cancel, presets. All other events are private.

A job's id is the permission to see and cancel it; nothing lists jobs.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gradio as gr

from lightx2v.config.presets import resolve
from lightx2v.config.request import Request
from lightx2v.errors import BadRequest, LightX2VError
from lightx2v.jobs.store import Job

from ..backend.studio import Studio, settings_of
from ..form.fields import new_seed

SETTINGS = (
    *("height", "width", "frames", "fps", "steps", "shift", "guidance", "enable_cfg", "boundary", "resize_mode"),
    *("denoising_step_list", "boundary_step_index"),
)
"""Keys of `settings`: the fields of Request beside those that are arguments."""

REPORTED = ("seed", "height", "width", "frames", "fps", "file_bytes", "device", "attention", "timings", "warnings")
"""What of a report leaves the machine: no paths, no configuration."""


def add_endpoints(studio: Studio) -> None:
    """To be called inside the Blocks."""

    def generate(
        prompt: str,
        preset: str = "",
        image: dict | None = None,
        negative_prompt: str = "",
        seed: int = -1,
        settings: dict | None = None,
    ) -> dict:
        """Queues a video and returns at once with the id to ask `status` for.

        Args:
            prompt: What is seen, what moves, how the camera moves.
            preset: A name from `presets`; the page's default without one.
            image: The first frame for an image-to-video preset, as gradio_client's handle_file gives it.
            negative_prompt: What should not appear; empty for the model's own.
            seed: -1 draws one.
            settings: More settings over the preset's: height, width, frames, fps, steps, shift, guidance,
                enable_cfg, boundary, resize_mode, denoising_step_list, boundary_step_index.
        """
        with _told():
            name = preset or studio.default_preset
            if name not in studio.tasks:
                raise BadRequest(f"There is no preset {name[:60]!r}. Ask `presets` for their names.")
            if studio.exposure.zerogpu:
                raise BadRequest("On ZeroGPU a video is made inside its visitor's own request. Open the page for it.")
            changed = dict(settings or {})
            if unknown := sorted(set(changed) - set(SETTINGS)):
                raise BadRequest(f"settings has no {str(unknown[0])[:60]!r}. It has: {', '.join(SETTINGS)}.")
            resolved = resolve(name, changed)
            request = Request(
                prompt=prompt,
                **{
                    **resolved.request,
                    "negative_prompt": negative_prompt,
                    "seed": new_seed() if seed == -1 else seed,
                    "image_path": _uploaded(image),
                },
            )
            studio.exposure.limits.check(request)
            job = studio.submit(resolved.engine, request, owner=f"api-{secrets.token_hex(16)}", preset=name)
            return _answer(studio, job)

    def status(id: str) -> dict:
        """Where a job is: queued, running, succeeded, failed, cancelled or interrupted; with progress, times and video.

        Args:
            id: What `generate` returned.
        """
        with _told():
            return _answer(studio, studio.jobs.get(id))

    def cancel(id: str) -> dict:
        """Stops a job within one step; a queued one at once.

        Args:
            id: What `generate` returned.
        """
        with _told():
            return _answer(studio, studio.jobs.cancel(id))

    def presets() -> list[dict]:
        """The presets on offer: name, task, what they are, and the settings they start from."""
        return [
            {
                "name": info.name,
                "task": info.task,
                "title": info.title,
                "summary": info.summary,
                "default": info.name == studio.default_preset,
                "settings": {key: settings_of(info.name).request[key] for key in SETTINGS},
            }
            for info in studio.presets
        ]

    for endpoint in (generate, status, cancel, presets):
        gr.api(endpoint, api_name=endpoint.__name__, queue=False)


@contextmanager
def _told() -> Iterator[None]:
    """Errors that a caller can mend are passed on by gradio; all others stay inside."""
    try:
        yield
    except LightX2VError as error:
        raise gr.Error(str(error), print_exception=False) from None


def _answer(studio: Studio, job: Job) -> dict[str, Any]:
    event = job.progress
    answer: dict[str, Any] = {
        "id": job.id,
        "state": job.state,
        "position": job.position,
        "starts_in": job.starts_in,
        "predicted_seconds": prediction.seconds if (prediction := studio.prediction_of(job.id)) else None,
        "progress": None,
        "error": job.error,
        "video": None,
        "report": None,
    }
    if event is not None:
        names = ("stage", "step", "total", "expert", "seconds", "eta")
        answer["progress"] = {name: getattr(event, name) for name in names}
    if job.state == "succeeded" and job.result is not None:
        answer["video"] = f"studio/{job.id}/video.mp4"
        answer["report"] = {name: job.result[name] for name in REPORTED if name in job.result}
    return answer


def _uploaded(image: Mapping[str, Any] | None) -> str | None:
    """The path of a file that was uploaded to this page. Any other path is refused, whether it exists or not."""
    if image is None:
        return None
    folder = Path(os.environ["GRADIO_TEMP_DIR"]).resolve()
    path = image.get("path")
    if isinstance(path, str) and "\0" not in path:
        resolved = Path(path).resolve()
        if resolved.is_relative_to(folder) and resolved.is_file():
            return str(resolved)
    raise BadRequest("image is not an uploaded file. With gradio_client, pass handle_file(path).")
