"""ZeroGpuJobs: the job manager's interface on ZeroGPU, which lends a GPU to one visitor's HTTP request.

    main process                               forked process with the GPU
    ZeroGpuJobs.running ─ spaces.GPU(duration) ─►  denoise: the engine in a thread; yields messages
        │   ◄── {"progress": …} … {"frames": …, "report": …}
        └──► the mp4 is written here: encoding on the lent GPU would be charged

The event that submits a job also runs it, inside `running`; leaving that block cancels it. So no job ever waits in a
queue here. The engine is loaded once at start, before the fork. Jobs are kept in memory: a restart forgets them.
"""

import math
import queue
import secrets
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Collection, Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from lightx2v.config.engine_config import EngineConfig
from lightx2v.config.recorded_settings import recorded_settings
from lightx2v.config.request import Request
from lightx2v.cost.run_time import Prediction
from lightx2v.errors import BadRequest, LightX2VError
from lightx2v.jobs.files import JobFiles
from lightx2v.jobs.replica import LoadedModel, OnFinished, Outcome
from lightx2v.jobs.store import STATES, Job, State, UnknownJob
from lightx2v.media.images import jpeg
from lightx2v.media.video_writer import VideoWriter
from lightx2v.progress import CancelToken, Progress

MIN_SECONDS, MAX_SECONDS, UNKNOWN_SECONDS = 20, 300, 90
MARGIN = 1.3
"""A reservation that is too short loses the run; one that is too long only waits longer for a GPU."""
MAX_JOBS = 1000

Message = dict[str, Any]
"""The changes of a job in progress or of a failed one; the frames and report of one that succeeded."""
LendGpu = Callable[..., Callable[..., Callable[..., Generator[Message]]]]
"""`spaces.GPU`: takes `duration=`, returns a decorator."""


