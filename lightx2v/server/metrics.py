"""Metrics: counters of requests and runs for Prometheus, and the middleware that counts requests.

Requests are counted per route template, never per address, so that the number of series is bounded.
"""

import threading
import time
from collections.abc import Iterable, Sequence
from functools import partial

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Metric, generate_latest
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ..config.engine_config import EngineConfig
from ..config.request import Request
from ..jobs.pool import WORKER_STATES, WorkerState
from ..jobs.queue import JobManager
from ..jobs.replica import Outcome
from ..progress import peak_rss
from .responses import public_path

BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0)


class _Registry(CollectorRegistry):
    """A registry without the creation times that prometheus_client adds to every counter as a series of its own."""

    def collect(self) -> Iterable[Metric]:
        for metric in super().collect():
            metric.samples = [sample for sample in metric.samples if not sample.name.endswith("_created")]
            yield metric


class Metrics:
    """Counters since the start of one server. Safe from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._registry = _Registry()
        counter, gauge = partial(Counter, registry=self._registry), partial(Gauge, registry=self._registry)
        self._requests = counter("lightx2v_api_request_total", "HTTP requests.", ("route", "method", "status"))
        self._seconds = Histogram(
            "lightx2v_api_request_seconds", "Duration of HTTP requests.", buckets=BUCKETS, registry=self._registry
        )
        self._runs = counter("lightx2v_runs_total", "Runs by outcome.", ("outcome",))
        self._stages = counter("lightx2v_stage_seconds_total", "Seconds of successful runs by stage.", ("stage",))
        self._vram = gauge("lightx2v_peak_vram_bytes", "Largest GPU memory of a run.")
        self._jobs = gauge("lightx2v_jobs", "Jobs by state.", ("state",))
        self._limit = gauge("lightx2v_queue_limit", "Number of jobs that may wait.")
        self._alive = gauge("lightx2v_worker_alive", "1 while jobs can run, else 0.")
        self._workers = gauge("lightx2v_workers", "Workers by state.", ("state",))
        self._loaded = gauge("lightx2v_worker_loaded", "1 for the model that a worker has loaded.", ("worker", "model"))
        self._used = gauge("lightx2v_worker_memory_used_bytes", "Memory in use where a worker is.", ("worker",))
        self._total = gauge("lightx2v_worker_memory_bytes", "Memory where a worker is.", ("worker",))
        self._rate = gauge("lightx2v_jobs_per_minute", "Jobs that succeeded in the last ten minutes, per minute.")
        self._backlog = gauge("lightx2v_backlog_seconds", "Predicted seconds until the last queued job starts.")
        self._rss = gauge("lightx2v_peak_rss_bytes", "Largest host memory of the process since its last run began.")
        self._peak = 0

    def observe_request(self, route: str, method: str, status: int, seconds: float) -> None:
        self._requests.labels(route, method, str(status)).inc()
        self._seconds.observe(seconds)

    def observe_run(self, config: EngineConfig, request: Request, outcome: Outcome) -> None:
        """Count a run that ended. This is an `OnFinished` of the job queue."""
        if outcome.report is None:
            self._runs.labels("cancelled" if outcome.cancelled else "failed").inc()
            return
        self._runs.labels("succeeded").inc()
        timings = outcome.report["timings"]
        for stage, seconds in timings["seconds"].items():
            self._stages.labels(stage).inc(seconds)
        with self._lock:
            self._peak = max(self._peak, *(peak["allocated"] for peak in (timings["peak_vram"] or {}).values()), 0)
            self._vram.set(self._peak)

    def text(self, jobs: JobManager, *, operator: bool = True) -> str:
        """All metrics in Prometheus' text format, with the current state of the queue; for its operator also with what
        each worker has loaded and uses."""
        with self._lock:  # a second request must not see gauges that are being set
            return self._text(jobs, operator)

    def _text(self, jobs: JobManager, operator: bool) -> str:
        self._limit.set(jobs.max_queue)
        self._alive.set(jobs.alive)
        self._rss.set(peak_rss())
        self._jobs.clear()
        if jobs.alive:
            for state, count in jobs.counts().items():
                self._jobs.labels(state).set(count)
            self._rate.set(jobs.per_minute())
            self._backlog.set(jobs.backlog())
        self._set_workers(jobs.workers(), each=operator)
        return generate_latest(self._registry).decode()

    def _set_workers(self, workers: Sequence[WorkerState], *, each: bool) -> None:
        for gauge in (self._loaded, self._used, self._total):  # those of workers that have left
            gauge.clear()
        for state in WORKER_STATES:
            self._workers.labels(state).set(sum(worker.state == state for worker in workers))
        for worker in workers if each else ():
            if worker.loaded is not None:
                self._loaded.labels(worker.name, public_path(worker.loaded.preset)).set(1)
            for gauge, bytes in ((self._used, worker.status.memory_used), (self._total, worker.status.memory_total)):
                if bytes is not None:
                    gauge.labels(worker.name).set(bytes)


class MetricsMiddleware:
    """ASGI middleware that reports every request to `metrics`."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app, self._metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started, status = time.perf_counter(), 500

        async def send_and_note(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, send_and_note)
        finally:
            # Clients choose unknown paths and methods, so these share one label each.
            route = getattr(scope.get("route"), "path", "none")
            method = scope["method"] if route != "none" else "any"
            self._metrics.observe_request(route, method, status, time.perf_counter() - started)
