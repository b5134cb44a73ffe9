"""Metrics: counters of requests and runs for Prometheus, and the middleware that counts requests.

Requests are counted per route template, never per address, so that the number of series is bounded.
"""

import time
from collections.abc import Iterable
from functools import partial

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Metric, generate_latest
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ..config.engine_config import EngineConfig
from ..config.request import Request
from ..jobs.queue import JobManager
from ..jobs.replica import Outcome
from ..progress import peak_rss

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
        self._alive = gauge("lightx2v_worker_alive", "1 while the worker runs jobs, else 0.")
        self._rss = gauge("lightx2v_peak_rss_bytes", "Largest host memory of the process since its last run began.")
        self._peak = 0

    def observe_request(self, route: str, method: str, status: int, seconds: float) -> None:
        self._requests.labels(route, method, str(status)).inc()
        self._seconds.observe(seconds)

    def observe_run(self, config: EngineConfig, request: Request, outcome: Outcome) -> None:
        """Count a run that ended. This is an `OnFinished` of the job queue, whose one worker calls it."""
        if outcome.report is None:
            self._runs.labels("cancelled" if outcome.cancelled else "failed").inc()
            return
        self._runs.labels("succeeded").inc()
        timings = outcome.report["timings"]
        for stage, seconds in timings["seconds"].items():
            self._stages.labels(stage).inc(seconds)
        self._peak = max(self._peak, *(peak["allocated"] for peak in (timings["peak_vram"] or {}).values()), 0)
        self._vram.set(self._peak)

    def text(self, jobs: JobManager) -> str:
        """All metrics in Prometheus' text format, with the current state of the queue."""
        self._limit.set(jobs.max_queue)
        self._alive.set(jobs.alive)
        self._rss.set(peak_rss())
        self._jobs.clear()
        for state, count in (jobs.counts() if jobs.alive else {}).items():
            self._jobs.labels(state).set(count)
        return generate_latest(self._registry).decode()


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
