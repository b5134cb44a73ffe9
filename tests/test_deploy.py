"""deploy/ fits the program: what its files start, set, copy and pin is there under that name."""

from __future__ import annotations

import argparse
import fnmatch
import re
import shlex
import subprocess
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from app import main as page
from lightx2v.config.environment import Environment
from lightx2v.config.presets import resolve
from lightx2v.server import command as server
from lightx2v.server.application import PATHS

ROOT = Path(__file__).parents[1]
DEPLOY = ROOT / "deploy"
FILES = sorted(DEPLOY.iterdir())
DOCKERFILE = (DEPLOY / "Dockerfile").read_text("utf-8").replace("\\\n", " ")
UNIT = (DEPLOY / "lightx2v.service").read_text("utf-8")
PARSERS: dict[str, Callable[[], argparse.ArgumentParser]] = {
    "lightx2v-server": server._parser,
    "lightx2v-studio": page._parser,
}


def compose() -> dict[str, Any]:
    return yaml.safe_load((DEPLOY / "compose.yaml").read_text("utf-8"))


def kubernetes(kind: str) -> dict[str, Any]:
    (found,) = (
        each for each in yaml.safe_load_all((DEPLOY / "raycluster.yaml").read_text("utf-8")) if each["kind"] == kind
    )
    return found


def containers() -> dict[str, dict[str, Any]]:
    spec = kubernetes("RayCluster")["spec"]
    groups = [spec["headGroupSpec"], *spec["workerGroupSpecs"]]
    return {each["name"]: each for group in groups for each in group["template"]["spec"]["containers"]}


def commands() -> Iterator[tuple[str, list[str]]]:
    """(file, words) of each command that starts the program."""
    yield "Dockerfile", [str(word) for word in yaml.safe_load(DOCKERFILE.split("\nCMD ")[1])]
    for name, service in compose()["services"].items():
        yield f"compose.yaml {name}", shlex.split(re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", service["command"]))
    (start,) = re.findall(r"^ExecStart=(.*)$", UNIT, re.MULTILINE)
    yield "lightx2v.service", shlex.split(start)
    yield "raycluster.yaml", containers()["server"]["command"]


@pytest.mark.parametrize(("where", "words"), [pytest.param(*each, id=each[0]) for each in commands()])
def test_the_program_understands_every_command(where: str, words: list[str]) -> None:
    """Each names a preset that exists. Beyond loopback the server starts with the key that the files ask for."""
    options = PARSERS[Path(words[0]).name]().parse_args(words[1:])
    resolve(options.preset)
    assert options.port == 8000
    assert server._keys(options, Environment.read({"LIGHTX2V_API_KEY": "0123456789abcdef"}))


def test_every_variable_is_one_that_the_program_reads() -> None:
    ours = set(
        re.findall(r'"(LIGHTX2V_\w+)"', "".join(path.read_text("utf-8") for path in (ROOT / "lightx2v").rglob("*.py")))
    )
    named = {name for path in FILES for name in re.findall(r"LIGHTX2V_\w+", path.read_text("utf-8"))}
    assert named - ours == {"LIGHTX2V_PRESET", "LIGHTX2V_PORT"}  # of compose.yaml itself


def test_all_health_checks_ask_a_route_of_the_server_with_the_first_key() -> None:
    probe = containers()["server"]["livenessProbe"]["exec"]["command"][-1]
    (check,) = re.findall(r"HEALTHCHECK .*? CMD (.*)", DOCKERFILE)
    for line in (probe, check):
        assert "http://127.0.0.1:8000/health" in line and "/health" in PATHS
        key = re.findall(r'"Authorization: Bearer (\$\{.*?\})"', line)[0]
        said = ["env", "LIGHTX2V_API_KEY=first,second", "sh", "-c", f"printf %s {key}"]
        assert subprocess.run(said, capture_output=True, text=True, check=True).stdout == "first"


def test_ray_is_the_tested_version() -> None:
    version = kubernetes("RayCluster")["spec"]["rayVersion"]
    assert f"\nray=={version}\n" in (ROOT / "constraints.txt").read_text("utf-8")


def test_the_image_installs_the_tested_versions_only() -> None:
    """Every `pip install` follows constraints.txt, or takes nothing but this project."""
    installs = re.findall(r"pip install [^&\n]*", DOCKERFILE)
    assert len(installs) >= 3
    assert all("-c constraints.txt" in line or "--no-deps" in line and line.endswith(" .") for line in installs)


def passes(name: str) -> bool:
    """Whether the build sees a file, by Dockerfile.dockerignore: the last pattern that fits decides."""
    seen = True
    for line in (DEPLOY / "Dockerfile.dockerignore").read_text("utf-8").splitlines():
        pattern = line.lstrip("!").replace("**/", "*")
        parents = [name, *(str(parent) for parent in Path(name).parents)]
        if line and line[0] != "#" and any(fnmatch.fnmatch(each, pattern) for each in parents):
            seen = line[0] == "!"
    return seen


def test_the_build_sees_what_it_copies_and_what_the_wheel_holds() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
    wheel = project["tool"]["hatch"]["build"]["targets"]["wheel"]
    copied = [
        word for line in re.findall(r"^COPY (?!--from)(.*)$", DOCKERFILE, re.MULTILINE) for word in line.split()[:-1]
    ]
    needed = {*wheel["packages"], *wheel["force-include"], *project["project"]["license-files"], *copied} - {"."}
    needed |= {"pyproject.toml", "hatch_build.py"}
    assert needed and all((ROOT / name).exists() and passes(name) for name in needed)
    assert not any(map(passes, (".venv/bin/python", "tests/conftest.py", ".git/config", "outputs/a.mp4")))


def test_the_image_runs_as_the_user_that_the_other_files_name() -> None:
    (uid,) = re.findall(r"useradd --uid (\d+)", DOCKERFILE)
    assert "\nUSER lightx2v\n" in DOCKERFILE
    spec = kubernetes("RayCluster")["spec"]
    for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
        assert group["template"]["spec"]["securityContext"]["runAsUser"] == int(uid)
    assert all(f"uid={uid}" in service["tmpfs"][1] for service in compose()["services"].values())


def test_a_stop_leaves_time_to_save_the_running_jobs_step() -> None:
    """The program gets SIGTERM alone (ffmpeg would end its file early) and has more than its own five seconds."""
    assert "KillMode=mixed" in UNIT and "KillSignal=SIGTERM" in UNIT and "STOPSIGNAL SIGTERM" in DOCKERFILE
    (unit,) = re.findall(r"^TimeoutStopSec=(\d+)$", UNIT, re.MULTILINE)
    waits = [int(unit)]
    waits += [int(service["stop_grace_period"].removesuffix("s")) for service in compose()["services"].values()]
    spec = kubernetes("RayCluster")["spec"]
    groups = (spec["headGroupSpec"], *spec["workerGroupSpecs"])
    waits += [group["template"]["spec"]["terminationGracePeriodSeconds"] for group in groups]
    assert min(waits) >= 20


def test_the_server_and_ray_share_their_folders_and_the_service_finds_the_server() -> None:
    mounts = {
        name: {each["mountPath"]: each["name"] for each in box["volumeMounts"]} for name, box in containers().items()
    }
    for folder in ("/tmp/ray", "/dev/shm"):
        assert mounts["ray-head"][folder] == mounts["server"][folder]
    assert {mounts["server"]["/outputs"], mounts["ray-worker"]["/models"]} == {"outputs", "models"}
    (port,) = kubernetes("Service")["spec"]["ports"]
    assert port["targetPort"] in [each["name"] for each in containers()["server"]["ports"]]
