"""The queue behind the routes: bounded and in order; it survives failures, cancels and restarts."""

from __future__ import annotations

import shutil
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from fake_engine import Garage, Script
from patience import PATIENCE
from served import SIZE, serve


@pytest.mark.slow
def test_of_fifty_submissions_at_once_the_queue_takes_ten_and_refuses_the_others(tmp_path: Path) -> None:
    hold = threading.Event()
    garage = Garage(script={"first": Script(hold=hold)})
    with serve(tmp_path, garage, max_queue=10) as served:
        first = served.submit("first")
        assert garage.started.wait(PATIENCE)
        with ThreadPoolExecutor(16) as pool:
            bodies = [{"prompt": f"number {n}", **SIZE} for n in range(50)]
            answers = list(pool.map(lambda body: served.client.post("/v1/videos", json=body), bodies))
        assert Counter(answer.status_code for answer in answers) == {200: 10, 429: 40}
        full = next(answer for answer in answers if answer.status_code == 429)
        assert full.json()["error"]["position"] == 11 and full.headers["retry-after"]
        assert sorted(answer.json()["position"] for answer in answers if answer.status_code == 200) == list(
            range(1, 11)
        )
        assert served.client.get("/ready").status_code == 503 and served.client.get("/health").status_code == 200
        hold.set()
        taken = sorted((a.json() for a in answers if a.status_code == 200), key=lambda job: job["position"])
        ends = [served.end_of(id) for id in (first, *(job["id"] for job in taken))]
    assert {end["status"] for end in ends} == {"completed"}
    assert garage.most_running == 1 and garage.ran[1:] == [job["prompt"] for job in taken]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("error", "word"),
    [
        (MemoryError(), "Out of memory. Make the video smaller"),
        (RuntimeError("CUDA out of memory. Tried to allocate"), "Out of memory. Make the video smaller"),
        (ZeroDivisionError("at step"), "Internal error (ZeroDivisionError)"),
        (OSError(28, "No space left"), "The disk is full"),
    ],
)
def test_a_failing_job_says_what_to_do_and_the_next_one_runs(tmp_path: Path, error: BaseException, word: str) -> None:
    with serve(tmp_path, Garage(script={"bad": Script(error=error)})) as served:
        bad, good = served.submit("bad"), served.submit("good")
        failed = served.end_of(bad)
        assert failed["status"] == "failed" and word in failed["error"]["message"]
        assert served.end_of(good)["status"] == "completed"
        task = served.client.get(f"/v1/tasks/{bad}/status").json()
        assert task["status"] == "failed" and task["error"] == failed["error"]["message"]
        assert 'lightx2v_runs_total{outcome="failed"} 1' in served.client.get("/metrics").text


@pytest.mark.slow
@pytest.mark.parametrize("at", [("text", 1), ("denoise", 2), ("decode", 3), ("write", 1)])
def test_a_cancelled_job_stays_cancelled(tmp_path: Path, at: tuple[str, int]) -> None:
    garage = Garage(script={"hold": Script(hold=threading.Event(), at=at)})
    with serve(tmp_path, garage) as served:
        id, after = served.submit("hold"), served.submit("after")
        assert garage.started.wait(PATIENCE)
        for _ in range(2):
            assert served.client.delete(f"/v1/tasks/{id}").status_code == 200
        assert served.end_of(id)["status"] == "cancelled"
        assert served.end_of(after)["status"] == "completed"
        assert served.client.get(f"/v1/videos/{id}").json()["status"] == "cancelled"
        assert served.client.get(f"/v1/videos/{id}/content").status_code == 404
        assert not (tmp_path / f"{id}.mp4").exists()


