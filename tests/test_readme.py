"""What the README says is so: tables, tree, commands, the Python example and the reasons for dependencies, twice."""

from __future__ import annotations

import argparse
import json
import re
import shlex
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import TinyModels
from packaging.requirements import Requirement

from lightx2v import convert, download, infer
from lightx2v.media.mp4 import probe
from lightx2v.server import command as server

ROOT = Path(__file__).parents[1]
READMES = ("README.md", "README_zh.md")
PARSERS: dict[str, Callable[[], argparse.ArgumentParser]] = {
    "lightx2v.infer": infer._parser,
    "lightx2v.download": download._parser,
    "lightx2v.convert": convert._parser,
    "lightx2v.server": server._parser,
}


def blocks(name: str) -> list[str]:
    """The indented blocks of a file, without their indentation."""
    text = (ROOT / name).read_text("utf-8")
    found = re.findall(r"^    .*\n(?:\n*    .*\n)*", text, re.MULTILINE)
    return [textwrap.dedent(block) for block in found]


def tree(name: str) -> str:
    (block,) = (block for block in blocks(name) if block.startswith("app.py "))
    return block


def test_the_tables_are_those_of_the_presets() -> None:
    command = [sys.executable, "scripts/readme_tables.py", "--check"]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr


@pytest.mark.parametrize("name", READMES)
def test_the_tree_names_all_that_is_there_and_nothing_else(name: str) -> None:
    engine = {path.name for path in (ROOT / "lightx2v").iterdir() if not path.name.startswith("_")}
    folders = {path.name for path in ROOT.iterdir() if path.is_dir() and path.name[0] not in "._"} - {
        "outputs",
        "models",
    }
    words = set(re.findall(r"[a-z_0-9]+", tree(name)))
    missing = [path for path in engine | folders if path.removesuffix(".py") not in words]
    assert not missing, f"no word on {sorted(missing)}"
    named = re.findall(r"[a-z_0-9]+\.py|(?<![A-Za-z/.])[a-z_0-9]+/(?![a-z])", tree(name))
    gone = [path for path in named if path.strip("/") not in engine and not (ROOT / path).exists()]
    assert len(named) > 40 and not gone, f"{gone} are not there"


def commands(name: str) -> list[tuple[str, list[str]]]:
    """Each `python -m lightx2v.…` in the blocks: the module and its arguments."""
    found = []
    for block in blocks(name):
        if block == tree(name):
            continue
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            for at, word in enumerate(words):
                if word in PARSERS and words[at - 1] == "-m":
                    found.append((word, words[at + 1 :]))
    return found


@pytest.mark.parametrize("name", READMES)
def test_every_command_is_understood(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    found = commands(name)
    assert {module for module, _ in found} >= {"lightx2v.infer", "lightx2v.download", "lightx2v.server"}
    for module, arguments in found:
        try:
            PARSERS[module]().parse_args(arguments)
        except SystemExit:
            pytest.fail(f"{module} {arguments}: {capsys.readouterr().err}")
        if module == "lightx2v.infer" and "--from" not in arguments:
            assert infer.main([*arguments, "--dry_run"]) == 0


@pytest.mark.parametrize("name", READMES)
def test_the_python_example_makes_a_video(name: str, tiny: TinyModels, tmp_path: Path) -> None:
    (example,) = (block for block in blocks(name) if block.startswith("from lightx2v import"))
    small = {"infer_steps": 2, "target_video_length": 5, "target_height": 32, "target_width": 32}
    (tmp_path / "config.json").write_text(json.dumps(json.loads((ROOT / "presets/t2v_base.json").read_text()) | small))
    paths = {
        "Wan-AI/Wan2.2-T2V-A14B": tiny.t2v,
        "presets/t2v_base.json": tmp_path / "config.json",
        "cat.mp4": tmp_path / "cat.mp4",
    }
    for path, ours in paths.items():
        assert path in example
        example = example.replace(path, str(ours))
    exec(compile(example, name, "exec"), {})
    assert probe(tmp_path / "cat.mp4").frames == 5


def test_every_dependency_has_its_reason() -> None:
    text = (ROOT / "README.md").read_text("utf-8")
    table = text.split("## Dependencies")[1].split("\n\n")[1]
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    asked = [Requirement(line).name for line in lines if line and line[0] not in "#-"]
    assert not [name for name in asked if not re.search(rf"^\|[^|]*\b{name}\b", table, re.MULTILINE)]


def test_contributing_is_short() -> None:
    assert len((ROOT / "CONTRIBUTING.md").read_text("utf-8").splitlines()) < 60
