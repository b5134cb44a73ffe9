"""ZeroGpuJobs: jobs run inside the block of the event that submitted them, and nowhere else."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from page_engine import Painter

from app.backend.offer import settings_of
from app.backend.zerogpu import MAX_SECONDS, MIN_SECONDS, UNKNOWN_SECONDS, ZeroGpuJobs, reserved_seconds
from lightx2v.config.request import Request
from lightx2v.cost.run_time import Prediction
from lightx2v.errors import BadRequest
from lightx2v.jobs.replica import LoadedModel, Outcome
from lightx2v.jobs.store import UnknownJob

SETTINGS = settings_of("demo_t2v_distill_lora")
LOADED = LoadedModel(SETTINGS.engine, "demo_t2v_distill_lora")


def request(prompt: str) -> Request:
    return Request(prompt=prompt, **{**SETTINGS.request, "seed": 3, "frames": 5})


@pytest.fixture
def outcomes() -> list[Outcome]:
    return []


@pytest.fixture
def jobs(tmp_path: Path, outcomes: list[Outcome]) -> ZeroGpuJobs:
    lend: Any = lambda duration: lambda run: run  # noqa: E731
    engine = Painter()(LOADED.config, preset=LOADED.preset)
    return ZeroGpuJobs(
        lend, engine, LOADED, tmp_path, predict=lambda config, request: None,
        on_finished=lambda config, request, outcome: outcomes.append(outcome),
    )  # fmt: skip


def test_a_job_runs_inside_the_block_and_is_reported(jobs: ZeroGpuJobs, outcomes: list[Outcome]) -> None:
    job = jobs.submit(LOADED.config, request("a red ball"), owner="alice", preset=LOADED.preset)
    with jobs.running([job.id]) as changes:
        steps = [jobs.get(job.id).progress for _ in changes]
    done = jobs.get(job.id)
    assert done.state == "succeeded" and done.path is not None and done.path.is_file()
    assert len(steps) > SETTINGS.request["steps"] and [outcome.report for outcome in outcomes] == [done.result]
    assert jobs.list("alice") == [done] and jobs.list("bob") == []
    jobs.delete(job.id)
    assert not done.path.exists()
    with pytest.raises(UnknownJob):
        jobs.get(job.id)


def test_leaving_the_block_cancels_all_its_jobs(jobs: ZeroGpuJobs) -> None:
    ids = [jobs.submit(LOADED.config, request(f"an endless {n}"), owner="alice").id for n in (1, 2)]
    with jobs.running(ids):
        pass  # as when the visitor leaves before the first answer
    assert [jobs.get(id).state for id in ids] == ["cancelled", "cancelled"]


def test_a_cancelled_job_stops_at_its_next_step(jobs: ZeroGpuJobs) -> None:
    job = jobs.submit(LOADED.config, request("a slow one"), owner="alice")
    with jobs.running([job.id]) as changes:
        next(changes)
        assert jobs.cancel(job.id).cancelling
        with pytest.raises(BadRequest, match="Cancel it first"):
            jobs.delete(job.id)
        assert list(changes) == []
        assert jobs.get(job.id).state == "cancelled" and not jobs.get(job.id).cancelling


def test_there_is_one_model_and_no_queue(jobs: ZeroGpuJobs) -> None:
    with pytest.raises(BadRequest, match="one model"):
        jobs.submit(replace(LOADED.config, cpu_offload=True), request("x"))
    job = jobs.submit(LOADED.config, request("x"))
    for change in (lambda: jobs.move(job.id, 1), lambda: jobs.edit(job.id, job.request, config=job.config, preset="")):
        with pytest.raises(BadRequest, match="only a queued job"):
            change()


@pytest.mark.parametrize(
    ("stages", "reserved"),
    [
        (None, UNKNOWN_SECONDS),
        ({"denoise": 1.0}, MIN_SECONDS),
        ({"load": 500.0, "denoise": 100.0, "write": 9.0}, 135),
        ({"denoise": 1000.0}, MAX_SECONDS),
    ],
)
def test_gpu_time_is_reserved_with_a_margin(stages: dict[str, float] | None, reserved: int) -> None:
    assert reserved_seconds(None if stages is None else Prediction(stages=stages, source="measured")) == reserved
