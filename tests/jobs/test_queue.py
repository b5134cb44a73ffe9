"""The queue: one job after the other, nothing lost, nothing doubled, each to its owner."""

from __future__ import annotations

import io
import json
import re
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from fake_engine import Garage, Script, tiny_mp4
from job_runs import CONFIG, OTHER, PICTURED, ask, done, hold, start_held
from patience import PATIENCE
from PIL import Image

from lightx2v.config.engine_config import EngineConfig
from lightx2v.errors import BadRequest, Busy
from lightx2v.jobs import worker as job_worker
from lightx2v.jobs.queue import JobManager
from lightx2v.jobs.store import STATES, Job, UnknownJob
from lightx2v.media.mp4 import read_settings

# ---- one job --------------------------------------------------------------------------------------------------------


def test_a_job_becomes_a_video_with_its_report(manager: JobManager, tmp_path: Path) -> None:
    job = manager.submit(CONFIG, ask("a cat", seed=7), owner="alice", preset="t2v_base")
    assert job.state in ("queued", "running") and re.fullmatch("[0-9a-f]{32}", job.id)
    job = done(manager, job)
    assert job.state == "succeeded" and job.error is None
    assert job.path == tmp_path / f"{job.id}.mp4" and job.path.read_bytes() == tiny_mp4()
    assert read_settings(job.path)
    assert job.result is not None and job.result["seed"] == 7
    assert job.result["path"] == f"{job.id}.mp4" and job.result["preset"] == "t2v_base"
    assert job.config == CONFIG and job.request == ask("a cat", seed=7)
    assert job.started is not None and job.finished is not None and job.created <= job.started <= job.finished
    assert (job.owner, job.preset, job.position, job.progress, job.preview) == ("alice", "t2v_base", None, None, None)


def test_events_are_complete_and_in_order(manager: JobManager) -> None:
    job = done(manager, manager.submit(CONFIG, ask()))
    events = manager.events(job.id)
    assert [event.id for event in events] == list(range(1, len(events) + 1))
    states = [event.data["state"] for event in events if event.kind == "state"]
    assert states == ["queued", "running", "succeeded"]
    stages = list(dict.fromkeys(event.data["stage"] for event in events if event.kind == "progress"))
    assert stages == ["load", "text", "denoise", "decode", "write"]
    steps = [(e.data["step"], e.data["expert"]) for e in events if e.data.get("stage") == "denoise"]
    assert steps == [(1, "high"), (2, "high"), (3, "low"), (4, "low")]
    assert json.loads(json.dumps(events[5].data)) == events[5].data
    assert manager.events(job.id, after=len(events) - 1) == events[-1:]
    assert manager.events(job.id, after=10**30) == [] and manager.events(job.id, after=-5) == events


def test_progress_is_visible_while_it_runs(manager: JobManager, garage: Garage) -> None:
    job, event = start_held(manager, garage)
    job = manager.get(job.id)
    assert job.state == "running" and job.progress is not None
    assert (job.progress.stage, job.progress.step, job.progress.total) == ("denoise", 1, 4)
    event.set()
    assert done(manager, job).progress is None


def test_waiting_ends_at_its_timeout(manager: JobManager, garage: Garage) -> None:
    job, event = start_held(manager, garage)
    started = time.monotonic()
    assert manager.wait(job.id, 0.05).state == "running"
    assert 0.05 <= time.monotonic() - started < 2
    event.set()


@pytest.mark.slow
def test_previews_are_small_jpegs_at_most_twice_a_second(manager: JobManager, garage: Garage) -> None:
    calls: list[float] = []

    def preview() -> np.ndarray:
        calls.append(time.monotonic())
        return np.full((60, 104, 3), 200, np.uint8)

    event = hold(garage, steps=30, seconds=0.002, at=("denoise", 30), preview=preview)
    job = manager.submit(CONFIG, ask("held"))
    assert garage.started.wait(PATIENCE)
    shown = manager.get(job.id).preview
    assert shown is not None and Image.open(io.BytesIO(shown)).size == (104, 60)
    event.set()
    assert done(manager, job).preview is None
    assert all(later - earlier >= job_worker.PREVIEW_SECONDS for earlier, later in zip(calls, calls[1:], strict=False))
    assert b"\xff\xd8\xff" not in (manager.folder / "jobs.sqlite").read_bytes()


