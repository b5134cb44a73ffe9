"""Rules about the source text itself: what is never written, and which versions are the least we accept."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import Specifier
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[1]
SOURCES = [p for folder in ("lightx2v", "app") for p in sorted((ROOT / folder).rglob("*.py"))] + [ROOT / "app.py"]

FORBIDDEN_CALLS = {"eval", "exec", "pickle.load", "pickle.loads", "marshal.loads", "os.system"}
HTTP_CLIENTS = {"http.client", "urllib.request", "urllib3", "requests", "httpx", "httpx2", "aiohttp", "safehttpx"}
CONNECT = {"socket.create_connection", "asyncio.open_connection", "urlopen"}
FROM_HUB = {
    "lightx2v/hub/cache.py": {"constants"},
    "lightx2v/hub/download.py": {"get_async_session"},
    "lightx2v/hub/listing.py": {"HfApi", "HfHubHTTPError", "constants", "errors"},
    "lightx2v/hub/transfer.py": {"OfflineModeIsEnabled", "build_hf_headers", "hf_hub_url", "hf_raise_for_status"},
}
"""The names that each file imports from huggingface_hub."""


@cache
def nodes(path: Path) -> list[ast.AST]:
    return list(ast.walk(ast.parse(path.read_text())))


@cache
def calls(path: Path) -> list[tuple[str, ast.Call]]:
    return [(ast.unparse(node.func), node) for node in nodes(path) if isinstance(node, ast.Call)]


def imported(path: Path) -> set[str]:
    names: set[str] = set()
    for node in nodes(path):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


@pytest.mark.slow
def test_no_code_from_data() -> None:
    found = [(p.name, name) for p in SOURCES for name, _ in calls(p) if name in FORBIDDEN_CALLS]
    assert not found, found


@pytest.mark.slow
def test_pickles_are_read_in_one_place_only() -> None:
    users = {p.relative_to(ROOT).as_posix() for p in SOURCES for name, _ in calls(p) if name == "torch.load"}
    assert len(users) <= 1 and all(user.startswith("lightx2v/weights/") for user in users), users


def test_no_shell_no_unverified_tls() -> None:
    bad = {"shell": True, "verify": False, "share": True, "trust_remote_code": True}
    found = [
        (p.name, name, keyword.arg)
        for p in SOURCES
        for name, node in calls(p)
        for keyword in node.keywords
        if keyword.arg in bad and isinstance(keyword.value, ast.Constant) and keyword.value.value is bad[keyword.arg]
    ]
    assert not found, found


def test_http_requests_leave_through_two_files_only() -> None:
    """media/web_images.py fetches addresses from users, with a guard. hub/transfer.py fetches from the Hub alone: with
    huggingface_hub's client, by GET, from an address that hf_hub_url made."""
    files = {path.relative_to(ROOT).as_posix(): path for path in SOURCES}
    own = {name for name, path in files.items() if imported(path) & HTTP_CLIENTS}
    connecting = {name for name, path in files.items() for call, _ in calls(path) if call in CONNECT}
    assert own == connecting == {"lightx2v/media/web_images.py"}

    from_hub: dict[str, set[str]] = {}
    for name, path in files.items():
        for node in nodes(path):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("huggingface_hub"):
                from_hub.setdefault(name, set()).update(alias.name for alias in node.names)
        assert not [module for module in imported(path) if module == "huggingface_hub"] or name in from_hub
    assert from_hub == FROM_HUB

    sent = [(name, node) for name, path in files.items() for call, node in calls(path) if call == "client.stream"]
    assert [(name, [ast.unparse(argument) for argument in node.args]) for name, node in sent] == [
        ("lightx2v/hub/transfer.py", ["'GET'", "url"])
    ]
    addresses = re.findall(r"\burl = (\w+)\(", files["lightx2v/hub/transfer.py"].read_text())
    assert addresses == ["hf_hub_url"]


