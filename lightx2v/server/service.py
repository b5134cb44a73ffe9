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
from .file_names import Names, file_name
from .input_images import Pictures

HISTORY = 1000
"""How far back lists go."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Lora:
    """A file in the server's LoRA folder, for the expert of this name; without one the file's name decides."""

    file: str
    expert: str | None = None
    strength: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Wish:
    """One video as a client asks for it. Pictures are uploaded bytes, or text that says where they are; `seconds` is
    its length where no number of frames is among the `settings`."""

    prompt: str
    negative_prompt: str = ""
    preset: str = ""
    image: bytes | str | None = None
    last_frame: bytes | str | None = None
    seconds: float | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    loras: Sequence[Lora] = ()
    client_id: str | None = None
    name: str = ""


class Service:
    """`presets` are on offer by name, the first is the default. `check` may refuse a request."""

    def __init__(
        self,
        jobs: JobManager,
        presets: Mapping[str, Resolved],
        *,
        pictures: Pictures | None = None,
        lora_dir: Path | None = None,
        check: Callable[[Request], None] | None = None,
    ) -> None:
        self.jobs, self.presets = jobs, presets
        self.default = next(iter(presets))
        self.names = Names(jobs.folder)
        self._pictures = pictures or Pictures()
        self._lora_dir = lora_dir
        self._check = check

    def submit(self, owner: str, wish: Wish) -> Job:
        """Queues a video. BadRequest, ConfigError, or Busy where the queue is full."""
        name = file_name(wish.name) if wish.name else ""
        preset = self._preset(wish)
        request, config = self._request(owner, preset, wish)
        if self._known(owner, wish.client_id) is None:
            self.jobs.check_room()  # before pictures are fetched
        with tempfile.TemporaryDirectory(prefix="lightx2v-") as folder:
            request = self._with_pictures(request, wish, Path(folder))
            if self._check is not None:
                self._check(request)
            job = self.jobs.submit(config, request, owner=owner, preset=preset, client_id=wish.client_id)
        if name:
            self.names.keep(job.id, name)
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
        return job.path, self.names.of(job.id)

    def named(self, owner: str, name: str) -> tuple[Path, str]:
        """The newest video of this name."""
        jobs = self.jobs.list(owner, limit=HISTORY, states=("succeeded",))
        id = self.names.find(name.removeprefix("./"), (job.id for job in jobs))
        if id is None:
            raise UnknownJob("There is no video of this name.")
        return self.video(owner, id)

    # ---- inside -------------------------------------------------------------------------------------------------

    def _preset(self, wish: Wish) -> str:
        """The one that was named, or the first that fits what is shown."""
        if wish.preset:
            if wish.preset not in self.presets:
                raise BadRequest(f"There is no model {wish.preset[:60]!r} here. There is: {', '.join(self.presets)}.")
            return wish.preset
        shown = bool(wish.image)
        fits = [name for name, preset in self.presets.items() if (preset.engine.task != "t2v") == shown]
        return self.default if self.default in fits or not fits else fits[0]

    def _request(self, owner: str, preset: str, wish: Wish) -> tuple[Request, EngineConfig]:
        """The request but for its pictures, which stand-ins hold the place of until everything else is right."""
        base = self.presets[preset]
        settings = dict(wish.settings)
        if wish.seconds is not None and "num_frames" not in settings:
            length = wish.seconds * settings.get("fps", base.request["fps"])
            if math.isfinite(length):  # else fps is refused, whatever the length
                settings["num_frames"] = max(1, round((length - 1) / 4) * 4 + 1)
        if settings.get("seed", -1) == -1:
            known = self._known(owner, wish.client_id)
            settings["seed"] = secrets.randbelow(MAX_SEED + 1) if known is None else known.request.seed
        if wish.loras:
            settings["loras"] = [*base.engine.lora_configs, *self._loras(wish.loras)]
        resolved = resolve({**base.engine.to_json(), **base.request}, settings) if settings else base
        shown: dict[str, Any] = {"prompt": wish.prompt, "negative_prompt": wish.negative_prompt}
        shown |= {key: "picture" for key, given in _pictures(wish) if given}
        fields = dict(resolved.request)
        if base.engine.task != "t2v":
            fields["task"] = "flf2v" if wish.last_frame else "i2v"
        request = Request(**fields, **shown)
        base.engine.check_request(request)
        return request, base.engine

    def _with_pictures(self, request: Request, wish: Wish, folder: Path) -> Request:
        own: dict[str, str] = {}
        for key, given in _pictures(wish):
            if given:
                file = folder / key
                file.write_bytes(given if isinstance(given, bytes) else self._pictures.read(given))
                own[key] = str(file)
        return Request.from_json(request.to_json() | own) if own else request

    def _loras(self, wishes: Sequence[Lora]) -> list[LoraSpec]:
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


def _pictures(wish: Wish) -> tuple[tuple[str, bytes | str | None], ...]:
    return ("image_path", wish.image), ("last_frame_path", wish.last_frame)