def test_a_preview_that_fails_is_tried_once_and_costs_only_the_preview(
    manager: JobManager, garage: Garage, caplog: pytest.LogCaptureFixture
) -> None:
    garage.script["blind"] = Script(preview=lambda: 1 / 0)
    job = done(manager, manager.submit(CONFIG, ask("blind")))
    assert job.state == "succeeded"
    assert caplog.text.count("continues without previews") == 1


def test_odd_ids_are_unknown_jobs(manager: JobManager) -> None:
    for id in ("", "0" * 32, "../x", "a" * 10**5, "\0", "\ud800", "%s", "' OR 1=1 --", 7, None):
        for method in (manager.get, manager.cancel, manager.requeue, manager.delete, manager.events, manager.wait):
            with pytest.raises(UnknownJob):
                method(id)  # type: ignore[operator]
        with pytest.raises(UnknownJob):
            manager.move(id, 1)  # type: ignore[arg-type]
    assert UnknownJob.status == 404
    with pytest.raises(UnknownJob):
        manager.find("nobody")


# ---- the queue ------------------------------------------------------------------------------------------------------


def test_jobs_run_in_order_and_know_their_place(manager: JobManager, garage: Garage) -> None:
    first, event = start_held(manager, garage)
    others = [manager.submit(CONFIG, ask(f"job {number}")) for number in range(4)]
    assert [job.position for job in others] == [1, 2, 3, 4]
    assert manager.get(first.id).position is None and manager.waiting == 4
    assert manager.counts() == {**dict.fromkeys(STATES, 0), "running": 1, "queued": 4}
    event.set()
    for job in others:
        assert done(manager, job).state == "succeeded"
    assert garage.ran == ["held", "job 0", "job 1", "job 2", "job 3"]


def test_a_full_queue_is_busy_and_says_how_full(open_manager: Callable[..., JobManager], garage: Garage) -> None:
    manager = open_manager(max_queue=2)
    _, event = start_held(manager, garage)
    waiting = [manager.submit(CONFIG, ask()) for _ in range(2)]
    with pytest.raises(Busy, match="2 jobs are waiting") as caught:
        manager.submit(CONFIG, ask("too many"))
    assert caught.value.status == 429
    cancelled = manager.cancel(waiting[0].id)
    manager.submit(CONFIG, ask("fits"))
    with pytest.raises(Busy):
        manager.requeue(cancelled.id)
    event.set()


def test_50_submissions_at_once_run_one_by_one(open_manager: Callable[..., JobManager], garage: Garage) -> None:
    manager = open_manager(max_queue=20)
    _, event = start_held(manager, garage)
    start = threading.Barrier(50)

    def submit(number: int) -> Job | Busy:
        start.wait()
        try:
            return manager.submit(CONFIG, ask(f"{number}"), owner=f"user {number}")
        except Busy as busy:
            return busy

    with ThreadPoolExecutor(50) as pool:
        answers = list(pool.map(submit, range(50)))
    jobs = [answer for answer in answers if isinstance(answer, Job)]
    assert len(jobs) == 20 and len({job.id for job in jobs}) == 20
    assert sorted(job.position or 0 for job in jobs) == list(range(1, 21))
    in_order = [job.request.prompt for job in sorted(jobs, key=lambda job: job.position or 0)]
    event.set()
    assert {done(manager, job).state for job in jobs} == {"succeeded"}
    assert garage.ran[1:] == in_order
    assert garage.most_running == 1


