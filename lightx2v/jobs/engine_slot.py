"""EngineSlot: the replica in this process: one loaded engine, and the boundary at which the failure of a job stops.

The traceback of a failure goes to the log, and no reference to the tensors of the failed step remains.
"""

import errno
import json
import logging
import os
import platform
import threading
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from ..config.engine_config import EngineConfig
from ..config.request import Request
from ..cost.machine import MachineReader
from ..errors import Cancelled, GroupFailed, LightX2VError, OutOfMemory, OutputError, is_out_of_memory
from ..progress import CancelToken, OnProgress, Progress, free_memory, reset_peak_rss
from ..step_file import StepStore
from .replica import LoadedModel, Outcome, ReplicaStatus
from .store import Job

log = logging.getLogger("lightx2v.jobs")

THIS_MACHINE = "this machine"


class RunResult(Protocol):
    """The result of a run. The report is JSON; its "timings" are those of `progress.Timings`."""

    def report(self) -> dict[str, Any]: ...


class Engine(Protocol):
    """A loaded model that runs requests; LightX2VPipeline is one. `metadata` writes the settings into the video, and
    `force` replaces an existing file. The run goes on from the step in `steps`, and saves its own there."""

    def run(
        self,
        request: Request,
        *,
        save_result_path: Path | None,
        on_progress: OnProgress,
        cancel: CancelToken,
        metadata: bool = True,
        force: bool = False,
        steps: StepStore | None = None,
    ) -> RunResult: ...

    def exchange(self, config: EngineConfig, *, preset: str, on_progress: OnProgress, cancel: CancelToken) -> bool:
        """Become an engine of `config` if that is little work; False, with nothing changed, if it means loading."""
        ...

    def release(self) -> Any:
        """Close it. The result is what the next engine may use of it: for `OpenEngine`, which frees it."""
        ...

    def close(self) -> None: ...


class OpenEngine(Protocol):
    """Loads a model. This may take minutes, so it reports progress and checks `cancel` meanwhile.

    `prompts` are those of the first request, `kept` what the last engine has left.
    """

    def __call__(
        self,
        config: EngineConfig,
        *,
        preset: str,
        on_progress: OnProgress,
        cancel: CancelToken,
        prompts: Sequence[str] = (),
        kept: Any = None,
    ) -> Engine: ...


