"""A replica that can die in the middle of a run, refuse models and be of another device, as one elsewhere can."""

from __future__ import annotations

import threading
from dataclasses import replace
from pathlib import Path

from fake_engine import Garage

from lightx2v.config.engine_config import EngineConfig
from lightx2v.jobs.engine_slot import EngineSlot
from lightx2v.jobs.replica import LoadedModel, Outcome, ReplicaStatus
from lightx2v.jobs.store import Job
from lightx2v.progress import CancelToken, OnProgress, Progress
from lightx2v.step_file import StepStore


class FakeReplica:
    """Runs jobs with the engines of a garage. After `die`, nothing of the run in progress arrives any more; `refuses`
    maps models to reasons."""

    def __init__(
        self, name: str, garage: Garage | None = None, *, device: str = "fake", refuses: dict[str, str] | None = None
    ) -> None:
        self.name, self.device, self.refuses = name, device, refuses or {}
        self.garage = garage or Garage()
        self.died = threading.Event()
        self._slot = EngineSlot(self.garage)

    @property
    def alive(self) -> bool:
        return self._slot.alive and not self.died.is_set()

    @property
    def loaded(self) -> LoadedModel | None:
        return self._slot.loaded

    def refusal(self, config: EngineConfig) -> str:
        return self.refuses.get(config.model_path, "")

    def status(self) -> ReplicaStatus:
        return ReplicaStatus(machine=f"host of {self.name}", memory_used=3 * 2**30, memory_total=8 * 2**30, pid=7)

    def die(self) -> None:
        self.died.set()

    def close(self) -> None:
        self.died.set()
        self._slot.close()

    def run(self, job: Job, path: Path, *, on_progress: OnProgress, cancel: CancelToken, steps: StepStore) -> Outcome:
        ended: list[Outcome] = []
        far = path.with_name(f"{path.name}.{self.name.replace('/', '-')}")
        wire = _Wire(self.died, on_progress, steps)

        def work() -> None:
            ended.append(self._slot.run(job, far, on_progress=wire.progress, cancel=cancel, steps=wire))

        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        while thread.is_alive() and not self.died.is_set():
            thread.join(0.002)
        if self.died.is_set() or not ended:
            cancel.cancel()
            thread.join()
            far.unlink(missing_ok=True)
            return Outcome(died=True, error={"type": "WorkerDied", "message": f"{self.name} has ended."})
        (outcome,) = ended
        if outcome.report is not None:
            far.replace(path)
            outcome = replace(outcome, report=outcome.report | {"path": path.name})
        return outcome


class _Wire:
    """Progress and steps on their way from the replica: cut when it dies."""

    def __init__(self, died: threading.Event, on_progress: OnProgress, steps: StepStore) -> None:
        self._died, self._on_progress, self._steps = died, on_progress, steps
        self.every = steps.every

    def progress(self, event: Progress) -> None:
        if not self._died.is_set():
            self._on_progress(event)

    def read(self) -> bytes | None:
        return self._steps.read()

    def write(self, data: bytes) -> None:
        if not self._died.is_set():
            self._steps.write(data)
