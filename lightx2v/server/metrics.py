"""Counters in Prometheus' text format, written by hand: it is a dozen lines, and the numbers are few.

Requests are counted per route template, never per address, so that the number of series is bounded.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ..config.engine_config import EngineConfig
from ..config.request import Request
from ..errors import Cancelled
from ..jobs.engine_slot import Engine, OpenEngine, RunReport
from ..jobs.queue import JobManager
from ..progress import CancelToken, OnProgress, peak_rss

BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0)


class Metrics:
    """What has happened since the start. Safe from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._requests: Counter[tuple[str, str, int]] = Counter()
        self._within: Counter[float] = Counter()
        self._seconds = 0.0
        self._runs: Counter[str] = Counter()
        self._stages: Counter[str] = Counter()
        self._vram = 0

    def saw_request(self, route: str, method: str, status: int, seconds: float) -> None:
        with self._lock:
            self._requests[route, method, status] += 1
            self._within.update(bound for bound in BUCKETS if seconds <= bound)
            self._seconds += seconds

    def saw_run(self, outcome: str, report: dict[str, Any] | None = None) -> None:
        """A run of an engine that ended: succeeded, cancelled or failed."""
        timings = report["timings"] if report and "timings" in report else {"seconds": {}, "peak_vram": None}
        with self._lock:
            self._runs[outcome] += 1
            for stage, seconds in timings["seconds"].items():
                self._stages[stage] += seconds
            for peak in (timings["peak_vram"] or {}).values():
                self._vram = max(self._vram, peak["allocated"])

    def watching(self, open_engine: OpenEngine) -> OpenEngine:
        """`open_engine`, its engines' runs counted here."""

        def opened(config: EngineConfig, *, preset: str, on_progress: OnProgress, cancel: CancelToken) -> Engine:
            return _Watched(open_engine(config, preset=preset, on_progress=on_progress, cancel=cancel), self)

        return opened

    def text(self, jobs: JobManager) -> str:
        """All of it, and how the queue stands."""
        with self._lock:
            total = sum(self._requests.values())
            families = [
                _family(
                    "lightx2v_api_request_total",
                    "counter",
                    {
                        f'{{route="{route}",method="{method}",status="{status}"}}': count
                        for (route, method, status), count in self._requests.items()
                    },
                ),
                _family(
                    "lightx2v_api_request_seconds",
                    "histogram",
                    {
                        **{f'_bucket{{le="{bound}"}}': self._within[bound] for bound in BUCKETS},
                        '_bucket{le="+Inf"}': total,
                        "_sum": self._seconds,
                        "_count": total,
                    },
                ),
                _family("lightx2v_runs_total", "counter", {f'{{outcome="{key}"}}': n for key, n in self._runs.items()}),
                _family(
                    "lightx2v_stage_seconds_total",
                    "counter",
                    {f'{{stage="{key}"}}': seconds for key, seconds in self._stages.items()},
                ),
                _family("lightx2v_peak_vram_bytes", "gauge", {"": self._vram}),
            ]
        alive = jobs.alive
        counts = jobs.counts() if alive else {}
        families += [
            _family("lightx2v_jobs", "gauge", {f'{{state="{state}"}}': count for state, count in counts.items()}),
            _family("lightx2v_queue_limit", "gauge", {"": jobs.max_queue}),
            _family("lightx2v_worker_alive", "gauge", {"": int(alive)}),
            _family("lightx2v_peak_rss_bytes", "gauge", {"": peak_rss()}),
        ]
        return "".join(families)


def _family(name: str, kind: str, samples: dict[str, float]) -> str:
    return f"# TYPE {name} {kind}\n" + "".join(f"{name}{labels} {value}\n" for labels, value in samples.items())


class MetricsMiddleware:
    """ASGI middleware: tells `metrics` of every request."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app, self._metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started, status = time.perf_counter(), 500

        async def noted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, noted)
        finally:
            # Unknown paths and methods come from outside, so they share one label each.
            route = getattr(scope.get("route"), "path", "none")
            method = scope["method"] if route != "none" else "any"
            self._metrics.saw_request(route, method, status, time.perf_counter() - started)


@dataclass(frozen=True, slots=True)
class _Watched:
    engine: Engine
    metrics: Metrics

    def run(
        self, request: Request, *, save_result_path: Path, on_progress: OnProgress, cancel: CancelToken
    ) -> RunReport:
        outcome, report = "failed", None
        try:
            result = self.engine.run(request, save_result_path=save_result_path, on_progress=on_progress, cancel=cancel)
            outcome, report = "succeeded", result.report()
            return result
        except Cancelled:
            outcome = "cancelled"
            raise
        finally:
            self.metrics.saw_run(outcome, report)

    def close(self) -> None:
        self.engine.close()
