"""python -m lightx2v.server: flags, access, loading before the port opens, a clean end."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn
from fake_engine import FakeEngine, Garage, Script
from model_tree import comfy_tree, style_lora
from patience import PATIENCE, eventually, free_port
from served import T2V

from lightx2v.config.model_paths import PROJECT
from lightx2v.errors import CheckpointError
from lightx2v.jobs.queue import JobManager
from lightx2v.server import command

TUTORIAL = ["--model_cls", "wan2.2_moe", "--task", "t2v", "--model_path", "somewhere"]
CONFIG = ["--config_json", "configs/wan22/wan_moe_t2v.json"]
KEY = "a-key-of-some-length"


@pytest.fixture(autouse=True)
def without_a_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LIGHTX2V_API_KEY", raising=False)
    monkeypatch.delenv("LIGHTX2V_OPERATOR_KEY", raising=False)


@pytest.mark.slow
def test_the_server_itself_needs_no_torch() -> None:
    code = "import sys, lightx2v.server.command, lightx2v.server.application; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=PROJECT)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.7", "example.org"])
def test_other_machines_need_a_key(host: str, capsys: pytest.CaptureFixture[str]) -> None:
    garage = Garage()
    assert command.main([*TUTORIAL, *CONFIG, "--host", host, "--port", "8000"], open_engine=garage) == 2
    said = capsys.readouterr().err
    assert "needs a key" in said and "LIGHTX2V_API_KEY" in said and not garage.opened


@pytest.mark.parametrize(
    ("flags", "word"),
    [
        ([], "No model to serve"),
        (["--preset", T2V, "--config_json", "x.json"], "Keep one of them"),
        (["--preset", "nothing"], "There is no preset"),
        (["--preset", T2V, "--api_key", "short"], "at least 12 characters"),
        *(
            (
                ["--preset", T2V, "--api_key", KEY, "--api_key", f"{KEY}{char}b"],
                f"API key 2 holds the character {char!a}",
            )
            for char in "\n\r\t\0\x1b\x7f\u00fc\u200b\ud83d"
        ),
        (["--preset", T2V, "--operator_key", "short"], "at least 12 characters"),
        (["--preset", T2V, "--api_key", KEY, "--operator_key", f"a\x07{KEY}"], "API key 2 holds the character"),
        (["--preset", T2V, "--port", "many"], "argument --port: invalid int value: 'many'"),
        (["--preset", T2V, "--max_queue_size", "0"], "from 1 to 10000"),
        (["--preset", T2V, "--result_ttl_hours", "-1"], "from 0 to 1e9"),
        (["--preset", T2V, "--hots", "::1"], "unknown flag --hots. Did you mean --host?"),
    ],
)
def test_wrong_flags_are_reported_before_anything_is_loaded(
    flags: list[str], word: str, capsys: pytest.CaptureFixture[str]
) -> None:
    garage = Garage()
    assert command.main(flags, open_engine=garage) == 2
    assert word in capsys.readouterr().err and not garage.opened


def test_a_model_that_does_not_load_ends_the_program_before_the_port_opens(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    garage = Garage(open_error=CheckpointError("The model is not complete."))
    assert command.main(["--preset", T2V, "--output_dir", str(tmp_path)], open_engine=garage) == 1
    assert "The model is not complete." in capsys.readouterr().err


@pytest.mark.slow
def test_an_unusable_folder_is_reported_before_the_model_is_loaded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    garage, file = Garage(), tmp_path / "file"
    file.touch()
    flags = ["--preset", T2V, "--port", str(free_port()), "--output_dir"]
    assert command.main([*flags, str(file)], open_engine=garage) == 1
    assert "jobs.sqlite cannot be opened" in capsys.readouterr().err
    with JobManager(Garage(), tmp_path):
        assert command.main([*flags, str(tmp_path)], open_engine=garage) == 2
    assert "Another process is already using the jobs" in capsys.readouterr().err and not garage.opened


class Stopped:
    """Runs the command in this thread and stops its server once `visit` has seen it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, visit: Any) -> None:
        run = uvicorn.Server.run
        self.seen: list[Any] = []
        self.failure: list[BaseException] = []

        def watched(server: uvicorn.Server, *more: Any) -> None:
            def watch() -> None:
                while not server.started:
                    time.sleep(0.01)
                url = f"http://127.0.0.1:{server.config.port}"
                try:
                    with httpx.Client(base_url=url, trust_env=False, timeout=PATIENCE) as http:
                        self.seen.append(visit(http))
                except BaseException as error:
                    self.failure.append(error)
                server.should_exit = True

            thread = threading.Thread(target=watch)
            thread.start()
            run(server, *more)
            thread.join()

        monkeypatch.setattr(uvicorn.Server, "run", watched)


