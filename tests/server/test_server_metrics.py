"""The metrics: what Prometheus reads, with types and help, and nothing shared between two servers."""

from __future__ import annotations

from pathlib import Path

import pytest
from fake_engine import Garage, Script
from prometheus_client.parser import text_string_to_metric_families
from served import Served, serve

pytestmark = pytest.mark.slow

FAMILIES = {
    "lightx2v_api_request": "counter",
    "lightx2v_api_request_seconds": "histogram",
    "lightx2v_runs": "counter",
    "lightx2v_stage_seconds": "counter",
    "lightx2v_peak_vram_bytes": "gauge",
    "lightx2v_jobs": "gauge",
    "lightx2v_queue_limit": "gauge",
    "lightx2v_worker_alive": "gauge",
    "lightx2v_peak_rss_bytes": "gauge",
    "lightx2v_workers": "gauge",
    "lightx2v_worker_loaded": "gauge",
    "lightx2v_worker_memory_used_bytes": "gauge",
    "lightx2v_worker_memory_bytes": "gauge",
    "lightx2v_jobs_per_minute": "gauge",
    "lightx2v_backlog_seconds": "gauge",
}


def samples(served: Served) -> dict[tuple[str, ...], float]:
    """{(name, label values in the order of their names): value}"""
    families = list(text_string_to_metric_families(served.client.get("/metrics").text))
    assert {family.name: family.type for family in families} == FAMILIES
    assert all(family.documentation for family in families)
    return {
        (sample.name, *(sample.labels[name] for name in sorted(sample.labels))): sample.value
        for family in families
        for sample in family.samples
    }


def test_requests_runs_and_the_queue_are_counted(tmp_path: Path) -> None:
    with serve(tmp_path, Garage(script={"bad": Script(error=ValueError())}), max_queue=7) as served:
        for prompt in ("good", "bad", "good"):
            served.end_of(served.submit(prompt))
        served.client.get("/unknown/path")
        seen = samples(served)
    assert seen["lightx2v_runs_total", "succeeded"] == 2 and seen["lightx2v_runs_total", "failed"] == 1
    assert seen["lightx2v_jobs", "succeeded"] == 2 and seen["lightx2v_jobs", "queued"] == 0
    assert seen["lightx2v_queue_limit",] == 7 and seen["lightx2v_worker_alive",] == 1
    assert seen["lightx2v_stage_seconds_total", "denoise"] > 0 and seen["lightx2v_peak_rss_bytes",] > 10**7
    assert seen["lightx2v_api_request_total", "POST", "/v1/videos", "200"] == 3
    assert seen["lightx2v_api_request_total", "any", "none", "404"] == 1, "clients choose unknown paths: one label"
    assert seen["lightx2v_api_request_seconds_count",] == seen["lightx2v_api_request_seconds_bucket", "+Inf"] == 7


def test_two_servers_in_one_process_count_for_themselves(tmp_path: Path) -> None:
    with serve(tmp_path / "a") as first, serve(tmp_path / "b") as second:
        first.end_of(first.submit())
        assert samples(first)["lightx2v_runs_total", "succeeded"] == 1
        assert ("lightx2v_runs_total", "succeeded") not in samples(second)
