"""README and docs/ are true: tables, commands, examples, links, file names, routes, messages and dependencies."""

from __future__ import annotations

import argparse
import ast
import json
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from conftest import TinyModels
from fake_engine import Garage
from model_tree import EXPERT, T2V, comfy_tree, put, style_lora
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from test_layers import ENGINE, PAGE

from lightx2v import calibrate, convert, download, find_models, infer
from lightx2v.config.presets import resolve
from lightx2v.jobs.queue import JobManager
from lightx2v.media.mp4 import probe
from lightx2v.server import command as server
from lightx2v.server.application import create_app
from lightx2v.server.metrics import Metrics
from lightx2v.server.service import Service

ROOT = Path(__file__).parents[1]
DOCS = ["README.md", "README_zh.md", "CONTRIBUTING.md", *(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))]
READMES = ("README.md", "README_zh.md")
PARSERS: dict[str, Callable[[], argparse.ArgumentParser]] = {
    "lightx2v.infer": infer._parser,
    "lightx2v.download": download._parser,
    "lightx2v.convert": convert._parser,
    "lightx2v.find_models": find_models._parser,
    "lightx2v.calibrate": calibrate._parser,
    "lightx2v.server": server._parser,
}
SOURCES = [p for folder in ("lightx2v", "app") for p in (ROOT / folder).rglob("*.py")] + [ROOT / "app.py"]
OPTIONAL = {
    "fa3_fwd_interface",
    "flash_attn",
    "flash_attn_interface",
    "comfy_kitchen",
    "sageattention",
    "sageattn3",
    "ray",
    "spaces",
}
"""Modules of packages that nobody has to install."""


def text(name: str) -> str:
    return (ROOT / name).read_text("utf-8")


def blocks(name: str, language: str) -> list[str]:
    """The fenced blocks of a file in one language."""
    return re.findall(rf"^```{language}\n(.*?)^```", text(name), re.MULTILINE | re.DOTALL)


def table(name: str, mark: str) -> list[list[str]]:
    """The cells of the table under `<!-- mark -->`, without its head."""
    lines = text(name).split(f"<!-- {mark} -->\n")[1].split("\n\n")[0].splitlines()
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines[2:]]


@pytest.mark.slow
def test_the_tables_are_those_of_the_presets() -> None:
    command = [sys.executable, "scripts/readme_tables.py", "--check"]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr


