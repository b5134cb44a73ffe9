"""The place for one loaded engine, and the wall between a failing job and the rest of the program.

`EngineSlot.run` never raises because of a job. Whatever happens becomes an Outcome: a report, or an error with
a message that a person can act on. The traceback goes to the log, and nothing keeps the failed step's tensors.
"""

from __future__ import annotations

import errno
import json
import logging
import sys
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from ..config.engine_config import EngineConfig
from ..config.request import Request
from ..cost.machine import free_memory
from ..errors import Cancelled, GroupFailed, LightX2VError, OutOfMemory, OutputError
from ..progress import CancelToken, OnProgress

log = logging.getLogger("lightx2v.jobs")


class RunReport(Protocol):
    """What a run gives back."""

    def report(self) -> dict[str, Any]: ...


class Engine(Protocol):
    """A loaded model; LightX2VPipeline is one."""

    def run(
        self, request: Request, *, save_result_path: Path, on_progress: OnProgress, cancel: CancelToken
    ) -> RunReport: ...

    def close(self) -> None: ...


class OpenEngine(Protocol):
    """Loads a model; it may take minutes, so it reports progress and checks `cancel` meanwhile."""

    def __call__(
        self, config: EngineConfig, *, preset: str, on_progress: OnProgress, cancel: CancelToken
    ) -> Engine: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """How a job ended: `report` is set if it succeeded, else `error` (type, message). After `fatal` nothing can run."""

    report: dict[str, Any] | None = None
    error: dict[str, str] | None = None
    cancelled: bool = False
    fatal: bool = False


class EngineSlot:
    """At most one engine: kept while the EngineConfig stays equal, closed before another one opens."""

    def __init__(self, open_engine: OpenEngine) -> None:
        self._open_engine = open_engine
        self._engine: Engine | None = None
        self._config: EngineConfig | None = None

    def run(
        self,
        id: str,
        config: EngineConfig,
        request: Request,
        *,
        preset: str,
        path: Path,
        on_progress: OnProgress,
        cancel: CancelToken,
    ) -> Outcome:
        """Makes the video `path`, loading first if need be."""
        failure: BaseException | None = None
        try:
            cancel.check()
            engine = self._engine_for(config, preset, on_progress, cancel)
            cancel.check()
            result = engine.run(request, save_result_path=path, on_progress=on_progress, cancel=cancel)
            if not path.is_file() or not path.stat().st_size:
                raise OutputError("The engine finished without writing the video. Its log may say why.")
            report = result.report() | {"path": path.name, "preset": preset}  # a name: paths are the server's business
            return Outcome(report=json.loads(json.dumps(report)))
        except Exception as error:  # the one place where a job's failure stops
            failure = error
        if isinstance(failure, Cancelled):
            release_frames(failure)
            return Outcome(error=public_error(failure, id), cancelled=True)
        # Text, not exc_info: a log record that is kept somewhere would keep the step's tensors through the traceback.
        log.error("job %s failed\n%s", id, "".join(traceback.format_exception(failure)))
        error = public_error(failure, id)
        fatal = device_is_lost(failure) or isinstance(failure, GroupFailed)
        starved, known = is_out_of_memory(failure), isinstance(failure, LightX2VError)
        release_frames(failure)
        failure = None
        if starved:
            free_memory()
        elif not known:  # nobody knows what a bug left behind in the engine; the next job gets a fresh one
            self.close()
        return Outcome(error=error, fatal=fatal)

    def close(self) -> None:
        """Frees the engine, if there is one."""
        engine, self._engine, self._config = self._engine, None, None
        if engine is None:
            return
        try:
            engine.close()
        except Exception:  # it is dropped either way
            log.error("closing the engine failed\n%s", traceback.format_exc())
        del engine
        free_memory()

    def _engine_for(self, config: EngineConfig, preset: str, on_progress: OnProgress, cancel: CancelToken) -> Engine:
        if self._engine is None or self._config != config:
            self.close()
            self._engine = self._open_engine(config, preset=preset, on_progress=on_progress, cancel=cancel)
            self._config = config
        return self._engine


def public_error(error: BaseException, id: str) -> dict[str, str]:
    """Type and message for the person who waits: no traceback, and of errors that are not ours not even the text."""
    if isinstance(error, LightX2VError):
        return {"type": type(error).__name__, "message": str(error)}
    if is_out_of_memory(error):
        message = "Out of memory. Make the video smaller or shorter, turn offload on, or take an FP8 preset."
        return {"type": OutOfMemory.__name__, "message": message}
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return {"type": OutputError.__name__, "message": "The disk is full. Free some space and run the job again."}
    if device_is_lost(error):
        message = "The graphics card reported an error that only a restart clears. Restart the program; see its log."
        return {"type": "DeviceError", "message": message}
    message = f"Something went wrong inside the program ({type(error).__name__}). Its log says more, under job {id}."
    return {"type": type(error).__name__, "message": message}


def is_out_of_memory(error: BaseException) -> bool:
    """Host or device, whether or not somebody has already given it our own type."""
    torch = sys.modules.get("torch")
    kinds = (MemoryError, OutOfMemory) if torch is None else (MemoryError, OutOfMemory, torch.OutOfMemoryError)
    return isinstance(error, kinds) or (isinstance(error, RuntimeError) and "out of memory" in str(error).lower())


def device_is_lost(error: BaseException) -> bool:
    """CUDA errors other than OOM (illegal access, device-side assert) make every later call of the process fail."""
    return isinstance(error, RuntimeError) and "CUDA error" in str(error) and not is_out_of_memory(error)


def release_frames(error: BaseException) -> None:
    """Lets go of all frames that the error and its causes hold: their locals are the failed step's tensors."""
    pending: list[BaseException | None] = [error]
    seen: set[int] = set()
    while pending:
        error_ = pending.pop()
        if error_ is None or id(error_) in seen:
            continue
        seen.add(id(error_))
        traceback.clear_frames(error_.__traceback__)
        error_.__traceback__ = None
        pending += [error_.__cause__, error_.__context__]
