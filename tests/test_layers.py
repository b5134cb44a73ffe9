"""The import order is law: a package imports only packages to its left, and no two files import each other."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import lightx2v

ROOT = Path(__file__).parents[1]

ENGINE = """
errors background progress step_file media config cli attention hub cost sampling parallel weights models catalog jobs
loading offload engine pipeline farm infer convert download find_models calibrate server
""".split()
"""Packages and modules of lightx2v/. Each may import those to its left, and never one to its right."""

PAGE = "exposure strings theme gradio_compat backend views form events web page main".split()
"""The same for app/, which also may import every package of lightx2v/."""

FRONT_ENDS = {"infer", "convert", "download", "find_models", "calibrate", "server"}
"""Programs. None imports another."""


def sources() -> dict[str, Path]:
    """{dotted name: file} of everything that is shipped."""
    files = [*(ROOT / "lightx2v").rglob("*.py"), *(ROOT / "app").rglob("*.py"), ROOT / "app.py"]
    return {_dotted(path): path for path in sorted(files)}


def _dotted(path: Path) -> str:
    if path == ROOT / "app.py":
        return "app.py"
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


SOURCES = sources()


def imports(name: str) -> Iterator[str]:
    """The project's modules that one of them imports anywhere: also inside functions and under TYPE_CHECKING."""
    path = SOURCES[name]
    package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in SOURCES)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *(node.module or "").split(".")]).strip(".")
            for alias in node.names:
                inner = f"{module}.{alias.name}"
                if inner in SOURCES or module in SOURCES:
                    yield inner if inner in SOURCES else module


def place(name: str) -> tuple[list[str], str] | None:
    """The order that binds a module, and its package in that order. None for the faces of the two trees."""
    top, *inside = name.split(".")
    if not inside or name == "app.py":
        return None
    return (ENGINE if top == "lightx2v" else PAGE), inside[0]


def test_every_package_has_its_place() -> None:
    found = {name: place(name) for name in SOURCES}
    strangers = [name for name, at in found.items() if at is not None and at[1] not in at[0]]
    assert not strangers, f"write the place of {strangers} into the order above"
    absent = {*ENGINE, *PAGE} - {at[1] for at in found.values() if at is not None}
    assert not absent, f"these are gone: {absent}"


@pytest.mark.parametrize("name", [name for name in SOURCES if place(name) is not None])
def test_imports_go_left(name: str) -> None:
    own = place(name)
    assert own is not None
    order, package = own
    for target in imports(name):
        other = place(target)
        if other is None:
            assert target == "lightx2v", f"{name} imports {target}"
        elif other[0] is order:
            assert order.index(other[1]) <= order.index(package), f"{name} imports {target}, which is to its right"
        else:
            assert order is PAGE, f"{name} imports {target}: the engine does not know the page"


@pytest.mark.slow
def test_no_files_import_each_other() -> None:
    graph = {name: set(imports(name)) - {name, "lightx2v"} for name in SOURCES}
    try:
        list(TopologicalSorter(graph).static_order())
    except CycleError as error:
        pytest.fail(f"these import each other: {' -> '.join(error.args[1])}")


def test_front_ends_do_not_import_each_other() -> None:
    for name in SOURCES:
        package = name.split(".")[1] if name.startswith("lightx2v.") else ""
        if package in FRONT_ENDS:
            others = {target.split(".")[1] for target in imports(name) if target.startswith("lightx2v.")}
            assert not others & FRONT_ENDS - {package}, name


@pytest.mark.slow
def test_the_page_never_touches_torch() -> None:
    for name, path in SOURCES.items():
        if name.startswith("app"):
            tree = ast.parse(path.read_text())
            names = [a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names]
            names += [n.module or "" for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and not n.level]
            assert not [name for name in names if name.split(".")[0] == "torch"], name


def test_importing_the_package_is_light() -> None:
    code = (
        "import sys, lightx2v, lightx2v.config, lightx2v.progress, lightx2v.jobs.queue, lightx2v.cost.memory_plan\n"
        "heavy = {'torch', 'gradio', 'transformers'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=60)


def test_the_package_has_the_names_that_it_offers() -> None:
    assert {name: getattr(lightx2v, name).__name__ for name in lightx2v.__all__} == {
        "EngineConfig": "EngineConfig",
        "LightX2VPipeline": "LightX2VPipeline",
        "Request": "Request",
        "errors": "lightx2v.errors",
    }


@pytest.mark.slow
def test_files_and_functions_stay_readable() -> None:
    long: list[str] = []
    for name, path in SOURCES.items():
        text = path.read_text()
        if text.count("\n") > 450:
            long.append(f"{name}: {text.count(chr(10))} lines")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                size = (node.end_lineno or 0) - node.lineno + 1
                if size > 60:
                    long.append(f"{name}:{node.lineno} {node.name} has {size} lines")
    assert not long, long


def test_no_file_has_a_name_that_says_nothing() -> None:
    forbidden = {"utils.py", "util.py", "common.py", "helpers.py", "misc.py", "base.py", "manager.py"}
    named = [p for folder in ("lightx2v", "app", "benchmarks", "training") for p in (ROOT / folder).rglob("*.py")]
    assert not [p for p in named if p.name in forbidden]