def commands(name: str) -> list[tuple[str, list[str]]]:
    """Each `python -m lightx2v.…` and `lightx2v-…` in the blocks: the module and its arguments."""
    found = []
    for block in blocks(name, "bash") + blocks(name, "ini"):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line.removeprefix("ExecStart="), comments=True)
            for at, word in enumerate(words):
                module = word.rpartition("/")[2].replace("lightx2v-", "lightx2v.")
                if module in PARSERS and (words[at - 1] == "-m" or module != word):
                    found.append((module, words[at + 1 :]))
    return found


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in DOCS if commands(name)])
def test_every_command_is_understood(
    name: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside the files of one's own that the commands name."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LIGHTX2V_MODEL_DIRS", str(comfy_tree(tmp_path)))
    for half in ("high", "low"):
        expert = T2V / f"{half}_noise_model" / EXPERT
        put(expert, tmp_path / f"wan_{half}_noise.safetensors")
        put(expert, tmp_path / f"ComfyUI/models/unet/wan2.2_t2v_{half}_noise_14B_fp8_scaled.safetensors")
    for part in ("models_t5_umt5-xxl-enc-bf16.pth", "Wan2.1_VAE.pth"):
        put(T2V / part, tmp_path / {"models": "umt5.pth", "Wan2.1": "vae.pth"}[part.partition("_")[0]])
    put(style_lora(tmp_path / "ComfyUI/models"), tmp_path / "style.safetensors")
    put(tmp_path / "style.safetensors", tmp_path / "motion.safetensors")
    for module, arguments in commands(name):
        try:
            PARSERS[module]().parse_args(arguments)
        except SystemExit:
            pytest.fail(f"{module} {arguments}: {capsys.readouterr().err}")
        if module == "lightx2v.infer" and not {"--from", "--list_presets"} & set(arguments):
            assert infer.main([*arguments, "--dry_run"]) == 0


@pytest.mark.parametrize("name", READMES)
def test_the_readme_shows_all_command_lines(name: str) -> None:
    assert {module for module, _ in commands(name)} >= {"lightx2v.infer", "lightx2v.download", "lightx2v.server"}
    assert len(text(name).splitlines()) <= 130


@pytest.mark.slow
@pytest.mark.parametrize("name", [*READMES, "docs/python_api.md"])
def test_the_python_examples_make_videos(
    name: str, tiny: TinyModels, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    small = {"infer_steps": 2, "target_video_length": 5, "target_height": 32, "target_width": 32}
    (tmp_path / "config.json").write_text(json.dumps(json.loads(text("presets/t2v_base.json")) | small))
    example = "\n".join(blocks(name, "python")).replace("presets/t2v_base.json", "t2v_base")
    for theirs, ours in {"Wan-AI/Wan2.2-T2V-A14B": str(tiny.t2v), '"t2v_base"': '"config.json"'}.items():
        assert theirs in example
        example = example.replace(theirs, ours)
    exec(compile(example, name, "exec"), {})
    assert probe(tmp_path / "cat.mp4").frames == 5


def slug(heading: str) -> str:
    """The anchor that GitHub gives a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


@pytest.mark.parametrize("name", DOCS)
def test_every_link_leads_to_a_file_and_a_heading(name: str) -> None:
    for target in re.findall(r"\]\(([^)]+)\)", text(name)):
        if target.startswith("http"):
            continue
        path, _, anchor = target.partition("#")
        file = (ROOT / name).parent / path if path else ROOT / name
        assert file.exists(), target
        headings = re.findall(r"^#+ (.*)", file.read_text("utf-8"), re.MULTILINE) if anchor else []
        assert not anchor or anchor in map(slug, headings), target


@pytest.mark.parametrize("name", DOCS)
def test_every_file_that_is_named_exists(name: str) -> None:
    """Names with a folder in backticks, as in `app/theme.py`; inside lightx2v/ also without its name."""
    named = set(re.findall(r"`((?:[\w.-]+/)+[\w.-]*\w\.(?:py|md|json|sh|txt)|(?:[a-z_]+/)+)`", text(name)))
    gone = [path for path in named if not (ROOT / path).exists() and not (ROOT / "lightx2v" / path).exists()]
    assert not gone


def test_every_package_has_its_line_in_import_order() -> None:
    named = [row[0].strip("`").rstrip("/").removesuffix(".py") for row in table("docs/architecture.md", "packages")]
    engine = [f"lightx2v/{name}" for name in ENGINE]
    assert named == engine + [f"app/{name}" for name in PAGE if (ROOT / "app" / name).is_dir()]


def test_every_route_is_listed(open_manager: Callable[..., JobManager], garage: Garage) -> None:
    service = Service(open_manager(), {"t2v_base": resolve("t2v_base")})
    paths = create_app(service, Metrics()).openapi()["paths"]
    routes = {f"{method.upper()} {path}" for path, item in paths.items() for method in item}
    assert set(re.findall(r"^\| `([A-Z]+ /\S+)`", text("docs/http_api.md"), re.MULTILINE)) == routes
    for _, _, path in re.findall(r"(curl)( .*?)localhost:8000(/\S+)", text("docs/http_api.md")):
        assert path.replace("ID", "{id}") in paths


@cache
def trees() -> list[ast.Module]:
    return [ast.parse(path.read_text("utf-8")) for path in SOURCES]


def messages() -> list[str]:
    """Every text in the source, with … for each value that is filled in."""
    found = []
    for tree in trees():
        for node in ast.walk(tree):
            if isinstance(node, ast.JoinedStr):
                found.append(
                    "".join(str(part.value) if isinstance(part, ast.Constant) else "…" for part in node.values)
                )
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return found


@pytest.mark.slow
def test_troubleshooting_quotes_messages_that_exist() -> None:
    quoted = re.findall(r"^> `(.*)`$", text("docs/troubleshooting.md"), re.MULTILINE)
    known = messages()
    assert len(quoted) >= 10
    for message in quoted:
        pattern = re.compile(".*".join(map(re.escape, message.strip("…").split("…"))), re.DOTALL)
        assert any(pattern.search(each) for each in known), f"no message of the program is: {message}"


def imported() -> set[str]:
    """The packages that the product imports, under their names on PyPI."""
    providers, names = packages_distributions(), set[str]()
    for tree in trees():
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                names |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                names.add(node.module.partition(".")[0])
    names -= {*sys.stdlib_module_names, "lightx2v", "app", *OPTIONAL}
    return {canonicalize_name(package) for name in names for package in providers[name]}


@pytest.mark.slow
def test_the_product_imports_every_requirement() -> None:
    """A package that only tests need belongs in requirements-dev.txt."""
    lines = [line for line in text("requirements.txt").splitlines() if line and line[0] not in "#-"]
    assert {canonicalize_name(Requirement(line).name) for line in lines} <= imported()


@pytest.mark.slow
def test_every_imported_package_has_its_reason() -> None:
    rows = table("docs/architecture.md", "dependencies")
    named = [name for row in rows for name in re.sub(r"\(.*?\)", "", row[0]).split(",")]
    assert {canonicalize_name(name.strip()) for name in named} == imported()
