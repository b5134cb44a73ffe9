"""Folders to write to without a home folder, on a read-only disk, without a place for temporary files."""

from __future__ import annotations

import os
import pwd
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from patience import PATIENCE

from lightx2v.config import folders
from lightx2v.config.engine_config import EngineConfig
from lightx2v.config.environment import Environment
from lightx2v.config.recorded_settings import recorded_settings
from lightx2v.config.request import Request
from lightx2v.errors import OutputError
from lightx2v.hub import find
from lightx2v.loading.prebuilt_cache import prebuilt_folder

ROOT = Path(__file__).parents[2]


def no_such_user(number: int) -> pwd.struct_passwd:
    raise KeyError(number)


@pytest.fixture
def nameless(monkeypatch: pytest.MonkeyPatch) -> None:
    """A user id without a name, and no HOME."""
    monkeypatch.setenv("HOME", "")
    monkeypatch.delenv("HOME")
    monkeypatch.setattr(pwd, "getpwuid", no_such_user)


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


@pytest.fixture
def no_temporary(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", "/proc/nowhere")
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setattr(tempfile, "_candidate_tempdir_list", lambda: ["/proc/nowhere"])


@pytest.mark.usefixtures("nameless")
def test_paths_stay_as_they_are_where_there_is_no_home() -> None:
    config = EngineConfig(model_path="~/model", models_dir="~nosuchuser/models")
    assert find("~/lora.safetensors", config) is None
    assert prebuilt_folder(config.models_dir) == Path("~nosuchuser/models/.built")
    assert prebuilt_folder(None, Environment(cache_dir="~/cache")) == Path("~/cache/built")
    settings = recorded_settings("p", config, Request(prompt="a"), None)
    assert settings["engine"]["model_path"] == "~/model"


@pytest.mark.usefixtures("nameless")
def test_a_process_without_a_home_gets_one_of_its_own(temporary: Path, caplog: pytest.LogCaptureFixture) -> None:
    folders.use_home()
    home = temporary / f"lightx2v-{os.getuid()}" / "home"
    assert Path.home() == home and home.stat().st_mode & 0o777 == 0o700
    assert "Set HOME" in caplog.text
    assert prebuilt_folder(None, Environment()) == home / ".cache/lightx2v/built"


def test_a_home_that_exists_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/proc/nowhere")
    folders.use_home()
    assert os.environ["HOME"] == "/proc/nowhere"


def test_a_read_only_home_keeps_caches_elsewhere(temporary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/proc/nowhere")
    own = temporary / f"lightx2v-{os.getuid()}"
    assert prebuilt_folder(None, Environment()) == own / "built"
    for name in ("TRITON_CACHE_DIR", "TRITON_HOME"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    folders.use_kernel_cache()
    assert os.environ["TRITON_CACHE_DIR"] == str(own / "triton")


def test_nobody_else_can_prepare_the_folder(temporary: Path) -> None:
    (temporary / "elsewhere").mkdir()
    (temporary / f"lightx2v-{os.getuid()}").symlink_to(temporary / "elsewhere")
    with pytest.raises(OutputError, match="TMPDIR"):
        folders.own_folder("home")


def test_videos_go_where_they_can_be_written(
    temporary: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.chdir(temporary)
    assert folders.output_folder(None) == Path("outputs") and not caplog.text
    monkeypatch.chdir("/proc")
    assert folders.output_folder("given") == Path("given")
    assert folders.output_folder(None) == temporary / f"lightx2v-{os.getuid()}" / "outputs"
    assert "LIGHTX2V_OUTPUT_DIR" in caplog.text


@pytest.mark.usefixtures("no_temporary")
def test_without_a_folder_for_temporary_files_the_output_folder_holds_them(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="Set TMPDIR"):
        folders.use_temporary(Path("/proc"))
    folders.use_temporary(tmp_path / "out")
    with tempfile.NamedTemporaryFile() as file:
        assert (tmp_path / "out") in Path(file.name).parents
    assert Path(os.environ["TMPDIR"]).parent == tmp_path / "out"


@pytest.mark.usefixtures("no_temporary")
def test_without_any_place_the_variable_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir("/proc")
    with pytest.raises(OutputError, match="LIGHTX2V_OUTPUT_DIR"):
        folders.output_folder(None)


BARE = """
import pwd, sys, tempfile
def no_such_user(number):
    raise KeyError(number)
pwd.getpwuid = no_such_user
if sys.argv[1] == "no temporary":
    tempfile._candidate_tempdir_list = lambda: ["/proc/nowhere"]
from lightx2v.infer import main
sys.exit(main(sys.argv[2:]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("temporary", ["", "no temporary"])
def test_the_command_line_runs_with_nothing_but_a_path(temporary: str, tmp_path: Path) -> None:
    """As `env -i`, under a user id without a name, in another working folder than the checkout."""
    video = tmp_path / "out" / "a.mp4"
    flags = [
        "--preset",
        "demo_t2v_distill_lora",
        "--prompt",
        "a ball",
        "--frames",
        "5",
        "--save_result_path",
        str(video),
    ]
    done = subprocess.run(
        [sys.executable, "-c", BARE, temporary, *flags],
        env={"PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    assert done.returncode == 0 and done.stdout.splitlines()[0] == str(video), done.stderr
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "a.mp4"]


def test_a_deleted_working_folder_is_one_clear_line(tmp_path: Path) -> None:
    gone = tmp_path / "gone"
    commands = {
        "-m lightx2v.infer": ["--prompt", "x", "--preset", "demo_t2v_distill_lora"],
        "-m lightx2v.find_models": [],
        str(ROOT / "app.py"): [],
    }
    script = "import os, sys; os.rmdir(os.getcwd()); os.execv(sys.executable, [sys.executable, *sys.argv[1:]])"
    for program, flags in commands.items():
        gone.mkdir()
        command = [sys.executable, "-c", script, *program.split(), *flags]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        ended = subprocess.run(command, cwd=gone, env=environment, capture_output=True, text=True, timeout=PATIENCE)
        said = ended.stderr.splitlines()
        assert ended.returncode == 2 and len(said) == 1, ended.stderr
        assert said[0].startswith("error: The working folder cannot be used") and "Change to another" in said[0]
