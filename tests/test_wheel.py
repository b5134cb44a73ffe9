"""The installed package: the wheel holds everything, and its commands run in an empty folder beside no checkout."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import time
import urllib.error
import urllib.request
import venv
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from email.parser import Parser
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from patience import PATIENCE, free_port

from lightx2v.media.mp4 import probe

ROOT = Path(__file__).parents[1]
COMMANDS = ("lightx2v-studio", "lightx2v-infer", "lightx2v-server", "lightx2v-download", "lightx2v-convert")

pytestmark = [pytest.mark.slow, pytest.mark.multi]


@dataclass(frozen=True)
class Installed:
    """A virtual environment that holds the wheel's files and sees the packages of this one."""

    folder: Path
    bin: Path

    def files(self) -> dict[str, int]:
        found = (path for path in self.folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
        return {path.relative_to(self.folder).as_posix(): path.stat().st_mtime_ns for path in found}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", str(ROOT), "--no-build-isolation", "--no-deps", "-w", str(out)]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    (built,) = out.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Installed:
    folder = tmp_path_factory.mktemp("installed")
    venv.create(folder, with_pip=False)
    scripts = folder / ("Scripts" if os.name == "nt" else "bin")
    python = next(scripts.glob("python*"))
    code = "import sysconfig; print(sysconfig.get_path('purelib'))"
    packages = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    (Path(packages) / "others.pth").write_text(sysconfig.get_path("purelib") + "\n")
    command = [sys.executable, "-m", "pip", "--python", str(python), "install", "--no-deps", "--no-index", str(wheel)]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    return Installed(folder=Path(packages), bin=scripts)


@pytest.fixture
def outside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder; nothing leads from it to the checkout."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PYTHONPATH", raising=False)
    return tmp_path


def tracked(*folders: str) -> set[str]:
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", *folders]
    names = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    return {name for name in names if (ROOT / name).is_file()}


def test_the_wheel_holds_the_code_the_presets_the_page_and_the_demo_model(wheel: Path) -> None:
    moved = {"app/": "lightx2v_studio/", "presets/": "lightx2v/_data/presets/", "assets/": "lightx2v/_data/assets/"}
    expected = tracked("lightx2v", "app", "presets", "assets") - tracked("assets/screenshots")
    for old, new in moved.items():
        expected = {new + name.removeprefix(old) if name.startswith(old) else name for name in expected}
    with zipfile.ZipFile(wheel) as archive:
        assert {name for name in archive.namelist() if ".dist-info/" not in name} == expected
        (metadata,) = (name for name in archive.namelist() if name.endswith("/METADATA"))
        asked = Parser().parsestr(archive.read(metadata).decode()).get_all("Requires-Dist") or []
    wanted = set()
    for file, marker in (("requirements.txt", ""), ("requirements-farm.txt", '; extra == "farm"')):
        lines = (ROOT / file).read_text().splitlines()
        wanted |= {Requirement(line + marker) for line in lines if line and line[0] != "#"}
    same = {(each.name.replace("_", "-"), str(each.specifier), str(each.marker)) for each in wanted}
    assert {(r.name, str(r.specifier), str(r.marker)) for r in map(Requirement, asked)} == same


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(command: str, installed: Installed, outside: Path) -> None:
    ended = subprocess.run([installed.bin / command, "--help"], capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == 0 and "usage:" in ended.stdout, ended.stderr
    assert not list(outside.iterdir())


def test_presets_are_those_of_the_checkout(installed: Installed, outside: Path) -> None:
    ours = [sys.executable, "-m", "lightx2v.infer", "--list_presets"]
    theirs = [installed.bin / "lightx2v-infer", "--list_presets"]
    expected = subprocess.run(ours, cwd=ROOT, capture_output=True, check=True, timeout=60).stdout
    assert b"t2v_distill_lora" in expected
    assert subprocess.run(theirs, capture_output=True, check=True, timeout=60).stdout == expected


def test_a_demo_video_goes_to_the_working_folder_and_nothing_into_the_package(
    installed: Installed, outside: Path
) -> None:
    before = installed.files()
    command = [installed.bin / "lightx2v-infer", "--preset", "demo_t2v_distill_lora", "--prompt", "a red ball"]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    (video,) = (outside / "outputs").glob("*.mp4")
    assert probe(video).frames == 17
    assert installed.files() == before


@pytest.fixture
def page(installed: Installed, outside: Path) -> Iterator[str]:
    port = free_port()
    environment = os.environ | {"NO_PROXY": "127.0.0.1"}
    command = [installed.bin / "lightx2v-studio", "--port", str(port)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment) as process:
        yield f"http://127.0.0.1:{port}"
        process.terminate()
        process.wait(60)


def test_the_page_is_served_with_its_style_and_examples(page: str, installed: Installed, outside: Path) -> None:
    before = installed.files()
    text = fetched(f"{page}/")
    assert "--p-load: #98a1b0" in text and "--p-load: #98a1b0" in (ROOT / "assets" / "studio.css").read_text("utf-8")
    assert "demo_t2v_distill_lora" in fetched(f"{page}/config")
    assert installed.files() == before
    assert [path.name for path in outside.iterdir()] == ["outputs"]


def fetched(url: str) -> str:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    until = time.monotonic() + PATIENCE
    while True:
        try:
            with opener.open(url, timeout=PATIENCE) as response:
                return response.read().decode()
        except urllib.error.URLError:
            if time.monotonic() > until:
                raise
            time.sleep(0.1)
