"""Studio: the job manager, presets, predictions and files behind the page. No gradio here, and no torch.

One Studio serves all visitors. To list, see or change a visitor's runs the caller passes their `owner`, a secret that
their browser keeps.
"""

import contextlib
import logging
import os
import re
import secrets
import time
from collections import OrderedDict
from collections.abc import Container, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from lightx2v.catalog.live_catalog import LiveCatalog
from lightx2v.config.engine_config import EngineConfig
from lightx2v.config.model_paths import PROJECT, RIFE
from lightx2v.config.presets import VARIANTS, PresetInfo, Resolved
from lightx2v.config.request import Request
from lightx2v.cost.machine import MachineReader
from lightx2v.cost.memory_forecast import forecast
from lightx2v.cost.model_size import shape_of
from lightx2v.cost.run_time import Prediction, estimate_cost
from lightx2v.errors import BadRequest, ConfigError, LightX2VError
from lightx2v.hub import find
from lightx2v.jobs.engine_slot import OpenEngine
from lightx2v.jobs.pool import WorkerState
from lightx2v.jobs.queries import ALL
from lightx2v.jobs.queue import JobManager
from lightx2v.jobs.replica import LoadedModel, Outcome
from lightx2v.jobs.run_times import RunTimes
from lightx2v.jobs.store import Job, UnknownJob
from lightx2v.media.images import DECODE_LOCK, jpeg, load_image
from lightx2v.media.video_stills import still
from lightx2v.media.video_writer import original_path
from lightx2v.progress import CancelToken
from lightx2v.step_file import SAVE_EVERY

from ..exposure import ADDRESS, Exposure
from .model_files import HubFiles
from .offer import Offer
from .zerogpu import LendGpu, ZeroGpuJobs

log = logging.getLogger("lightx2v.page")

SAMPLE = PROJECT / "assets" / "samples" / "idle.mp4"
THUMBNAIL_SIDE = 128
HISTORY = 60
UNDO_SECONDS = 300.0
"""A deleted run can be brought back for so long."""
JOB_ID = re.compile(r"[A-Za-z0-9_-]{16,64}")