class EngineSlot:
    """At most one engine. It stays while the EngineConfig stays equal, or becomes one that it can turn into; else it is
    closed before another one opens.

    It tries to load every model: where one does not fit, the error says what to do.
    """

    def __init__(self, open_engine: OpenEngine, name: str = THIS_MACHINE) -> None:
        self.name = name
        self.loaded: LoadedModel | None = None
        self.alive = True
        self._open_engine = open_engine
        self._engine: Engine | None = None
        self._load_seconds = 0.0
        self._machine = MachineReader()
        self.device = self._machine().name
        self._running = threading.Lock()

    def refusal(self, config: EngineConfig) -> str:
        return ""

    def status(self) -> ReplicaStatus:
        machine = self._machine()
        free, total = machine.vram_free, machine.vram_total
        if free is None or total is None:
            free, total = machine.ram_free, machine.ram_total
        name = platform.node() or self.name
        return ReplicaStatus(machine=name, memory_used=total - free, memory_total=total, pid=os.getpid())

    def run(self, job: Job, path: Path, *, on_progress: OnProgress, cancel: CancelToken, steps: StepStore) -> Outcome:
        """Make the job's video `path`, after loading the engine if necessary."""
        with self._running:
            reset_peak_rss()
            return self._run(job, path, on_progress=on_progress, cancel=cancel, steps=steps)

    def _run(self, job: Job, path: Path, *, on_progress: OnProgress, cancel: CancelToken, steps: StepStore) -> Outcome:
        try:
            cancel.check()
            texts = tuple(job.request.texts.values())
            engine = self._engine_for(job.config, job.preset, on_progress, cancel, texts)
            cancel.check()
            result = engine.run(job.request, save_result_path=path, on_progress=on_progress, cancel=cancel, steps=steps)
            if not path.is_file() or not path.stat().st_size:
                raise OutputError("The engine finished without writing the video. See the program's log.")
            # The name only: the folder is private to the server.
            report = self._with_load_time(result.report()) | {"path": path.name, "preset": job.preset}
            return Outcome(report=json.loads(json.dumps(report)))
        except Exception as error:  # the one place where the failure of a job stops
            return self._failed(job.id, error)

    def load(self, config: EngineConfig, *, preset: str, on_progress: OnProgress, cancel: CancelToken) -> Engine:
        """Load an engine before the first job, which then does not wait for it. Errors pass to the caller."""
        engine = self._engine_for(config, preset, on_progress, cancel, ())
        self._load_seconds = 0.0
        return engine

    def close(self) -> None:
        """Close the engine, if there is one, and free its memory. That of a run in progress stays until its thread
        closes it."""
        self.alive = False
        if self._running.acquire(blocking=False):
            try:
                self._drop_engine()
            finally:
                self._running.release()

    def _drop_engine(self) -> None:
        engine, self._engine, self.loaded = self._engine, None, None
        if engine is None:
            return
        try:
            engine.close()
        except Exception:  # it is dropped either way
            log.error("closing the engine failed\n%s", traceback.format_exc())
        del engine
        free_memory()

    def _release(self) -> Any:
        """Close the engine, if there is one. What the next one may use of it."""
        engine, self._engine, self.loaded = self._engine, None, None
        if engine is None:
            return None
        try:
            return engine.release()
        except Exception:  # it is dropped either way
            log.error("closing the engine failed\n%s", traceback.format_exc())
            return None

    def _failed(self, id: str, failure: Exception) -> Outcome:
        """Log the failure, release what it holds in memory, and drop the engine if its state is unknown."""
        if isinstance(failure, Cancelled):
            release_frames(failure)
            return Outcome(error=public_error(failure, id), cancelled=True)
        # Text, not exc_info: a stored log record would hold the traceback, and through it the tensors of the step.
        log.error("job %s failed\n%s", id, "".join(traceback.format_exception(failure)))
        died = isinstance(failure, GroupFailed)
        outcome = Outcome(error=public_error(failure, id), fatal=died or device_is_lost(failure), died=died)
        release_frames(failure)
        if is_out_of_memory(failure):
            free_memory()
        elif not isinstance(failure, LightX2VError):  # a bug may have damaged the engine: the next job gets a new one
            self._drop_engine()
        return outcome

    def _engine_for(
        self, config: EngineConfig, preset: str, on_progress: OnProgress, cancel: CancelToken, prompts: Sequence[str]
    ) -> Engine:
        if self._engine is not None and self.loaded is not None and self.loaded.config == config:
            return self._engine
        started = time.perf_counter()

        def watch(event: Progress) -> None:
            nonlocal started
            if event.stage == "download":  # its time says nothing about the next load
                started = time.perf_counter()
            on_progress(event)

        engine = self._engine
        if engine is None or not engine.exchange(config, preset=preset, on_progress=watch, cancel=cancel):
            del engine
            kept = self._release()
            started = time.perf_counter()
            self._engine = self._open_engine(
                config, preset=preset, on_progress=watch, cancel=cancel, prompts=prompts, kept=kept
            )
        self.loaded = LoadedModel(config, preset)
        self._load_seconds = time.perf_counter() - started
        assert self._engine is not None
        return self._engine

    def _with_load_time(self, report: dict[str, Any]) -> dict[str, Any]:
        """Add the time that the run waited for its engine to load. Each load is reported once."""
        seconds, self._load_seconds = self._load_seconds, 0.0
        timings = report["timings"]
        if seconds:
            stages = {"load": 0.0, **timings["seconds"]}
            stages["load"] += seconds
            timings |= {"seconds": stages, "total": timings["total"] + seconds}
        return report


def public_error(error: BaseException, id: str) -> dict[str, str]:
    """Type and message for the user: no traceback, and of errors that are not ours not even the text."""
    kind = type(error).__name__
    message = f"Internal error ({kind}). The program's log has the details under job {id}."
    if isinstance(error, LightX2VError):
        message = str(error)
    elif is_out_of_memory(error):
        kind = OutOfMemory.__name__
        message = "Out of memory. Make the video smaller or shorter, turn offload on, or use an FP8 preset."
    elif isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        kind, message = OutputError.__name__, "The disk is full. Free some space and run the job again."
    elif device_is_lost(error):
        kind = "DeviceError"
        message = "The GPU reported an error that only a restart clears. Restart the program; see its log."
    return {"type": kind, "message": message}


def device_is_lost(error: BaseException) -> bool:
    """True for CUDA errors other than OOM (illegal access, device-side assert), after which every call fails."""
    return isinstance(error, RuntimeError) and "CUDA error" in str(error) and not is_out_of_memory(error)


def release_frames(error: BaseException) -> None:
    """Clear all frames that the error and its causes hold: their locals are the tensors of the failed step."""
    pending: list[BaseException | None] = [error]
    seen: set[int] = set()
    while pending:
        current = pending.pop()
        if current is None or id(current) in seen:
            continue
        seen.add(id(current))
        traceback.clear_frames(current.__traceback__)
        current.__traceback__ = None
        pending += [current.__cause__, current.__context__]