def test_a_job_can_be_moved(manager: JobManager, garage: Garage) -> None:
    _, event = start_held(manager, garage)
    a, b, c = (manager.submit(CONFIG, ask(name)) for name in "abc")
    assert manager.move(c.id, 1).position == 1
    assert manager.move(a.id, 99).position == 3
    d = manager.submit(CONFIG, ask("d"))
    assert d.position == 4
    event.set()
    done(manager, d)
    assert garage.ran == ["held", "c", "b", "a", "d"]
    with pytest.raises(BadRequest, match="succeeded; only a queued job can be moved"):
        manager.move(b.id, 1)


def test_a_waiting_job_can_be_changed_and_keeps_its_place(manager: JobManager, garage: Garage) -> None:
    held, event = start_held(manager, garage)
    first = manager.submit(CONFIG, ask("first"))
    manager.submit(CONFIG, ask("second"))
    changed = manager.edit(first.id, ask("better"))
    assert changed.position == 1 and changed.request.prompt == "better"
    with pytest.raises(BadRequest, match="running; only a queued job can be changed"):
        manager.edit(held.id, ask("no"))
    with pytest.raises(BadRequest, match="task"):
        manager.edit(first.id, ask(task="i2v", image_path="x.png"))
    event.set()
    done(manager, first)
    assert garage.ran[:2] == ["held", "better"]


@pytest.mark.slow
def test_a_waiting_job_can_be_given_another_engine_though_the_queue_is_full(
    manager: JobManager, garage: Garage
) -> None:
    _, event = start_held(manager, garage)
    jobs = [manager.submit(CONFIG, ask(str(n))) for n in range(manager.max_queue)]
    changed = manager.edit(jobs[1].id, ask("other"), config=OTHER, preset="another")
    assert (changed.position, changed.config, changed.preset) == (2, OTHER, "another")
    event.set()
    assert done(manager, changed).state == "succeeded"
    assert garage.ran[:3] == ["held", "0", "other"]


def test_a_job_the_engine_could_never_run_is_refused_when_submitted(manager: JobManager) -> None:
    with pytest.raises(BadRequest, match="task"):
        manager.submit(PICTURED, ask())
    assert manager.list() == []


def test_seconds_until_the_start_add_up(open_manager: Callable[..., JobManager], garage: Garage) -> None:
    manager = open_manager(predict=lambda config, request, **_: request.frames / 1.0, clock=lambda: 1000.0)
    garage.script["slow"] = Script(at=("text", 1), hold=(event := threading.Event()))
    manager.submit(CONFIG, ask("slow", frames=81))
    assert garage.started.wait(PATIENCE)
    jobs = [manager.submit(CONFIG, ask(frames=frames)) for frames in (5, 9, 13)]
    assert [manager.get(job.id).starts_in for job in jobs] == [81.0, 86.0, 95.0]
    assert [job.starts_in for job in manager.list(states=["queued"])] == [95.0, 86.0, 81.0]
    event.set()


# ---- one engine -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_engine_is_kept_while_the_config_is_equal_and_closed_before_another(
    manager: JobManager, garage: Garage
) -> None:
    equal = EngineConfig.from_json(CONFIG.to_json())
    for config in (CONFIG, equal, CONFIG, OTHER, OTHER, CONFIG):
        done(manager, manager.submit(config, ask()))
    assert garage.opened == [CONFIG, OTHER, CONFIG]
    assert garage.most == 1
    manager.close()
    assert garage.alive == 0


@pytest.mark.slow
def test_submitting_during_a_switch_waits_and_never_loads_two(manager: JobManager, garage: Garage) -> None:
    garage.open_seconds = 0.05
    configs = [CONFIG, OTHER] * 4
    jobs = [manager.submit(config, ask(f"{number}")) for number, config in enumerate(configs)]
    assert {done(manager, job).state for job in jobs} == {"succeeded"}
    assert garage.opened == configs and garage.most == 1


# ---- owners ---------------------------------------------------------------------------------------------------------


