"""The tutorial's scripts and examples run as they are, on the demo model.

Each shell script is run with an interpreter that notes its arguments; the noted command is then carried out in this
process, where torch is loaded already. One of them and the server are run for real, in processes of their own.
"""

from __future__ import annotations

import json
import os
import re
import runpy
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest
from patience import PATIENCE, free_port

from lightx2v import infer
from lightx2v.config.model_paths import PROJECT
from lightx2v.media.mp4 import read_settings
from lightx2v.server import command

SCRIPTS = sorted((PROJECT / "scripts").rglob("run_*.sh"))
EXAMPLES = sorted((PROJECT / "examples" / "wan").glob("*.py"))
SMALL = {"target_height": 64, "target_width": 64, "target_video_length": 5}
TUTORIAL = """
wan22/run_wan22_moe_t2v.sh wan22/run_wan22_moe_i2v.sh
wan22/distill/run_wan22_moe_t2v_distill_lora_4step.sh wan22/distill/run_wan22_moe_i2v_distill_lora_4step.sh
wan22/distill/run_wan22_moe_i2v_distill_model_4step.sh wan22/distill/run_wan22_moe_i2v_distill_fp8_4step.sh
wan22/distill/run_wan22_moe_t2v_distill_lora_4step_cfg_ulysses.sh
wan22/distill/run_wan22_moe_i2v_distill_lora_4step_cfg_ulysses.sh
wan22/distill/run_wan22_moe_i2v_distill_model_4step_cfg_ulysses.sh
wan22/distill/run_wan22_moe_i2v_distill_fp8_4step_cfg_ulysses.sh
dist_infer/run_wan22_moe_t2v_cfg_ulysses.sh dist_infer/run_wan22_moe_i2v_cfg_ulysses.sh
server/start_server.sh server/start_server_cfg_ulysses.sh server/post.py base/base.sh
"""


def demo_config(name: str, folder: Path) -> Path:
    """The demo's counterpart of a script's preset, small."""
    task, kind = re.findall(r"(t2v|i2v)|(lora|model|fp8)", name), ""
    kind = next((k for _, k in task if k), "")
    variant = {"": "base", "lora": "distill_lora", "model": "merged", "fp8": "fp8"}[kind]
    data = json.loads((PROJECT / "presets" / f"demo_{task[0][0]}_{variant}.json").read_text())
    data |= SMALL | ({"infer_steps": 2} if variant == "base" else {})
    del data["preset"]
    file = folder / "config.json"
    file.write_text(json.dumps(data))
    return file


@pytest.fixture
def noting(tmp_path: Path) -> Path:
    """An interpreter that only writes down what it is asked to run."""
    file = tmp_path / "python"
    code = "import json, sys; json.dump(sys.argv[1:], open(sys.argv[0] + '.json', 'w'))"
    file.write_text(f"#!{sys.executable} -S\n{code}\n")
    file.chmod(0o755)
    return file


