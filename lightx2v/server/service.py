"""Service: turns a client's VideoRequest into a job, and finds the jobs and videos that belong to a client.

The settings of a request override those of its preset for this video only. Keys may be ours or LightX2V's
(`config.resolve` knows both), and errors name the key that the client used.
"""

import contextlib
import hmac
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ..catalog.catalog import Catalog, FoundLora
from ..catalog.scan import memory_file, scan
from ..config.engine_config import EngineConfig
from ..config.lora_spec import LoraSpec
from ..config.presets import Resolved, resolve
from ..config.request import Request
from ..errors import BadRequest
from ..jobs.queue import JobManager
from ..jobs.store import Job, UnknownJob
from ..media.video_stills import Still, still
from ..media.video_writer import original_path
from ..media.work_folder import WorkFolder
from .file_names import FileNames, file_name
from .input_images import InputImages

HISTORY = 1000
"""The number of jobs in a list."""


@dataclass(frozen=True, slots=True, kw_only=True)
class VideoRequest:
    """One video that a client asks for. Images are uploaded bytes, or text for InputImages. `seconds` is the length of
    the video unless the `settings` have a number of frames. `loras` are in LoraSpec's JSON, with the name of a file in
    the server's LoRA folder as path."""

    prompt: str
    negative_prompt: str = ""
    preset: str = ""
    image: bytes | str | None = None
    last_frame: bytes | str | None = None
    seconds: float | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    loras: Sequence[Mapping[str, Any]] = ()
    client_id: str | None = None
    name: str = ""


