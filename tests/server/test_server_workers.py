"""The workers over HTTP: the operator sees and drains them, everybody else sees only their own jobs."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from fake_replica import FakeReplica
from job_runs import hold
from patience import PATIENCE, eventually
from prometheus_client.parser import text_string_to_metric_families
from served import SIZE, T2V, Served, listening, serve

KEYS = ("a-key-of-some-length", "another-key-of-length")
OPERATOR = "the-operators-own-key"


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def workers(served: Served, key: str = "") -> dict[str, dict[str, Any]]:
    answer = served.client.get("/v1/workers", headers=bearer(key) if key else {})
    assert answer.status_code == 200, answer.text
    assert answer.json()["object"] == "list"
    return {worker["id"]: worker for worker in answer.json()["data"]}


def test_several_running_jobs_show_each_its_own_progress_and_the_workers_show_them(tmp_path: Path) -> None:
    first, second = FakeReplica("node1/gpu-0", device="H200"), FakeReplica("node2/gpu-0")
    with serve(tmp_path, None, predict=lambda *_, loaded, **__: 9.0 if loaded else 9.001) as served:
        served.jobs.remove_replica("this machine")
        events = [hold(first.garage, "a", at=("denoise", 2)), hold(first.garage, "b", at=("denoise", 4))]
        second.garage.script = first.garage.script
        for replica in (first, second):
            served.jobs.add_replica(replica)
        ids = {prompt: served.submit(prompt) for prompt in "ab"}
        waits = served.submit("c")
        view = lambda id: served.client.get(f"/v1/videos/{id}").json()  # noqa: E731
        eventually(lambda: (view(ids["a"])["progress"], view(ids["b"])["progress"]) == (25, 75))
        assert view(waits)["status"] == "queued" and view(waits)["position"] == 1 and view(waits)["starts_in"] > 0
        shown = workers(served)
        assert {worker["job"]: worker["progress"] for worker in shown.values()} == {ids["a"]: 25, ids["b"]: 75}
        assert list(shown) == ["node1/gpu-0", "node2/gpu-0"]
        one = shown["node1/gpu-0"]
        assert (one["device"], one["machine"]) == ("H200", "host of node1/gpu-0")
        assert (one["memory_used"], one["memory"]) == (3 * 2**30, 8 * 2**30)
        assert (one["status"], one["drained"], one["model"]) == ("running", False, T2V)
        status = served.client.get("/v1/tasks/queue/status").json()
        assert status["pending_count"] == 1 and served.client.get("/v1/service/status").json()["queue_size"] == 1
        assert len(served.client.get("/v1/service/status").json()["active_tasks"]) == 3
        for event in events:
            event.set()
        assert [served.end_of(id)["status"] for id in (*ids.values(), waits)] == ["completed"] * 3


def test_the_event_streams_of_jobs_that_run_at_once_stay_apart(tmp_path: Path) -> None:
    replicas = [FakeReplica("gpu-0"), FakeReplica("gpu-1")]
    with serve(tmp_path, None, predict=lambda *_, loaded, **__: 9.0 if loaded else 9.001) as served:
        served.jobs.remove_replica("this machine")
        garage = replicas[0].garage
        events = [hold(garage, name, at=("denoise", 2), steps=steps) for name, steps in (("a", 4), ("b", 7))]
        replicas[1].garage.script = garage.script
        for replica in replicas:
            served.jobs.add_replica(replica)
        ids = [served.submit(prompt) for prompt in "ab"]

        def watch(id: str) -> list[dict[str, Any]]:
            with client.stream("GET", f"/v1/videos/{id}/events") as stream:
                data = [line.removeprefix("data: ") for line in stream.iter_lines() if line.startswith("data: ")]
            return [json.loads(line) for line in data]

        with listening(served) as client, ThreadPoolExecutor(2) as pool:
            streams = [pool.submit(watch, id) for id in ids]
            eventually(lambda: all(replica.garage.started.is_set() for replica in replicas))
            for event in events:
                event.set()
            for id, total, stream in zip(ids, (4, 7), streams, strict=True):
                seen = stream.result(PATIENCE)
                steps = [it["step"] for it in seen if it.get("stage") == "denoise"]
                assert steps == list(range(1, total + 1))
                assert (seen[-1]["id"], seen[-1]["status"]) == (id, "completed")


def test_the_operator_drains_a_worker_and_puts_it_back(tmp_path: Path) -> None:
    with serve(tmp_path, keys=KEYS, operator=OPERATOR) as served:
        event = hold(served.garage, "held", saves=b"half of it")
        body = {"prompt": "held", **SIZE}
        id = served.client.post("/v1/videos", json=body, headers=bearer(KEYS[0])).json()["id"]
        assert served.garage.started.wait(PATIENCE)
        drained = served.client.post("/v1/workers/this machine/drain", headers=bearer(OPERATOR))
        assert drained.status_code == 200 and drained.json()["drained"] is True
        eventually(lambda: workers(served, OPERATOR)["this machine"]["status"] == "drained")
        video = served.client.get(f"/v1/videos/{id}", headers=bearer(KEYS[0])).json()
        assert video["status"] == "queued" and served.client.get("/health", headers=bearer(KEYS[0])).status_code == 200
        event.set()
        assert (
            served.client.post("/v1/workers/this machine/resume", headers=bearer(OPERATOR)).json()["drained"] is False
        )
        assert served.jobs.wait(id, PATIENCE).state == "succeeded" and served.garage.went_on_from[-1] == b"half of it"
        for name in ("nobody", "a/b", "x" * 300):
            answer = served.client.post(f"/v1/workers/{name}/drain", headers=bearer(OPERATOR))
            assert answer.status_code in (404, 422) and len(answer.text) < 400


@pytest.mark.parametrize("operator", ["", OPERATOR])
def test_other_keys_neither_see_nor_change_workers_nor_each_others_jobs(operator: str, tmp_path: Path) -> None:
    with serve(tmp_path, keys=KEYS, operator=operator) as served:
        served.jobs.add_replica(FakeReplica("node1/gpu-0", device="a secret device"))
        own = served.client.post("/v1/videos", json={"prompt": "x", **SIZE}, headers=bearer(KEYS[0])).json()["id"]
        for key in KEYS:
            calls = [("GET", "/v1/workers"), ("POST", "/v1/workers/node1/gpu-0/drain")]
            for method, path in (*calls, ("POST", "/v1/workers/this machine/resume")):
                answer = served.client.request(method, path, headers=bearer(key))
                assert answer.status_code == 403 and "--operator_key" in answer.text
            assert "gpu-0" not in served.client.get("/metrics", headers=bearer(key)).text
        assert served.client.get("/v1/workers").status_code == 401
        for key in (KEYS[1], operator or KEYS[1]):
            assert served.client.get(f"/v1/videos/{own}", headers=bearer(key)).status_code == 404
        assert not any(worker.paused for worker in served.jobs.workers())


def test_the_metrics_of_each_worker_are_the_operators(tmp_path: Path) -> None:
    with serve(tmp_path, keys=KEYS, operator=OPERATOR) as served:
        served.jobs.remove_replica("this machine")
        for name in ("gpu-0", "gpu-1"):
            served.jobs.add_replica(FakeReplica(name))
        served.jobs.drain("gpu-1")
        body = {"prompt": "x", **SIZE}
        id = served.client.post("/v1/videos", json=body, headers=bearer(KEYS[0])).json()["id"]
        served.jobs.wait(id, PATIENCE)

        def series(key: str) -> dict[str, float]:
            text = served.client.get("/metrics", headers=bearer(key)).text
            samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
            return {sample.name + json.dumps(sample.labels, sort_keys=True): sample.value for sample in samples}

        eventually(lambda: series(OPERATOR)['lightx2v_workers{"state": "idle"}'] == 1)
        all_of_it, some = series(OPERATOR), series(KEYS[0])
        assert some['lightx2v_workers{"state": "drained"}'] == 1 and some["lightx2v_jobs_per_minute{}"] == 0.1
        assert all_of_it[f'lightx2v_worker_loaded{{"model": "{T2V}", "worker": "gpu-0"}}'] == 1
        assert all_of_it['lightx2v_worker_memory_used_bytes{"worker": "gpu-1"}'] == 3 * 2**30
        assert all_of_it['lightx2v_worker_memory_bytes{"worker": "gpu-1"}'] == 8 * 2**30
        assert not any("gpu-" in name for name in some)
        served.jobs.remove_replica("gpu-1")
        assert not any("gpu-1" in name for name in series(OPERATOR)), "a worker that has left leaves no series"