class Studio:
    """Everything that the page's events work with. `only`, if given, limits the presets on offer.

    Without `open_engine` the jobs run on replicas that come with `jobs.add_replica`. Runs save their step at most once
    in `save_every` seconds. `lend_gpu` is `spaces.GPU` on ZeroGPU, where the default preset's engine is loaded at once
    and no other later.
    """

    def __init__(
        self,
        open_engine: OpenEngine | None,
        folder: Path,
        exposure: Exposure,
        *,
        files: HubFiles | None = None,
        default_preset: str = "",
        only: Container[str] | None = None,
        lend_gpu: LendGpu | None = None,
        catalog: LiveCatalog | None = None,
        save_every: float = SAVE_EVERY,
    ) -> None:
        self.exposure = exposure
        self.address = ADDRESS
        self.folder = folder.absolute()
        self.folder.mkdir(parents=True, exist_ok=True)
        self.machine = MachineReader()
        self.files = files or HubFiles()
        self._room_at_start = self.machine().vram_free or 0
        self._times = RunTimes(self.folder / "rates.json")
        self._uploads: OrderedDict[str, Path] = OrderedDict()
        self._predicted: OrderedDict[str, Prediction] = OrderedDict()
        self._trash: dict[str, tuple[Job, float]] = {}
        """Deleted runs, and when their files go."""
        self.offer = Offer(catalog, only=only, private=exposure.shows_paths)
        if default_preset and default_preset not in self.tasks and only is None:
            self.offer.catalog.wait()  # it may be the name of a found model
        if not self.presets or default_preset and default_preset not in self.tasks:
            names = ", ".join(info.name for info in self.offer.shipped)
            raise ConfigError(f"There is no preset {default_preset!r} for the page. Presets: {names}.")
        self.default_preset = default_preset or self._choose_default()
        self.jobs = self._open_jobs(open_engine, lend_gpu, save_every)

    # ---- presets ------------------------------------------------------------------------------------------------

    @property
    def presets(self) -> list[PresetInfo]:
        return self.offer.presets

    @property
    def tasks(self) -> dict[str, str]:
        """{preset: task} of the presets on offer."""
        return self.offer.tasks

    def settings(self, preset: str) -> Resolved:
        """The settings of an offered preset."""
        return self.offer.settings(preset)

    def width_of(self, preset: str) -> int:
        """The channels of an offered preset's model."""
        return shape_of(self.settings(preset).engine).dim

    def for_task(self, task: str) -> list[PresetInfo]:
        return [info for info in self.presets if info.task == task]

    def default_for(self, task: str, like: str = "") -> str:
        """The preset of `task` most like the one named `like`: demo or not, and of the same variant."""
        wanted = next((info for info in self.presets if info.name == (like or self.default_preset)), None)
        offered = self.for_task(task)
        if wanted is None or not offered:
            return self.default_preset
        demo, variant, name = wanted.demo, wanted.variant, wanted.name[3:]
        return max(offered, key=lambda it: (it.demo == demo, it.variant == variant, it.name[3:] == name)).name

    def _choose_default(self) -> str:
        """On a machine with a GPU the first real preset whose files are here; else the four-step demo."""
        if self.machine().gpu:
            for info in sorted(self.presets, key=lambda info: -VARIANTS.index(info.variant)):
                if not info.demo and self.files.status(self.settings(info.name).engine).ready:
                    return info.name
        demos = [info.name for info in self.presets if info.demo and info.task == "t2v"]
        return next((name for name in demos if "distill_lora" in name), demos[0] if demos else self.presets[0].name)

    # ---- predictions --------------------------------------------------------------------------------------------

    def predict(self, config: EngineConfig, request: Request) -> Prediction | None:
        """How long this run will take, with loading unless its engine will be in memory by then."""
        return self._times.predict(config, request, device=self._device, loaded=self._will_be_loaded(config))

    def not_predicted(self, config: EngineConfig, request: Request, prediction: Prediction) -> list[str]:
        """Which of the stages "load" and "image" this run will have although their time is still unknown."""
        image = "image" in estimate_cost(request, shape_of(config)).calls
        stages = {"load": not self._will_be_loaded(config), "image": image}
        return [stage for stage, present in stages.items() if present and stage not in prediction.stages]

    def _will_be_loaded(self, config: EngineConfig) -> bool:
        """Whether this engine will be in memory, somewhere, once every queued job has run."""
        several = len(self._places) > 1
        before = self.jobs.list(states=("queued", "running"), limit=ALL if several else 1)
        configs = [job.config for job in before]
        if several or not configs:
            configs += [model.config for _, model in self._places if model is not None]
        return config in configs

    @property
    def _places(self) -> Sequence[tuple[str, LoadedModel | None]]:
        """The device and the loaded model of each worker."""
        jobs = self.jobs
        return jobs.places() if isinstance(jobs, JobManager) else [(self.machine().name, jobs.loaded)]

    @property
    def _device(self) -> str:
        """Where a run is predicted for: the device of the first worker, or this machine's before there is one."""
        return next((device for device, _ in self._places), self.machine().name)

    @property
    def workers(self) -> list[WorkerState] | None:
        """The workers where jobs run on several, or elsewhere; None where they run in this process."""
        jobs = self.jobs
        return jobs.workers() if isinstance(jobs, JobManager) and jobs.is_farm else None

    @property
    def room(self) -> int | None:
        """Bytes of VRAM that a run may use: free memory plus our own loaded model's; None without a GPU."""
        machine = self.machine()
        if machine.vram_free is None or self.jobs.loaded is None:
            return machine.vram_free
        return max(machine.vram_free, self._room_at_start)

    def memory_need(self, config: EngineConfig, request: Request) -> int | None:
        """Peak VRAM of the run in bytes; None without a GPU."""
        room = self.room
        if room is None:
            return None
        return max(forecast(config, request, vram=room, ram=self.machine().ram_free).plan.bytes.values())

    def prediction_of(self, job_id: str) -> Prediction | None:
        """The prediction made when the job was submitted or edited; None if nothing was measured before."""
        return self._predicted.get(job_id)

    # ---- engines ------------------------------------------------------------------------------------------------

    def _open_jobs(
        self, open_engine: OpenEngine | None, lend_gpu: LendGpu | None, save_every: float
    ) -> JobManager | ZeroGpuJobs:
        if lend_gpu is None:
            return JobManager(
                open_engine, self.folder, max_queue=self.exposure.limits.queue, predict=self._times.seconds,
                on_finished=self._times.learn, save_every=save_every,
            )  # fmt: skip
        assert open_engine is not None
        preset = self.default_preset
        config = self.settings(preset).engine
        engine = open_engine(config, preset=preset, on_progress=lambda event: None, cancel=CancelToken())
        model = LoadedModel(config, preset)
        return ZeroGpuJobs(lend_gpu, engine, model, self.folder, predict=self.predict, on_finished=self._on_finished)

    def _on_finished(self, config: EngineConfig, request: Request, outcome: Outcome) -> None:
        """Learns from a run on this machine."""
        self._times.learn(config, request, replace(outcome, device=self.machine().name))

    def learn(self, config: EngineConfig, request: Request, seconds: dict[str, float]) -> None:
        """Records the seconds that each stage of a finished run took."""
        self._times.record(config, request, seconds, self.machine().name)

    # ---- runs of one owner --------------------------------------------------------------------------------------

    def submit(self, config: EngineConfig, request: Request, *, owner: str, preset: str) -> Job:
        """Queues a run and keeps its prediction. On a page that others can reach, it never starts a model download."""
        self._check_files(config, request, preset)
        prediction = self.predict(config, request)
        job = self.jobs.submit(config, request, owner=owner, preset=preset)
        self._expect(job.id, prediction)
        return job

    def edit(self, job: Job, config: EngineConfig, request: Request, *, preset: str) -> None:
        """Changes the settings of a queued run, which keeps its place."""
        self._check_files(config, request, preset)
        prediction = self.predict(config, request)
        self.jobs.edit(job.id, request, config=config, preset=preset)
        self._expect(job.id, prediction)

    def _check_files(self, config: EngineConfig, request: Request, preset: str) -> None:
        if not self.exposure.open_to_others or self.exposure.hosted:
            return
        ask = f"or ask the page's owner to download them with: python -m lightx2v.download {preset}"
        if not self.files.status(config).ready:
            raise BadRequest(f"The model files of {preset} are not on this machine. Choose another preset, {ask}")
        if request.interpolator == "rife" and find(RIFE, config) is None:
            raise BadRequest(f"The weights of RIFE are not on this machine. Choose interpolation ffmpeg, {ask} --rife")

    def _expect(self, job_id: str, prediction: Prediction | None) -> None:
        self._predicted.pop(job_id, None)
        if prediction is not None and prediction.source != "assumed":
            _remember(self._predicted, job_id, prediction)

    def job_of(self, owner: str, job_id: str) -> Job | None:
        """The run if it belongs to this owner; None otherwise, whether or not it exists."""
        job = self._find(job_id)
        return job if job is not None and job.id not in self._trash and self._belongs(job, owner) else None

    def _belongs(self, job: Job, owner: str) -> bool:
        if not owner:
            return False
        return secrets.compare_digest(job.owner, owner) or (not job.owner and not self.exposure.open_to_others)

    def runs(self, owner: str) -> list[Job]:
        """The owner's runs, newest first. On one's own machine also those that came back from their videos after the
        list of jobs was lost: a video does not tell whose it is."""
        if not owner:
            return []
        self.empty_trash()
        most = HISTORY + len(self._trash)
        runs = self.jobs.list(owner, limit=most)
        if not self.exposure.open_to_others:
            runs = sorted([*runs, *self.jobs.list("", limit=most)], key=lambda job: job.created, reverse=True)
        return [job for job in runs if job.id not in self._trash][:HISTORY]

    def _find(self, job_id: str) -> Job | None:
        try:
            return self.jobs.get(job_id)
        except UnknownJob:
            return None

    def ahead_of(self, job: Job, owner: str) -> tuple[int, int]:
        """How many runs come before a waiting one, and how many of those are other visitors'."""
        busy = self.jobs.list(states=("queued", "running"), limit=10_000)
        before = [it for it in busy if it.state == "running" or (it.position or 0) < (job.position or 0)]
        return len(before), sum(not self._belongs(it, owner) for it in before)

    def swap(self, first: Job, second: Job) -> None:
        """Exchanges two queued runs of one owner; no other run moves."""
        places = [first.position, second.position]
        if places[0] is not None and places[1] is not None:
            early, late = (first, second) if places[0] < places[1] else (second, first)
            self.jobs.move(late.id, min(places[0], places[1]))
            self.jobs.move(early.id, max(places[0], places[1]))

    def delete(self, job: Job) -> None:
        """Removes a run that is over from its owner's page; `undo_delete` brings it back until its files go, a while
        later."""
        if not job.over:
            raise BadRequest("This run is not over. Stop it first.")
        self._trash[job.id] = job, time.monotonic() + UNDO_SECONDS

    def deleted(self, owner: str) -> int:
        """How many runs of this owner `undo_delete` would bring back."""
        return sum(self._belongs(job, owner) for job, _ in self._trash.copy().values())

    def undo_delete(self, owner: str) -> None:
        """Brings back the runs of this owner that were deleted in the last minutes."""
        for id, (job, _) in self._trash.copy().items():
            if self._belongs(job, owner):
                self._trash.pop(id, None)

    def empty_trash(self, *, all: bool = False) -> None:
        """Removes what was deleted long enough ago, or `all`, with its files."""
        for id, (_, until) in self._trash.copy().items():
            if (all or time.monotonic() >= until) and self._trash.pop(id, None) is not None:
                with contextlib.suppress(UnknownJob):
                    self.jobs.delete(id)

    # ---- files that are served ----------------------------------------------------------------------------------

    @property
    def sample(self) -> Path | None:
        return SAMPLE if SAMPLE.is_file() else None

    def video_of(self, job_id: str) -> Path | None:
        """The video of a run. Ids cannot be guessed, so knowing one is the permission."""
        job = self._find(job_id)
        return existing(job.path, self.folder) if job is not None else None

    def original_of(self, job_id: str) -> Path | None:
        """The video of a run without interpolation, if that was kept."""
        video = self.video_of(job_id)
        return existing(original_path(video), self.folder) if video is not None else None

    def download_name(self, job_id: str) -> str:
        """A file name that says when and how the video was made: date, preset, seed, the first words of the prompt."""
        job = self._find(job_id)
        if job is None:
            return "video.mp4"
        made = time.strftime("%Y%m%d-%H%M", time.localtime(job.created))
        words = "_".join(re.findall(r"\w+", job.request.prompt)[:6])[:40]
        seed = (job.result or {}).get("seed", job.request.seed)
        return "-".join(filter(None, [made, re.sub(r"[^\w]+", "_", job.preset), f"seed{seed}", words])) + ".mp4"

    def preview_of(self, job_id: str) -> bytes | Path | None:
        """The latest preview of the latents, or the poster once the run has ended."""
        job = self._find(job_id)
        return job.preview or self.poster_of(job_id) if job is not None else None

    def poster_of(self, job_id: str) -> Path | None:
        """A small image of the run's middle frame."""
        if (video := self.video_of(job_id)) is None:
            return None
        try:
            return still(video, "thumbnail")
        except LightX2VError as error:
            log.warning("Could not create a poster for %s: %s", job_id, error)
            return None

    def thumbnail_of(self, lora: str) -> bytes | None:
        """A small picture of a LoRA on offer, from the file beside it."""
        found = self.offer.catalog.loras.get(lora)
        path = next((file.thumbnail for file in found.files if file.thumbnail), None) if found else None
        return _thumbnail(path, path.stat().st_mtime_ns) if path is not None and path.is_file() else None

    def keep_upload(self, path: Path) -> str:
        """Returns a token under which the page serves an uploaded video."""
        token = secrets.token_urlsafe(24)
        _remember(self._uploads, token, path)
        return token

    def keep_alive(self, *paths: str | Path | None) -> None:
        """Touch uploads that a page shows, so that they do not count as unused."""
        for path in filter(None, paths):
            with contextlib.suppress(OSError, ValueError):
                os.utime(path)

    def uploaded_video(self, token: str) -> Path | None:
        path = self._uploads.get(token)
        return path if path is not None and path.is_file() else None

    def close(self) -> bool:
        """Interrupts the running job. False if its engine does not stop."""
        self.empty_trash(all=True)
        return self.jobs.close()


@lru_cache(maxsize=256)
def _thumbnail(path: Path, changed: int) -> bytes | None:
    """`changed` makes a new picture of the same name another one."""
    try:
        with DECODE_LOCK:
            return jpeg(load_image(str(path)), max_side=THUMBNAIL_SIDE)
    except LightX2VError:
        return None


def _remember(table: OrderedDict[str, Any], key: str, value: Any) -> None:
    """Adds to a table of at most a thousand entries."""
    table[key] = value
    if len(table) > 1000:
        table.popitem(last=False)


def existing(path: str | Path | None, folder: Path) -> Path | None:
    """`path` if it is a file inside `folder`. It may come from outside and name nothing that a file can be."""
    if not path or "\0" in str(path):
        return None
    resolved = Path(path).resolve()
    return resolved if resolved.is_relative_to(folder.resolve()) and os.path.isfile(resolved) else None
