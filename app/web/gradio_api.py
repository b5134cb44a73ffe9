"""Four endpoints for gradio_client, MCP and scripts: generate, status, cancel, presets. All other events are private.

A job's id is the permission to see and cancel it; nothing lists jobs.
"""

import os
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import UnionType
from typing import Any

import gradio as gr

from lightx2v.config.presets import resolve
from lightx2v.config.request import Request
from lightx2v.config.request_settings import SETTINGS
from lightx2v.errors import BadRequest, LightX2VError, quoted
from lightx2v.jobs.store import Job

from ..backend.studio import Studio, existing
from ..form.editor import stand_in

KEYS = tuple(name for name in SETTINGS if name != "seed")
"""Keys of the argument `settings`: the seed is an argument of its own."""

REPORTED = (
    "seed", "height", "width", "frames", "fps", "sampler", "file_bytes", "device", "attention", "timings", "warnings",
)  # fmt: skip
"""The parts of a report that leave the machine: no paths, no configuration."""


PROGRESS = ("stage", "step", "total", "expert", "seconds", "eta")


def add_endpoints(studio: Studio) -> None:
    """Adds the endpoints to the Blocks that are being built."""
    endpoints = Endpoints(studio)
    for endpoint in (endpoints.generate, endpoints.status, endpoints.cancel, endpoints.presets):
        gr.api(endpoint, api_name=endpoint.__name__, queue=False)


class Endpoints:
    """The methods are the endpoints; MCP clients read their docstrings."""

    def __init__(self, studio: Studio) -> None:
        self._studio = studio

    def generate(
        self, prompt: str, preset: str = "", image: dict | None = None, negative_prompt: str = "", seed: int = -1,
        settings: dict | None = None,
    ) -> dict:  # fmt: skip
        """Queues a video and returns at once with the id to ask `status` for.

        Args:
            prompt: The scene, its motion and the camera's motion.
            preset: A name from `presets`; empty for the page's default.
            image: The first frame for an image-to-video preset, as gradio_client's handle_file gives it.
            negative_prompt: What should not appear; empty for the model's default.
            seed: -1 draws one.
            settings: Settings that override the preset's, by the names that `presets` lists.
        """
        studio = self._studio
        with _public_errors():
            _check_types(prompt=(prompt, str), preset=(preset, str), negative_prompt=(negative_prompt, str))
            _check_types(settings=(settings, dict | None), image=(image, dict | None))
            name = preset or studio.default_preset
            if name not in studio.tasks:
                raise BadRequest(f"There is no preset {name[:60]!r}. Ask `presets` for their names.")
            if studio.exposure.zerogpu:
                raise BadRequest(
                    "On ZeroGPU only the page can borrow the GPU, so this endpoint makes no video. Open the page."
                )
            changed = dict(settings or {})
            if unknown := sorted(changed.keys() - KEYS):
                raise BadRequest(f"settings has no {str(unknown[0])[:60]!r}. It has: {', '.join(KEYS)}.")
            resolved = resolve(studio.offer.content(name), changed)
            own = {"prompt": prompt, "negative_prompt": negative_prompt, "image_path": _uploaded(image)}
            request = Request(**{**resolved.request, **own, "seed": seed})
            studio.exposure.limits.check(request)
            job = studio.submit(resolved.engine, request, owner=f"api-{secrets.token_hex(16)}", preset=name)
            return _answer(studio, job)

    def status(self, id: str) -> dict:
        """Where a job is: queued, running, succeeded, failed, cancelled or interrupted; with progress, times and video.

        Args:
            id: The id that `generate` returned.
        """
        with _public_errors():
            _check_types(id=(id, str))
            return _answer(self._studio, self._studio.jobs.get(id))

    def cancel(self, id: str) -> dict:
        """Stops a running job within one step, and a queued one at once.

        Args:
            id: The id that `generate` returned.
        """
        with _public_errors():
            _check_types(id=(id, str))
            return _answer(self._studio, self._studio.jobs.cancel(id))

    def presets(self) -> list[dict]:
        """The presets on offer: name, task, description, and the settings that they start from."""
        return [
            {
                **{key: getattr(info, key) for key in ("name", "task", "title", "summary")},
                "default": info.name == self._studio.default_preset,
                "settings": {key: settings[key] for key in KEYS},
            }
            for info in self._studio.presets
            for settings in [stand_in(self._studio.settings(info.name).request).to_json()]
        ]


@contextmanager
def _public_errors() -> Iterator[None]:
    """gradio passes on the errors that a caller can fix. All others stay in the log."""
    try:
        yield
    except LightX2VError as error:
        raise gr.Error(str(error), print_exception=False) from None


def _check_types(**values: tuple[Any, type | UnionType]) -> None:
    """gradio passes on whatever JSON a caller has sent."""
    for name, (value, kind) in values.items():
        if not isinstance(value, kind):
            raise BadRequest(f"{name} is {quoted(value)}; expected {'a text' if kind is str else 'an object'}.")


def _answer(studio: Studio, job: Job) -> dict[str, Any]:
    event = job.progress
    answer: dict[str, Any] = {
        "id": job.id,
        "state": job.state,
        "position": job.position,
        "starts_in": job.starts_in,
        "predicted_seconds": prediction.seconds if (prediction := studio.prediction_of(job.id)) else None,
        "progress": {name: getattr(event, name) for name in PROGRESS} if event is not None else None,
        "error": job.error,
        "video": None,
        "report": None,
    }
    if job.state == "succeeded" and job.result is not None:
        answer["video"] = f"studio/{job.id}/video.mp4"
        answer["report"] = {name: job.result[name] for name in REPORTED if name in job.result}
    return answer


def _uploaded(image: Mapping[str, Any] | None) -> str | None:
    """The path of a file that was uploaded to this page. Every other path is refused, whether it exists or not."""
    if image is None:
        return None
    path = image.get("path")
    file = existing(path, Path(os.environ["GRADIO_TEMP_DIR"])) if isinstance(path, str) else None
    if file is None:
        raise BadRequest("image is not an uploaded file. With gradio_client, pass handle_file(path).")
    return str(file)
