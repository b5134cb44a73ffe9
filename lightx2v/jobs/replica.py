"""Replica: a place where jobs run, one at a time: the engine of this process, or one on another GPU or machine.

A replica never raises because of a job. It returns an Outcome: a report, or an error that says what to do.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from ..config.engine_config import EngineConfig
from ..config.request import Request
from ..progress import CancelToken, OnProgress
from ..step_file import StepStore
from .store import Job


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """The end of a run: `report` if it succeeded, else `error` (type, message).

    `died`: the replica, or a process that it needs, has ended, which is not the job's end. After `fatal` the replica
    can run no job. `refused` says why its machine cannot hold the model, which it had not known before: the job waits
    for another. `device` is where it ran.
    """

    report: dict[str, Any] | None = None
    error: dict[str, str] | None = None
    cancelled: bool = False
    fatal: bool = False
    died: bool = False
    refused: str = ""
    device: str = ""


OnFinished = Callable[[EngineConfig, Request, Outcome], None]
"""Called after every run, from the thread of its worker, and before the job is recorded as finished."""


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """The configuration of the engine in memory, and the preset that it was loaded for."""

    config: EngineConfig
    preset: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaStatus:
    """Where a replica is and what it uses now: memory in bytes, of its GPU where it has one. None: not known."""

    machine: str
    memory_used: int | None = None
    memory_total: int | None = None
    pid: int | None = None


class Replica(Protocol):
    """One worker thread calls `run`. Every other member may be used from any thread, also while a job runs."""

    name: str
    """For people, and unique: "this machine", "gpu-0", "node2/gpu-1"."""

    @property
    def device(self) -> str:
        """The name of the GPU, or of the CPU. Runs on devices of one name take equally long."""
        ...

    @property
    def alive(self) -> bool:
        """False once it can run nothing more: its worker then leaves the queue."""
        ...

    @property
    def loaded(self) -> LoadedModel | None: ...

    def refusal(self, config: EngineConfig) -> str:
        """Why its machine cannot hold this model, as a sentence; "" if it can. Quick: called under the queue's lock."""
        ...

    def status(self) -> ReplicaStatus:
        """Quick too: what was heard last, where asking takes time."""
        ...

    def run(self, job: Job, path: Path, *, on_progress: OnProgress, cancel: CancelToken, steps: StepStore) -> Outcome:
        """Make the job's video `path`, after loading its model if necessary, from the step in `steps`, and save steps
        there. Once `cancel` is set, it ends within a step and writes no video."""
        ...

    def close(self) -> None:
        """End it and free its memory. A run in progress ends as `died` where its engine can be stopped."""
        ...