def noted(script: Path, python: Path, *flags: str, **variables: str) -> list[str]:
    environment = {**os.environ, "python": str(python), **variables}
    done = subprocess.run(
        ["bash", str(script), *flags], env=environment, cwd=script.parent, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return json.loads(python.with_suffix(".json").read_text())


def test_all_of_the_tutorials_names_are_there() -> None:
    assert not [name for name in TUTORIAL.split() if not (PROJECT / "scripts" / name).is_file()]
    assert {"wan_moe_t2v.py", "wan_t2v.py"} <= {path.name for path in EXAMPLES}
    assert all(len(path.read_text().splitlines()) < 12 for path in SCRIPTS), "a few lines over the same command line"


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_each_script_makes_a_video_on_the_demo_model(script: Path, tmp_path: Path, noting: Path) -> None:
    config, video = demo_config(script.stem, tmp_path), tmp_path / "video.mp4"
    model = "assets/demo/Wan2.2-I2V-Demo" if "i2v" in script.stem else "assets/demo/Wan2.2-T2V-Demo"
    variables = {"config_json": str(config), "model_path": model, "nproc_per_node": "2"}
    flags = noted(script, noting, "--save_result_path", str(video), "--seed", "3", **variables)
    if "cfg_ulysses" in script.stem:
        assert flags[:4] == ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node"] and flags[4] == "2"
        del flags[:5]
    assert flags[:2] == ["-m", "lightx2v.infer"]
    assert infer.main(flags[2:]) == 0
    settings = read_settings(video)
    assert settings["request"]["seed"] == 3 and settings["engine"]["model_path"] == model


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_each_scripts_own_configuration_resolves(
    script: Path, noting: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = noted(script, noting, "--dry_run")
    assert infer.main(flags[flags.index("lightx2v.infer") + 1 :]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["preset"]["task"] in script.stem and plan["request"]["prompt"] and plan["preset"]["gpus"] == 1
    kind = next(
        (word for word in ("lora", "fp8") if word in script.stem), "merged" if "model" in script.stem else "base"
    )
    assert kind in plan["preset"]["variant"]


@pytest.mark.slow
@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_each_example_makes_a_video_on_the_demo_model(
    example: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    video = tmp_path / "new" / "video.mp4"
    flags = ["--save_result_path", str(video)]
    if example.stem == "wan_t2v":
        flags += ["--model_path", "assets/demo/Wan2.2-T2V-Demo", "--infer_steps", "2", "--num_frames", "5"]
        flags += ["--height", "64", "--width", "64"]
    else:
        model = f"assets/demo/Wan2.2-{example.stem[-3:].upper()}-Demo"
        flags += ["--model_path", model, "--config_json", str(demo_config(example.stem, tmp_path))]
    monkeypatch.setattr(sys, "argv", [str(example), *flags])
    runpy.run_path(str(example), run_name="__main__")
    assert str(video) in capsys.readouterr().out and video.is_file()


@pytest.mark.multi
def test_the_server_on_two_processes_and_post_py_work_together(tmp_path: Path) -> None:
    port = free_port()
    variables = {"config_json": str(demo_config("t2v", tmp_path)), "nproc_per_node": "2", "OMP_NUM_THREADS": "1"}
    scripts, out = PROJECT / "scripts" / "server", tmp_path / "out"
    line = ["bash", str(scripts / "start_server_cfg_ulysses.sh"), "--port", str(port), "--output_dir", str(out)]
    environment = {**os.environ, **variables, "python": sys.executable}
    with (tmp_path / "log").open("w") as log:
        server = subprocess.Popen(line, env=environment, cwd=tmp_path, stdout=log, stderr=log)
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", trust_env=False, timeout=PATIENCE) as http:
            while not _ready(http):
                assert server.poll() is None, (tmp_path / "log").read_text()
                time.sleep(0.1)
            url = f"http://127.0.0.1:{port}/v1/tasks/video/"
            post = [sys.executable, str(scripts / "post.py"), "--url", url]
            done = subprocess.run(post, capture_output=True, text=True, timeout=PATIENCE)
            assert done.returncode == 0, done.stderr
            status = done.stdout.split("status: ")[1].strip()
            while (task := http.get(status).json())["status"] in ("pending", "processing"):
                time.sleep(0.1)
            assert task["status"] == "completed", task
            assert http.get("/v1/files/download/cat_boxing_seed42.mp4").content[4:8] == b"ftyp"
            assert http.get("/v1/service/metadata").json()["nproc_per_node"] == 2
    finally:
        server.terminate()
        server.wait(PATIENCE)


def _ready(http: httpx.Client) -> bool:
    try:
        return http.get("/ready").status_code == 200
    except httpx.TransportError:
        return False


def test_the_server_script_serves_a_preset_to_this_machine_alone(noting: Path) -> None:
    flags = noted(PROJECT / "scripts" / "server" / "start_server.sh", noting, "--port", "9")
    assert flags[:2] == ["-m", "lightx2v.server"]
    options = command._parser().parse_args(flags[2:])
    assert options.preset == "t2v_base" and options.port == 9 and options.host == "127.0.0.1"