@pytest.mark.slow
def test_a_cancel_that_comes_too_late_to_stop_the_engine_still_holds(tmp_path: Path) -> None:
    hold = threading.Event()
    garage = Garage(script={"deaf": Script(hold=hold, at=("write", 4), ignore_cancel=True)})
    with serve(tmp_path, garage) as served:
        id = served.submit("deaf")
        assert garage.started.wait(PATIENCE)
        assert served.client.delete(f"/v1/videos/{id}").json()["cancelling"]
        hold.set()
        assert served.end_of(id)["status"] == "cancelled"
        assert not (tmp_path / f"{id}.mp4").exists()


@pytest.mark.slow
def test_jobs_names_and_results_survive_a_restart_and_the_running_one_goes_on(tmp_path: Path) -> None:
    garage = Garage(script={"hold": Script(hold=threading.Event())})
    with serve(tmp_path, garage) as served:
        done = served.submit("done", file_name="kept.mp4")
        served.end_of(done)
        running, waiting = served.submit("hold", client_id="mine"), served.submit("waiting", file_name="late.mp4")
        assert garage.started.wait(PATIENCE)
    with serve(tmp_path) as served:
        assert served.client.get("/v1/files/download/kept.mp4").status_code == 200
        assert served.client.get("/v1/videos/mine").json()["id"] == running
        assert served.end_of(waiting)["status"] == "completed"
        assert served.garage.ran == ["hold", "waiting"] and served.end_of(running)["status"] == "completed"
        assert served.client.post(f"/v1/videos/{running}/requeue").status_code == 422


@pytest.mark.slow
def test_a_server_whose_output_folder_is_a_file_is_not_ready(tmp_path: Path) -> None:
    with serve(tmp_path / "out") as served:
        assert served.client.get("/ready").status_code == 200
        shutil.rmtree(tmp_path / "out")
        (tmp_path / "out").write_text("mine")
        answer = served.client.get("/ready")
        assert answer.status_code == 503 and "Not a directory" in answer.json()["error"]["message"]
        (tmp_path / "out").unlink()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_dead_worker_turns_health_red_and_old_ids_still_answer(tmp_path: Path) -> None:
    with serve(tmp_path, Garage(script={"die": Script(error=SystemExit(1))})) as served:
        done = served.submit("done")
        served.end_of(done)
        for path in ("/health", "/ready"):
            assert served.client.head(path).status_code == 200 and not served.client.head(path).content
        id = served.submit("die")
        assert served.end_of(id)["status"] == "interrupted"
        for path in ("/health", "/ready"):
            assert served.client.get(path).status_code == served.client.head(path).status_code == 503
        assert served.client.get(f"/v1/videos/{done}/content").status_code == 200
        assert served.client.get(f"/v1/videos/{'0' * 32}").status_code == 404
        assert served.client.post("/v1/videos", json={"prompt": "more", **SIZE}).status_code == 429
        assert "lightx2v_worker_alive 0" in served.client.get("/metrics").text


@pytest.mark.slow
def test_results_are_deleted_after_their_time_and_beyond_the_cap(tmp_path: Path) -> None:
    now = [1000.0]
    with serve(tmp_path, ttl=3600.0, size_cap=5000, clock=lambda: now[0]) as served:
        old = served.submit("old", file_name="old")
        served.end_of(old)
        now[0] += 4000
        ids = [served.submit(f"new {n}") for n in range(4)]
        served.end_of(ids[-1])
        served.jobs.purge()
        assert served.client.get(f"/v1/videos/{old}").status_code == 404
        assert not list(tmp_path.glob(f"{old}*"))
        left = [id for id in ids if served.client.get(f"/v1/videos/{id}/content").status_code == 200]
        assert left == ids[-2:]  # 1.8 kB each


@pytest.mark.slow
def test_a_client_that_disconnects_does_not_stop_its_job(tmp_path: Path) -> None:
    hold = threading.Event()
    garage = Garage(script={"long": Script(hold=hold)})
    with serve(tmp_path, garage) as served:
        id = served.submit("long")
        assert garage.started.wait(PATIENCE)
        served.client.close()
        hold.set()
        assert served.jobs.wait(id, PATIENCE).state == "succeeded"
