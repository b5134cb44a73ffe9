"""The structure of the house, as law: imports go one way, files stay small, faces do not know each other."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "lightx2v"

# A module may import from its own layer's left only, or from a neighbour listed in the same set.
LAYERS: list[set[str]] = [
    {"errors", "flags", "framing", "lora_names", "request", "progress", "terminal"},
    {"attention"},  # below the configuration, which checks the backends' names
    {
        "engine_config",
        "preset_keys",
        "config",
        "hub",
        "media",
        "image",
        "fetch",
        "mp4",
        "estimate",
        "machine",
        "settings",
    },
    {"parallel", "weights"},
    {"models", "sampling", "conditioning", "preload"},
    {"offload", "components", "adapters", "placement", "planner", "memory", "prompts", "conversion", "built"},
    {"result", "engine", "run", "pipeline"},
    {"engine_slot", "job_files", "job_store", "job_worker", "jobs"},
    {"infer", "server", "convert", "download"},
]
FACES = LAYERS[-1]
RANK = {name: rank for rank, layer in enumerate(LAYERS) for name in layer}


def modules() -> list[Path]:
    return sorted(p for p in PACKAGE.rglob("*.py") if p.relative_to(PACKAGE).parts != ("__init__.py",))


def noun(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path: Path) -> set[str]:
    """Absolute dotted names imported anywhere in the file, inside functions and TYPE_CHECKING too."""
    package = ("lightx2v", *path.relative_to(PACKAGE).parts[:-1])
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            prefix = ".".join((*base, *(node.module or "").split("."))).strip(".")
            found |= {prefix, *(f"{prefix}.{alias.name}" for alias in node.names)}
    return found


def inner(names: set[str]) -> set[str]:
    return {n.split(".")[1] for n in names if n.startswith("lightx2v.") and n.split(".")[1] in RANK}


def test_every_file_has_a_layer() -> None:
    strangers = {noun(p) for p in modules()} - set(RANK)
    assert not strangers, f"say in LAYERS where {strangers} belong"


def test_imports_go_one_way() -> None:
    wrong = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in modules()
        for name in inner(imports(path))
        if RANK[name] > RANK[noun(path)]
    ]
    assert not wrong, wrong


def test_faces_do_not_import_each_other() -> None:
    wrong = [(noun(p), n) for p in modules() if noun(p) in FACES for n in inner(imports(p)) & FACES - {noun(p)}]
    assert not wrong, wrong


def test_the_page_never_touches_torch() -> None:
    wrong = [p.name for p in sorted((ROOT / "app").rglob("*.py")) if _imports_torch(p)]
    assert not wrong, wrong


def _imports_torch(path: Path) -> bool:
    tree = ast.parse(path.read_text())
    names = [a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names]
    names += [n.module or "" for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and not n.level]
    return any(name.split(".")[0] == "torch" for name in names)


def test_importing_the_package_is_light() -> None:
    code = (
        "import sys, lightx2v, lightx2v.config, lightx2v.request, lightx2v.progress\n"
        "heavy = {'torch', 'gradio', 'transformers', 'numpy', 'PIL'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=60)


def test_files_and_functions_stay_readable() -> None:
    """About 300 lines a file and 60 a function is the habit; these are the limits."""
    long: list[str] = []
    for path in [*modules(), *sorted((ROOT / "app").rglob("*.py")), ROOT / "app.py"]:
        text = path.read_text()
        if text.count("\n") > 500:
            long.append(f"{path.relative_to(ROOT)}: {text.count(chr(10))} lines")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                size = (node.end_lineno or 0) - node.lineno + 1
                if size > 90:
                    long.append(f"{path.relative_to(ROOT)}:{node.lineno} {node.name} has {size} lines")
    assert not long, long


def test_no_file_has_a_name_that_says_nothing() -> None:
    forbidden = {"utils.py", "util.py", "common.py", "helpers.py", "misc.py", "base.py", "manager.py"}
    named = [p for folder in ("lightx2v", "app", "benchmarks", "training") for p in (ROOT / folder).rglob("*.py")]
    assert not [p for p in named if p.name in forbidden]
