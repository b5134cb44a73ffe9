"""From what a client asked for to a job, and back to the jobs that are the client's own.

Settings of a request lie over those of a preset for this one video; nothing of it stays. Keys may be ours or LightX2V's
(config.resolve knows both), and errors name the key that was used.
"""

from __future__ import annotations

import contextlib
import hmac
import math
import secrets
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..config.engine_config import EngineConfig
from ..config.presets import Resolved, resolve
from ..config.request import MAX_SEED, LoraSpec, Request
from ..errors import BadRequest
from ..jobs.queue import JobManager
from ..jobs.store import Job, UnknownJob
from .file_names import FileNames, file_name
from .input_images import InputImages

HISTORY = 1000
"""How far back lists go."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraChoice:
    """A file in the server's LoRA folder, for the expert of this name; without one the file's name decides."""

    file: str
    expert: str | None = None
    strength: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class VideoRequest:
    """One video as a client asks for it. Pictures are uploaded bytes, or text that says where they are; `seconds` is
    its length where no number of frames is among the `settings`."""

    prompt: str
    negative_prompt: str = ""
    preset: str = ""
    image: bytes | str | None = None
    last_frame: bytes | str | None = None
    seconds: float | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    loras: Sequence[LoraChoice] = ()
    client_id: str | None = None
    name: str = ""


class Service:
    """`presets` are on offer by name, the first is the default. `check` may error_response a request."""

    def __init__(
        self,
        jobs: JobManager,
        presets: Mapping[str, Resolved],
        *,
        images: InputImages | None = None,
        lora_dir: Path | None = None,
        check: Callable[[Request], None] | None = None,
    ) -> None:
        self.jobs, self.presets = jobs, presets
        self.default = next(iter(presets))
        self.file_names = FileNames(jobs.folder)
        self._images = images or InputImages()
        self._lora_dir = lora_dir
        self._check = check

    def submit(self, owner: str, video: VideoRequest) -> Job:
        """Queues a video. BadRequest, ConfigError, or Busy where the queue is full."""
        name = file_name(video.name) if video.name else ""
        preset = self._preset(video)
        request, config = self._request(owner, preset, video)
        if self._known(owner, video.client_id) is None:
            self.jobs.check_room()  # before pictures are fetched
        with tempfile.TemporaryDirectory(prefix="lightx2v-") as folder:
            request = self._with_images(request, video, Path(folder))
            if self._check is not None:
                self._check(request)
            job = self.jobs.submit(config, request, owner=owner, preset=preset, client_id=video.client_id)
        if name:
            self.file_names.keep(job.id, name)
        return job

    def job(self, owner: str, id: str) -> Job:
        """The owner's job of this id, or submitted under it. Of others' jobs not even the existence is told."""
        with contextlib.suppress(UnknownJob):
            job = self.jobs.get(id)
            if hmac.compare_digest(job.owner, owner):
                return job
        found = self._known(owner, id)
        if found is None:
            raise UnknownJob("There is no job of this id. It may have been deleted.")
        return found

    def video(self, owner: str, id: str) -> tuple[Path, str]:
        """A finished job's file and the name it leaves under."""
        job = self.job(owner, id)
        if job.state != "succeeded" or job.path is None or not job.path.is_file():
            raise UnknownJob(f"This job has no video: it is {job.state}.")
        return job.path, self.file_names.of(job.id)

    def video_named(self, owner: str, name: str) -> tuple[Path, str]:
        """The newest video of this name."""
        jobs = self.jobs.list(owner, limit=HISTORY, states=("succeeded",))
        id = self.file_names.find(name.removeprefix("./"), (job.id for job in jobs))
        if id is None:
            raise UnknownJob("There is no video of this name.")
        return self.video(owner, id)

    # ---- inside -------------------------------------------------------------------------------------------------

    def _preset(self, video: VideoRequest) -> str:
        """The one that was named, or the first that fits what is shown."""
        if video.preset:
            if video.preset not in self.presets:
                raise BadRequest(f"There is no model {video.preset[:60]!r} here. There is: {', '.join(self.presets)}.")
            return video.preset
        shown = bool(video.image)
        fits = [name for name, preset in self.presets.items() if (preset.engine.task != "t2v") == shown]
        return self.default if self.default in fits or not fits else fits[0]

    def _request(self, owner: str, preset: str, video: VideoRequest) -> tuple[Request, EngineConfig]:
        """The request but for its pictures, which stand-ins hold the place of until everything else is right."""
        base = self.presets[preset]
        settings = dict(video.settings)
        if video.seconds is not None and "num_frames" not in settings:
            length = video.seconds * settings.get("fps", base.request["fps"])
            if math.isfinite(length):  # else fps is refused, whatever the length
                settings["num_frames"] = max(1, round((length - 1) / 4) * 4 + 1)
        if settings.get("seed", -1) == -1:
            known = self._known(owner, video.client_id)
            settings["seed"] = secrets.randbelow(MAX_SEED + 1) if known is None else known.request.seed
        if video.loras:
            settings["loras"] = [*base.engine.lora_configs, *self._loras(video.loras)]
        resolved = resolve({**base.engine.to_json(), **base.request}, settings) if settings else base
        shown: dict[str, Any] = {"prompt": video.prompt, "negative_prompt": video.negative_prompt}
        shown |= {key: "picture" for key, given in _images(video) if given}
        fields = dict(resolved.request)
        if base.engine.task != "t2v":
            fields["task"] = "flf2v" if video.last_frame else "i2v"
        request = Request(**fields, **shown)
        base.engine.check_request(request)
        return request, base.engine

    def _with_images(self, request: Request, video: VideoRequest, folder: Path) -> Request:
        own: dict[str, str] = {}
        for key, given in _images(video):
            if given:
                file = folder / key
                file.write_bytes(given if isinstance(given, bytes) else self._images.read(given))
                own[key] = str(file)
        return Request.from_json(request.to_json() | own) if own else request

    def _loras(self, wishes: Sequence[LoraChoice]) -> list[LoraSpec]:
        if self._lora_dir is None:
            raise BadRequest("This server takes no LoRAs. Start it with --lora_dir FOLDER to offer those inside.")
        folder, specs = self._lora_dir.resolve(), []
        for wish in wishes:
            plain = Path(wish.file).name == wish.file and "\0" not in wish.file
            path = (folder / wish.file).resolve() if plain else folder
            if not path.is_relative_to(folder) or not path.is_file():
                raise BadRequest(f"There is no LoRA {wish.file[:80]!r} in the server's LoRA folder.")
            spec = {"path": str(path), "strength": wish.strength}
            specs.append(LoraSpec.from_json(spec | ({"name": wish.expert} if wish.expert else {})))
        return specs

    def _known(self, owner: str, client_id: str | None) -> Job | None:
        if not client_id or not client_id.isascii() or not client_id.isprintable() or len(client_id) > 200:
            return None
        with contextlib.suppress(UnknownJob):
            return self.jobs.find(client_id, owner=owner)
        return None


def _images(video: VideoRequest) -> tuple[tuple[str, bytes | str | None], ...]:
    return ("image_path", video.image), ("last_frame_path", video.last_frame)