class ZeroGpuJobs:
    """Jobs of one engine, each run on a GPU that is lent for it. The methods are those of JobManager.

    `engine` is a LightX2VPipeline, which returns frames here and writes no file.
    """

    alive = True

    def __init__(
        self,
        lend_gpu: LendGpu,
        engine: Any,
        loaded: LoadedModel,
        folder: Path,
        *,
        predict: Callable[[EngineConfig, Request], Prediction | None],
        on_finished: OnFinished,
    ) -> None:
        self.loaded, self.folder = loaded, folder
        self._on_finished = on_finished
        self._lock = threading.RLock()
        self._jobs: OrderedDict[str, Job] = OrderedDict()

        def seconds(request: dict[str, Any]) -> int:
            return reserved_seconds(predict(loaded.config, Request.from_json(request)))

        def denoise(request: dict[str, Any]) -> Generator[Message]:
            yield from _messages(engine, Request.from_json(request))

        # Requests cross the fork as plain JSON. spaces.GPU calls `duration` with the function's own arguments.
        self._denoise = lend_gpu(duration=seconds)(denoise)

    # ---- JobManager's interface ---------------------------------------------------------------------------------

    def get(self, id: str) -> Job:
        with self._lock:
            if id not in self._jobs:
                raise UnknownJob("There is no job with this id.")
            return self._jobs[id]

    def list(self, owner: str | None = None, *, limit: int = 100, states: Collection[State] = STATES) -> list[Job]:
        """Jobs, newest first; of one owner, or of all."""
        with self._lock:
            jobs = [job for job in reversed(self._jobs.values()) if owner in (None, job.owner) and job.state in states]
        return jobs[:limit]

    def submit(self, config: EngineConfig, request: Request, *, owner: str = "", preset: str = "") -> Job:
        if config != self.loaded.config:
            raise BadRequest("This page runs one model. Choose its preset from the list.")
        config.check_request(request)
        now = time.time()
        job = Job(
            id=secrets.token_hex(16), state="running", owner=owner, preset=preset, client_id=None, config=config,
            request=request, created=now, started=now,
        )  # fmt: skip
        with self._lock:
            self._jobs[job.id] = job
            if len(self._jobs) > MAX_JOBS:
                self._jobs.popitem(last=False)
        return job

    def cancel(self, id: str) -> Job:
        """Stops a running job at its next step."""
        return job if (job := self.get(id)).over else self._change(id, cancelling=True)

    def delete(self, id: str) -> None:
        with self._lock:
            job = self.get(id)
            if not job.over:
                raise BadRequest("This job is running. Cancel it first, and delete it when it has stopped.")
            del self._jobs[id]
        JobFiles(self.folder).remove(id)

    def move(self, id: str, position: int) -> Job:
        raise BadRequest(f"This job is {self.get(id).state}; only a queued job can be moved.")

    def edit(self, id: str, request: Request, *, config: EngineConfig, preset: str) -> Job:
        raise BadRequest(f"This job is {self.get(id).state}; only a queued job can be changed.")

    def interrupt(self) -> None:
        """Does nothing: every run ends with the event that it belongs to."""

    def close(self) -> bool:
        """Does nothing, for the same reason."""
        return True

    # ---- running inside an event --------------------------------------------------------------------------------

    @contextmanager
    def running(self, ids: Sequence[str]) -> Iterator[Iterator[None]]:
        """Gives an iterator that runs the jobs one after another and yields after every change of one. Leaving the
        block, as gradio does when the visitor leaves, cancels those that are not over."""
        with closing(self._run_all(ids)) as changes:
            try:
                yield changes
            finally:
                changes.close()
                for id in ids:
                    self._end(id)

    def _run_all(self, ids: Sequence[str]) -> Generator[None]:
        for id in ids:
            job = self.get(id)
            with closing(self._denoise(job.request.to_json())) as messages:
                for message in messages:
                    if self.get(id).cancelling:
                        break
                    self._change(id, **(self._finish(job, **message) if "frames" in message else message))
                    yield
            self._end(id)

    def _end(self, id: str) -> None:
        """Marks a run as cancelled that did not come to its end."""
        with self._lock:
            if id in self._jobs and not self._jobs[id].over:
                self._change(id, state="cancelled", finished=time.time())

    def _finish(self, job: Job, frames: Any, report: dict[str, Any]) -> dict[str, Any]:
        """Writes the video, and adds its path, size and writing time to the report."""
        path = self.folder / f"{job.id}.mp4"
        settings = recorded_settings(job.preset, job.config, job.request, path, report.get("files", ()))
        started = time.perf_counter()
        height, width = frames.shape[1:3]
        try:
            with VideoWriter(path, width, height, job.request.video_fps, settings=settings) as writer:
                writer.write(frames)
        except LightX2VError as error:
            return _failed(type(error).__name__, str(error))
        report["timings"]["seconds"]["write"] = time.perf_counter() - started
        report |= {"path": str(path), "file_bytes": path.stat().st_size}
        self._on_finished(job.config, job.request, Outcome(report=report))
        return {"state": "succeeded", "finished": time.time(), "result": report, "path": path, "preview": None}

    def _change(self, id: str, **changes: Any) -> Job:
        with self._lock:
            job = replace(self._jobs[id], **changes)
            self._jobs[id] = replace(job, cancelling=job.cancelling and not job.over)
            return self._jobs[id]


def reserved_seconds(prediction: Prediction | None) -> int:
    """Whole seconds of GPU time to reserve for a run that is predicted to take this long."""
    if prediction is None:
        return UNKNOWN_SECONDS
    on_gpu = sum(seconds for stage, seconds in prediction.stages.items() if stage not in ("load", "write"))
    return min(MAX_SECONDS, max(MIN_SECONDS, math.ceil(on_gpu * MARGIN + 5)))


def _messages(engine: Any, request: Request) -> Generator[Message]:
    """Runs in the forked process: the engine works in a thread, so that each step is sent while the next one runs."""
    messages: queue.Queue[Message] = queue.Queue()
    cancel = CancelToken()

    def send(event: Progress) -> None:
        preview = {"preview": jpeg(event.preview(), max_side=512)} if event.preview is not None else {}
        messages.put({"progress": replace(event, preview=None), **preview})

    def work() -> None:
        try:
            result = engine.run(request, on_progress=send, cancel=cancel, return_frames=True)
            messages.put({"frames": result.frames, "report": result.report()})
        except LightX2VError as error:
            messages.put(_failed(type(error).__name__, str(error)))
        except BaseException:
            messages.put(_failed("LightX2VError", "The run failed. Try again."))
            raise

    worker = threading.Thread(target=work, daemon=True, name="lightx2v-zerogpu")
    worker.start()
    try:
        while True:
            message = messages.get()
            yield message
            if "progress" not in message:
                return
    finally:
        cancel.cancel()
        worker.join(timeout=30)


def _failed(type: str, message: str) -> Message:
    return {"state": "failed", "finished": time.time(), "error": {"type": type, "message": message}}
