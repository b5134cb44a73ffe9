"""RayReplica: a replica of the job queue whose engine is a Worker elsewhere, on another GPU or another machine.

It sends pictures and the saved step along, and writes here what comes back: saved steps while the run goes on, at its
end the video. A worker that has ended or hangs is lost: its job goes back to the queue with its newest step.
"""

import json
import logging
import secrets
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

from ..config.engine_config import EngineConfig
from ..config.recorded_settings import PICTURES
from ..errors import LightX2VError, OutputError
from ..jobs.engine_slot import public_error
from ..jobs.replica import LoadedModel, Outcome, ReplicaStatus
from ..jobs.store import Job
from ..media.video_writer import original_path
from ..progress import CancelToken, OnProgress
from ..step_file import StepStore
from .messages import Ended, Heard, Hello, Message, StepSaved, Task

log = logging.getLogger("lightx2v.farm")

SILENCE = 15.0
"""Seconds without an answer after which a worker hangs. Loading may hold Python's lock for some of them."""
STOP_SECONDS = 30.0
"""Seconds after which a worker that does not stop its run is lost."""
REFUSAL_SECONDS = 60.0
"""Seconds for which an answer about a model counts: files and the Hub may come back."""


class Answer(Protocol):
    def get(self) -> Any:
        """None while there is none. LightX2VError if none will come."""
        ...


class RemoteWorker(Protocol):
    """What reaches a Worker. Its errors are LightX2VErrors: the worker is lost then."""

    def pulse(self) -> Answer: ...

    def run(self, task: Task) -> Iterator[list[Message]]: ...

    def stop(self, run: str, *, suspend: bool) -> None: ...

    def kill(self) -> None: ...