class Service:
    """`presets` are those that clients may choose, by name; the first is the default. `check` may raise BadRequest."""

    def __init__(
        self,
        jobs: JobManager,
        presets: Mapping[str, Resolved],
        *,
        images: InputImages | None = None,
        lora_dir: Path | None = None,
        loras: Callable[[], Mapping[str, FoundLora]] = dict,
        check: Callable[[Request], None] | None = None,
    ) -> None:
        self.jobs, self.presets = jobs, presets
        self.default = next(iter(presets))
        self.file_names = FileNames(jobs.folder)
        self._images = images or InputImages()
        self._lora_dir, self._offered_loras = lora_dir, loras
        self._check = check

    def submit(self, owner: str, video: VideoRequest) -> Job:
        """Queue a video. Raises BadRequest, ConfigError, or Busy while the queue is full."""
        name = file_name(video.name) if video.name else ""
        preset = self._preset(video)
        request, config = self._request(owner, preset, video)
        self.jobs.check_room(owner, video.client_id)  # before downloading images
        # In the jobs' folder, where the next start removes what a killed process leaves.
        with contextlib.closing(WorkFolder(self.jobs.folder)) as work:
            request = self._with_images(request, video, work.path)
            if self._check is not None:
                self._check(request)
            job = self.jobs.submit(config, request, owner=owner, preset=preset, client_id=video.client_id)
        if name:
            self.file_names.keep(job.id, name)
        return job

    def remix(self, owner: str, id: str, prompt: str) -> Job:
        """Queue another video with the settings of a job, its seed and its images, and a new prompt."""
        job = self.job(owner, id)
        if not any(job.config == preset.engine for preset in self.presets.values()):
            raise BadRequest(
                f"This server no longer serves {job.preset!r}, the model of this job. "
                f"Submit a new job with one of: {', '.join(self.presets)}."
            )
        request = replace(job.request, prompt=prompt)
        if self._check is not None:
            self._check(request)
        return self.jobs.submit(job.config, request, owner=owner, preset=job.preset, source=job.id)

    def job(self, owner: str, id: str) -> Job:
        """The owner's job with this id or client_id. UnknownJob also for the jobs of others."""
        with contextlib.suppress(UnknownJob):
            job = self.jobs.get(id)
            if hmac.compare_digest(job.owner, owner):
                return job
        if (job := self._known(owner, id)) is None:
            raise UnknownJob("There is no job with this id. It may have been deleted.")
        return job

    def video(self, owner: str, id: str) -> tuple[Path, str]:
        """The file of a finished job's video, and its name for the client."""
        job = self.job(owner, id)
        if job.state != "succeeded" or job.path is None or not job.path.is_file():
            raise UnknownJob(f"This job has no video: it is {job.state}.")
        return job.path, self.file_names.of(job.id)

    def original(self, owner: str, id: str) -> tuple[Path, str]:
        """The same for the video without interpolation."""
        path, name = self.video(owner, id)
        if not (kept := original_path(path)).is_file():
            raise UnknownJob("The video without interpolation was not kept. Send keep_original with the next job.")
        return kept, f"{name.removesuffix('.mp4')}.original.mp4"

    def picture(self, owner: str, id: str, kind: Still) -> tuple[Path, str]:
        """The same for a JPEG of the video. It is made at the first call, which takes up to seconds."""
        path, name = self.video(owner, id)
        return still(path, kind), f"{name.removesuffix('.mp4')}.{kind}.jpg"

    def video_named(self, owner: str, name: str) -> tuple[Path, str]:
        """The newest video with this name."""
        jobs = self.jobs.list(owner, limit=HISTORY, states=("succeeded",))
        id = self.file_names.find(name.removeprefix("./"), (job.id for job in jobs))
        if id is None:
            raise UnknownJob("There is no video with this name.")
        return self.video(owner, id)

    def _preset(self, video: VideoRequest) -> str:
        """The named preset; without a name the first that fits the images."""
        if video.preset:
            if video.preset not in self.presets:
                raise BadRequest(f"There is no model {video.preset[:60]!r}. Choose from: {', '.join(self.presets)}.")
            return video.preset
        has_image = bool(video.image)
        fitting = [name for name, preset in self.presets.items() if (preset.engine.task != "t2v") == has_image]
        return self.default if self.default in fitting or not fitting else fitting[0]

    def _request(self, owner: str, preset: str, video: VideoRequest) -> tuple[Request, EngineConfig]:
        """The request with placeholders for its images, which are read after everything else has been checked."""
        base = self.presets[preset]
        settings = dict(video.settings)
        if video.seconds is not None and "num_frames" not in settings:
            length = video.seconds * settings.get("fps", base.request["fps"])
            if math.isfinite(length):  # else the check of fps fails, whatever the length
                settings["num_frames"] = max(1, round((length - 1) / 4) * 4 + 1)
        settings.setdefault("seed", -1)  # the queue draws one
        if video.loras:
            settings["loras"] = [*base.engine.lora_configs, *self._loras(video.loras)]
        resolved = resolve({**base.engine.to_json(), **base.request}, settings) if settings else base
        fields: dict[str, Any] = {**resolved.request, "prompt": video.prompt, "negative_prompt": video.negative_prompt}
        fields |= {key: "placeholder" for key, image in _images(video) if image}
        if base.engine.task != "t2v":
            fields["task"] = "flf2v" if video.last_frame else "i2v"
        request = Request(**fields)
        base.engine.check_request(request)
        return request, base.engine

    def _with_images(self, request: Request, video: VideoRequest, folder: Path) -> Request:
        """The request with its images as files in `folder`."""
        paths: dict[str, str] = {}
        for key, image in _images(video):
            if image:
                file = folder / key
                file.write_bytes(image if isinstance(image, bytes) else self._images.read(image))
                paths[key] = str(file)
        return Request.from_json(request.to_json() | paths) if paths else request

    def loras(self) -> dict[str, FoundLora]:
        """The LoRAs that requests may name: those in the server's folder, and those that are offered by name."""
        folder = [self._lora_dir] if self._lora_dir is not None and self._lora_dir.is_dir() else []
        return {**self._offered_loras(), **Catalog(scan(folder, memory_file())).loras}

    def _loras(self, loras: Sequence[Mapping[str, Any]]) -> list[LoraSpec]:
        offered = self.loras()
        if self._lora_dir is None and not offered:
            raise BadRequest(
                "LoRAs are disabled. Start the server with --lora_dir FOLDER or --offer NAME to enable them."
            )
        files = {file.name: file.path for found in offered.values() for file in found.files}
        folder, specs = self._lora_dir.resolve() if self._lora_dir else None, []
        for lora in loras:
            name = lora["path"]
            if name in offered and "name" not in lora:
                strength = lora.get("strength", 1.0)
                specs += [LoraSpec.from_json(p.to_json()) for p in offered[name].placed(strength, strength)]
                continue
            if name in files and (folder is None or not (folder / name).is_file()):
                specs.append(LoraSpec.from_json({**lora, "path": str(files[name])}))
                continue
            if folder is None:
                raise BadRequest(f"There is no LoRA {name[:80]!r} on this server. GET /v1/loras lists them.")
            is_name = Path(name).name == name and "\0" not in name
            path = (folder / name).resolve() if is_name else folder
            if not path.is_relative_to(folder) or not path.is_file():
                raise BadRequest(f"There is no LoRA {name[:80]!r} in the server's LoRA folder.")
            specs.append(LoraSpec.from_json({**lora, "path": str(path)}))
        return specs

    def _known(self, owner: str, client_id: str | None) -> Job | None:
        """The owner's job with this client_id, if there is one."""
        if client_id:
            with contextlib.suppress(BadRequest):  # UnknownJob among others: an invalid id has no job either
                return self.jobs.find(client_id, owner=owner)
        return None


def _images(video: VideoRequest) -> tuple[tuple[str, bytes | str | None], ...]:
    return ("image_path", video.image), ("last_frame_path", video.last_frame)
