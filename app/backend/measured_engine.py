"""An engine whose runs teach the prediction."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from lightx2v.config.engine_config import EngineConfig
from lightx2v.config.request import Request
from lightx2v.jobs.engine_slot import Engine, RunReport
from lightx2v.progress import CancelToken, OnProgress

Learn = Callable[[EngineConfig, Request, dict[str, float]], None]


class Report:
    """A finished run's report."""

    def __init__(self, report: dict[str, Any]) -> None:
        self._report = report

    def report(self) -> dict[str, Any]:
        return self._report


class Measured:
    """Passes everything on, and calls `learn` with what each run took, and `closed` at the end."""

    def __init__(
        self, engine: Engine, config: EngineConfig, load_seconds: float, *, learn: Learn, closed: Callable[[], None]
    ) -> None:
        self._engine, self._config, self._learn, self._closed = engine, config, learn, closed
        self._load: float | None = load_seconds

    def run(
        self, request: Request, *, save_result_path: Path, on_progress: OnProgress, cancel: CancelToken
    ) -> RunReport:
        result = self._engine.run(
            request, save_result_path=save_result_path, on_progress=on_progress, cancel=cancel
        )  # fmt: skip
        report = result.report()
        timings = report["timings"]
        if self._load is not None:  # the run that the engine was opened for waited for that too
            timings["seconds"] = {"load": 0.0, **timings["seconds"]}
            timings["seconds"]["load"] += self._load
            timings["total"] += self._load
            self._load = None
        # An input picture may have given the video another size: that is the work that was done.
        done = replace(request, height=report["height"], width=report["width"])
        self._learn(self._config, done, timings["seconds"])
        return Report(report)

    def close(self) -> None:
        self._closed()
        self._engine.close()


def engine_key(config: EngineConfig) -> str:
    """A short name for everything that an engine's speed depends on."""
    text = json.dumps(config.to_json(), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