def test_owners_see_their_own_jobs_only(manager: JobManager) -> None:
    mine = [manager.submit(CONFIG, ask(f"mine {n}"), owner="me") for n in range(2)]
    yours = manager.submit(CONFIG, ask("yours"), owner="you")
    assert [job.id for job in manager.list("me")] == [job.id for job in reversed(mine)]
    assert [job.id for job in manager.list("you")] == [yours.id]
    assert manager.list("") == [] and manager.list("' OR 1 --") == []
    assert len(manager.list()) == 3 and len(manager.list(limit=2)) == 2 and manager.list(limit=-1) == []


def test_two_users_with_the_same_prompt_and_picture_share_nothing(manager: JobManager, tmp_path: Path) -> None:
    uploads = []
    for colour in ("red", "blue"):
        folder = tmp_path / colour
        folder.mkdir()
        Image.new("RGB", (32, 32), colour).save(folder / "image.png")
        uploads.append(folder / "image.png")
    request = [ask(task="i2v", image_path=str(path)) for path in uploads]
    a, b = (manager.submit(PICTURED, r, owner=o) for r, o in zip(request, "ab", strict=True))
    assert a.id != b.id and a.request.image_path != b.request.image_path
    for job, upload in ((a, uploads[0]), (b, uploads[1])):
        assert Path(job.request.image_path or "").read_bytes() == upload.read_bytes()
    a, b = done(manager, a), done(manager, b)
    assert a.path != b.path and a.path is not None and b.path is not None
    manager.delete(a.id)
    assert not a.path.exists() and b.path.exists()


def test_the_same_client_id_gives_the_same_job(manager: JobManager) -> None:
    def submit(number: int) -> Job:
        return manager.submit(CONFIG, ask("once"), owner="me", client_id="abc")

    with ThreadPoolExecutor(8) as pool:
        jobs = list(pool.map(submit, range(8)))
    assert len({job.id for job in jobs}) == 1 and len(manager.list()) == 1
    assert manager.find("abc", owner="me").id == jobs[0].id
    assert manager.submit(CONFIG, ask("once"), owner="you", client_id="abc").id != jobs[0].id
    with pytest.raises(BadRequest, match="used for another job"):
        manager.submit(CONFIG, ask("other"), owner="me", client_id="abc")
    done(manager, jobs[0])
    assert submit(0).state == "succeeded"


@pytest.mark.parametrize("label", ["x" * 201, "a\nb", "\0", "\ud800", "é", 7])
def test_labels_are_short_and_printable(label: object, manager: JobManager) -> None:
    for name in ("owner", "preset", "client_id"):
        with pytest.raises(BadRequest, match=name):
            manager.submit(CONFIG, ask(), **{name: label})  # type: ignore[arg-type]


# ---- pictures -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_picture_is_copied_so_the_upload_may_go(manager: JobManager, garage: Garage, tmp_path: Path) -> None:
    upload = tmp_path / "upload.png"
    Image.new("RGB", (32, 32), "red").save(upload)
    _, event = start_held(manager, garage)
    job = manager.submit(PICTURED, ask(task="flf2v", image_path=str(upload), last_frame_path=str(upload)))
    upload.unlink()
    own = [Path(job.request.image_path or ""), Path(job.request.last_frame_path or "")]
    assert len({*own}) == 2 and all(path.is_file() and path.name.startswith(job.id) for path in own)
    edited = manager.edit(job.id, replace(job.request, prompt="same pictures"))
    assert edited.request.image_path == job.request.image_path
    event.set()
    manager.delete(done(manager, job).id)
    assert not any(path.exists() for path in own)


def test_a_bad_picture_is_refused_when_submitted_and_leaves_nothing(manager: JobManager, tmp_path: Path) -> None:
    upload = tmp_path / "upload.png"
    Image.new("RGB", (32, 32), "red").save(upload)
    (tmp_path / "bad.png").write_bytes(b"GIF89a")
    before = set(tmp_path.iterdir())
    with pytest.raises(BadRequest, match="a GIF picture"):
        manager.submit(PICTURED, ask(task="flf2v", image_path=str(upload), last_frame_path=str(tmp_path / "bad.png")))
    assert set(tmp_path.iterdir()) == before and manager.list() == []