def test_nothing_listens_on_every_address_by_default() -> None:
    found = [
        p.name
        for p in SOURCES
        if re.search(r"default\s*=\s*[\"']0\.0\.0\.0|host[^=\n]*=\s*[\"']0\.0\.0\.0", p.read_text())
    ]
    assert not found, found


def test_broad_except_only_where_a_run_must_not_take_the_process_down() -> None:
    allowed = {"lightx2v/jobs/engine_slot.py", "lightx2v/jobs/worker.py", "lightx2v/progress.py"}
    found: list[str] = []
    for path in SOURCES:
        for node in nodes(path):
            if isinstance(node, ast.ExceptHandler) and (node.type is None or ast.unparse(node.type) == "Exception"):
                found.append(path.relative_to(ROOT).as_posix())
    assert set(found) <= allowed, set(found) - allowed


def test_no_print_outside_command_lines() -> None:
    allowed = {"infer.py", "convert.py", "download.py", "find_models.py", "calibrate.py", "command.py", "main.py"}
    found = [p.name for p in SOURCES for name, _ in calls(p) if name == "print" and p.name not in allowed]
    assert not found, found


def requirements() -> list[Requirement]:
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    return [Requirement(line) for line in lines if line and line[0] not in "#-"]


def pinned(file: str) -> dict[str, Specifier]:
    """The version of each package in constraints.txt or requirements.lock."""
    lines = (ROOT / file).read_text().splitlines()
    found = [Requirement(line.rstrip(" \\")) for line in lines if line and line[0] not in "# "]
    return {canonicalize_name(pin.name): next(iter(pin.specifier)) for pin in found}


def test_floors_keep_known_holes_out() -> None:
    floors = {"torch": "2.10", "gradio": "6.25", "safetensors": "0.5", "pillow": "12", "huggingface_hub": "1.16"}
    ranges = {requirement.name: requirement.specifier for requirement in requirements()}
    for name, floor in floors.items():
        assert Version(floor + ".dev0") not in ranges[name], f"{name} accepts versions under {floor}"
    tested = pinned("constraints.txt")
    for name, specifier in ranges.items():
        pin = tested[canonicalize_name(name)]
        assert pin.operator == "==" and pin.version in specifier, f"{name}: the tested {pin} is outside {specifier}"


def test_every_locked_file_has_its_hash_and_the_tested_version() -> None:
    locked, tested = pinned("requirements.lock"), pinned("constraints.txt")
    assert {canonicalize_name(requirement.name) for requirement in requirements()} <= set(locked)
    assert all(pin.operator == "==" for pin in locked.values())
    assert not {name for name in locked.keys() & tested.keys() if locked[name] != tested[name]}
    entries = re.split(r"^(?=[a-z])", (ROOT / "requirements.lock").read_text(), flags=re.MULTILINE)[1:]
    assert len(entries) == len(locked)
    assert all(re.search(r"--hash=sha256:[0-9a-f]{64}$", entry, re.MULTILINE) for entry in entries)


def test_nothing_of_one_machine_is_named() -> None:
    private = re.compile(r"(?<![\w./])/(?:root|home/(?!user\b)\w+|work|tmp/bash)\b")
    texts = [p for p in ROOT.rglob("*.py") if ".venv" not in p.parts] + sorted(ROOT.glob("*.md"))
    found = [p.relative_to(ROOT).as_posix() for p in texts if p != Path(__file__) and private.search(p.read_text())]
    assert not found, found


def test_patterns_take_the_digits_of_ascii_only() -> None:
    """A size of "６４x64" would reach the code that counts on digits. In a pattern of bytes \\d is ASCII's own."""
    found = [
        (p.name, node.value)
        for p in SOURCES
        for node in nodes(p)
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and "\\d" in node.value
    ]
    assert not found, found


def test_the_working_folder_is_asked_for_in_one_place() -> None:
    """Where it was deleted, that place says so; Path.cwd and os.getcwd raise FileNotFoundError."""
    users = {
        p.relative_to(ROOT).as_posix() for p in SOURCES for name, _ in calls(p) if name in ("Path.cwd", "os.getcwd")
    }
    assert users == {"lightx2v/config/folders.py"}