class RayReplica:
    """`machine` is the name of the worker's machine. With `may_refuse` other machines may hold a model that this one
    cannot; else it tries to load every model, and the error says what to do."""

    def __init__(
        self,
        worker: RemoteWorker,
        hello: Hello,
        name: str,
        machine: str,
        *,
        may_refuse: bool = False,
        silence: float = SILENCE,
    ) -> None:
        self.name, self.device = name, hello.device
        self.loaded: LoadedModel | None = None
        self.busy = False
        self.idle_since = time.monotonic()
        self.lost = ""
        self._worker, self._silence, self._may_refuse = worker, silence, may_refuse
        self._status = ReplicaStatus(machine=machine, pid=hello.pid)
        self._pulse: Answer | None = None
        self._heard = time.monotonic()
        self._refusals: dict[str, tuple[str, float]] = {}
        self._lock = threading.Lock()

    @property
    def alive(self) -> bool:
        return not self.lost

    def status(self) -> ReplicaStatus:
        return self._status

    # ---- the worker's health ----------------------------------------------------------------------------------------

    def listen(self) -> None:
        """Ask the worker whether it lives, and lose it if it has not answered for `silence` seconds."""
        try:
            if self._pulse is None:
                self._pulse = self._worker.pulse()
            elif (pulse := self._pulse.get()) is not None:
                self._status = replace(pulse.status, machine=self._status.machine)
                self._heard, self._pulse = time.monotonic(), None
        except LightX2VError as error:
            self.lose(f"it has ended ({error})")
        if self.alive and time.monotonic() - self._heard > self._silence:
            self.lose(f"it has not answered for {self._silence:.0f} seconds")

    def lose(self, reason: str) -> None:
        """Give the worker up. A run in progress ends as `died`."""
        with self._lock:
            if self.lost:
                return
            self.lost = reason
        log.warning("The worker %s is lost: %s.", self.name, reason)
        self._worker.kill()

    def close(self) -> None:
        with self._lock:
            self.lost = self.lost or "it was closed"
        self._worker.kill()

    # ---- models -----------------------------------------------------------------------------------------------------

    def refusal(self, config: EngineConfig) -> str:
        """What the worker has said when it was to load this model, not long ago."""
        known, until = self._refusals.get(_key(config), ("", 0.0))
        return known if time.monotonic() < until else ""

    def load(self, config: EngineConfig, preset: str, on_progress: OnProgress, cancel: CancelToken) -> Outcome:
        """Load a model before the first job. The outcome has an error if that fails."""
        task = Task(run=secrets.token_hex(8), config=config.to_json(), preset=preset)
        try:
            for message in self._messages(task, cancel):
                if isinstance(message, Heard):
                    on_progress(message.progress)
                elif isinstance(message, Ended):
                    return message.outcome
        except LightX2VError as error:
            self.lose(str(error))
        return Outcome(died=True)

    # ---- jobs -------------------------------------------------------------------------------------------------------

    def run(self, job: Job, path: Path, *, on_progress: OnProgress, cancel: CancelToken, steps: StepStore) -> Outcome:
        self.busy = True
        try:
            return self._run(job, path, on_progress, cancel, steps)
        except LightX2VError as error:
            self.lose(str(error))
        except OSError as error:
            return Outcome(error=public_error(error, job.id))
        finally:
            self.busy, self.idle_since = False, time.monotonic()
        # Nobody's fault but the machine's if the job was told to leave it.
        return Outcome(cancelled=True) if cancel.cancelled else Outcome(died=True)

    def _run(self, job: Job, path: Path, on_progress: OnProgress, cancel: CancelToken, steps: StepStore) -> Outcome:
        for message in self._messages(task_for(job, steps, self._may_refuse), cancel):
            if isinstance(message, Heard):
                preview = message.preview
                show = None if preview is None else lambda preview=preview: preview
                on_progress(replace(message.progress, preview=show))
            elif isinstance(message, StepSaved):
                try:
                    steps.write(message.data)
                except OutputError as error:
                    log.warning("A step of job %s is not saved, the run goes on: %s", job.id, error)
            elif isinstance(message, Ended):
                return self._delivered(job, path, message)
        raise WorkerEnded(self.lost or "its run ended without a result")

    def _messages(self, task: Task, cancel: CancelToken) -> Iterator[Message]:
        """The messages of a run, which this stops once `cancel` is set. WorkerEnded where the worker is lost."""
        told = 0.0
        for messages in self._worker.run(task):
            if self.lost:
                raise WorkerEnded(self.lost)
            if cancel.cancelled and not told:
                told = time.monotonic()
                self._worker.stop(task.run, suspend=cancel.suspended)
            if told and time.monotonic() - told > STOP_SECONDS:
                raise WorkerEnded(f"it has not stopped its run for {STOP_SECONDS:.0f} seconds")
            for message in messages:
                if isinstance(message, Ended):
                    config, preset = message.loaded or (None, "")
                    self.loaded = LoadedModel(EngineConfig.from_json(config), preset) if config else None
                yield message

    def _delivered(self, job: Job, path: Path, end: Ended) -> Outcome:
        """Write the video. The report names the job's own pictures, not the worker's copies."""
        outcome = end.outcome
        if outcome.fatal:
            raise WorkerEnded("its GPU, or a process of its group, has failed")
        if outcome.refused:
            self._refusals[_key(job.config)] = (outcome.refused, time.monotonic() + REFUSAL_SECONDS)
        if outcome.report is None or end.video is None:
            return outcome
        kept = original_path(path)
        if end.original is not None:
            _write(kept, end.original)
        _write(path, end.video)
        own = {name: getattr(job.request, name) for name in PICTURES}
        report = outcome.report | {"request": outcome.report["request"] | own}
        if end.original is not None:
            report["original_path"] = str(kept)
        return replace(outcome, report=report)


def _write(path: Path, data: bytes) -> None:
    part = path.with_name(f"{path.name}.part")
    try:
        part.write_bytes(data)
        part.replace(path)
    except OSError:
        part.unlink(missing_ok=True)
        raise


class WorkerEnded(LightX2VError):
    """The worker of a run can go on no more."""


def _key(config: EngineConfig) -> str:
    return json.dumps(config.to_json(), sort_keys=True)


def task_for(job: Job, steps: StepStore, may_refuse: bool) -> Task:
    """Everything that a worker needs for this job, as bytes. OSError if a picture cannot be read."""
    pictures = {
        name: (Path(picture).name, Path(picture).read_bytes())
        for name in PICTURES
        if (picture := getattr(job.request, name)) is not None
    }
    try:
        step = steps.read()
    except OutputError as error:
        log.warning("Job %s starts over: %s", job.id, error)
        step = None
    return Task(
        run=secrets.token_hex(8),
        config=job.config.to_json(),
        preset=job.preset,
        job=job.id,
        request=job.request.to_json(),
        pictures=pictures,
        step=step,
        save_every=steps.every,
        may_refuse=may_refuse,
    )