def made(http: httpx.Client, **headers: str) -> dict[str, Any]:
    job = http.post("/v1/tasks/video/", json={"prompt": "a cat"}, headers=headers).json()
    while (task := http.get(f"/v1/tasks/{job['task_id']}/status", headers=headers).json())["end_time"] is None:
        time.sleep(0.01)
    return task


@pytest.mark.slow
def test_the_tutorials_command_serves_the_model_that_was_loaded_once(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("LIGHTX2V_OUTPUT_DIR", str(tmp_path / "out"))
    garage, port = Garage(), free_port()
    run = Stopped(monkeypatch, lambda http: (len(garage.opened), made(http), made(http)))
    assert command.main([*TUTORIAL, *CONFIG, "--port", str(port)], open_engine=garage) == 0
    (seen,) = run.seen
    assert seen[0] == 1 and seen[1]["status"] == seen[2]["status"] == "completed"
    assert len(garage.opened) == 1 and garage.alive == 0, "opened once, before the port, and closed at the end"
    assert garage.opened[0].model_path == "somewhere" and garage.opened[0].task == "t2v"
    assert len(list((tmp_path / "out").glob("*.mp4"))) == 2


@pytest.mark.slow
def test_found_loras_are_used_by_the_names_that_the_operator_offers(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    models = comfy_tree(tmp_path)
    style_lora(models)
    style_lora(models, "style_new.safetensors")

    def visit(http: httpx.Client) -> tuple[str, list[int]]:
        listed = eventually(lambda: (found := http.get("/v1/loras")).json()["data"] and found.text)
        names = ("watercolour", "style_new", "style_new.safetensors", str(models / "loras/watercolour.safetensors"))
        bodies = [{"prompt": "a cat", "loras": [{"path": name}]} for name in names]
        return listed, [http.post("/v1/videos", json=body).status_code for body in bodies]

    run = Stopped(monkeypatch, visit)
    flags = ["--preset", T2V, "--port", str(free_port()), "--output_dir", str(tmp_path / "out"), "--offer", "water*"]
    assert command.main([*flags, "--model_dirs", str(models)], open_engine=Garage()) == 0 and not run.failure
    listed, codes = run.seen[0]
    assert "watercolour" in listed and "style_new" not in listed and str(tmp_path) not in listed
    assert codes == [200, 422, 422, 422]


@pytest.mark.slow
def test_a_signal_ends_it_and_the_running_job_goes_on_at_the_next_start(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    garage = Garage(script={"long": Script(hold=threading.Event())})

    def visit(http: httpx.Client) -> str:
        id = http.post("/v1/videos", json={"prompt": "long"}).json()["id"]
        assert garage.started.wait(PATIENCE)
        os.kill(os.getpid(), signal.SIGTERM)
        return id

    run = Stopped(monkeypatch, visit)
    flags = ["--preset", T2V, "--port", str(free_port()), "--output_dir", str(tmp_path), "--save_every", "3"]
    assert command.main(flags, open_engine=garage) == 128 + signal.SIGTERM
    assert garage.alive == 0 and garage.save_every == [3.0]
    with JobManager(Garage(), tmp_path) as jobs:
        assert jobs.wait(run.seen[0], PATIENCE).state == "succeeded"


@pytest.mark.slow
def test_very_many_connections_are_refused_and_headers_without_end_cut(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(command, "MAX_CONNECTIONS", 20)

    def visit(http: httpx.Client) -> tuple[list[int], bytes]:
        address = (http.base_url.host, http.base_url.port)

        def health() -> int:
            return http.get("/health").status_code

        codes = [health()]
        idle = [socket.create_connection(address) for _ in range(20)]
        codes.append(eventually(lambda: (code := health()) != 200 and code))  # once they are accepted
        for connection in idle:
            connection.close()
        codes.append(eventually(lambda: (code := health()) != 503 and code))
        with socket.create_connection(address, PATIENCE) as endless:
            with contextlib.suppress(OSError):
                endless.sendall(b"GET / HTTP/1.1\r\nX: " + b"a" * 10_000_000)
            answer = endless.recv(20)
        return codes, answer

    run = Stopped(monkeypatch, visit)
    flags = ["--preset", T2V, "--port", str(free_port()), "--output_dir", str(tmp_path)]
    assert command.main(flags, open_engine=Garage()) == 0 and not run.failure, run.failure
    codes, answer = run.seen[0]
    assert codes == [200, 503, 200] and answer.startswith(b"HTTP/1.1 400")


@pytest.mark.slow
def test_an_engine_that_no_job_used_is_closed_too(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    garage = Garage()
    flags = ["--preset", T2V, "--port", str(free_port()), "--output_dir", str(tmp_path), "--api_key", KEY]
    run = Stopped(
        monkeypatch, lambda http: [http.get("/v1/videos", auth=("", key)).status_code for key in (KEY, "wrong")]
    )
    assert command.main(flags, open_engine=garage) == 0
    assert run.seen == [[200, 401]] and garage.alive == 0


@pytest.mark.slow
def test_warming_up_runs_both_experts_briefly_and_leaves_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    requests = []
    run_engine = FakeEngine.run

    def noted(engine: FakeEngine, request: Any, **more: Any) -> Any:
        requests.append(request)
        return run_engine(engine, request, **more)

    monkeypatch.setattr(FakeEngine, "run", noted)
    Stopped(monkeypatch, lambda http: http.get("/ready").status_code)
    for preset in (T2V, "demo_i2v_base"):
        flags = ["--preset", preset, "--warmup", "--port", str(free_port()), "--output_dir", str(tmp_path)]
        assert command.main(flags, open_engine=Garage()) == 0
    distilled, base = requests
    assert (distilled.frames, distilled.denoising_step_list, distilled.boundary_step_index) == (5, (1000, 250), 1)
    assert (base.frames, base.steps, base.task) == (5, 2, "i2v")
    assert not list(tmp_path.glob("*.mp4"))


def test_a_port_in_use_is_reported_before_anything_is_loaded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        flags = ["--preset", T2V, "--port", str(taken.getsockname()[1]), "--output_dir", str(tmp_path)]
        garage = Garage()
        assert command.main(flags, open_engine=garage) == 2
    assert "Cannot listen on" in capsys.readouterr().err and not garage.opened


@pytest.mark.slow
def test_two_servers_on_one_folder_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    garage = Garage()
    with JobManager(Garage(), tmp_path):
        assert command.main(["--preset", T2V, "--output_dir", str(tmp_path)], open_engine=garage) == 2
    assert "Another process is already using the jobs" in capsys.readouterr().err and garage.alive == 0


@pytest.mark.slow
def test_a_config_file_is_used(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file = tmp_path / "mine.json"
    file.write_text(json.dumps({"infer_steps": 7, "target_height": 64, "target_width": 64, "target_video_length": 5}))
    run = Stopped(monkeypatch, lambda http: http.get("/v1/models").json()["data"][0]["id"])
    flags = [*TUTORIAL, "--config_json", str(file), "--port", str(free_port()), "--output_dir", str(tmp_path / "out")]
    assert command.main(flags, open_engine=Garage()) == 0
    assert run.seen == ["mine"]
