"""python -m lightx2v.download in its own processes: killed, interrupted, and two at once."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from hub_models import (
    BASE,
    DISTILLED,
    HIGH,
    LOW,
    ROOT,
    T5,
    assert_whole,
    command,
    download,
    environment,
    small_hub,
    snapshot,
)
from hub_server import Fault, HubServer, serving
from patience import PATIENCE, eventually

PRESET = "i2v_distill_merged"
SIZE = 12_000_000
"""Bytes of each distilled expert."""


@pytest.fixture
def server() -> Iterator[HubServer]:
    with serving(small_hub(high=SIZE, low=SIZE + 1)) as started:
        yield started


def start(env: dict[str, str], *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command(PRESET, *arguments), env=env, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def stall(server: HubServer, after: int) -> None:
    """Let the next request for either expert stall after so many bytes."""
    server.faults = {path: [Fault(stall_after=after)] for path in (HIGH, LOW)}


def partial_bytes(home: Path) -> dict[str, int]:
    found = {}
    for path in home.rglob("*.incomplete"):
        with suppress(FileNotFoundError):  # finished between two looks
            found[path.name] = path.stat().st_size
    return found


@pytest.mark.slow
def test_after_a_kill_the_next_start_continues_inside_the_files(server: HubServer, tmp_path: Path) -> None:
    stall(server, 4_000_000)
    env = environment(server, tmp_path)
    first = start(env)
    eventually(lambda: sum(partial_bytes(tmp_path).values()) > 6_000_000)
    first.kill()
    first.communicate()
    kept = sum(partial_bytes(tmp_path).values())
    before = len(server.sent)
    again = download(env, PRESET)
    assert again.returncode == 0, again.stderr
    resumed = server.sent[before:]
    assert {sent.path for sent in resumed} <= {HIGH, LOW}
    assert sum(sent.bytes for sent in resumed) == 2 * SIZE + 1 - kept
    assert all(sent.range for sent in resumed)
    assert_whole(tmp_path, server)


@pytest.mark.slow
def test_two_downloads_at_once_transfer_each_byte_once(server: HubServer, tmp_path: Path) -> None:
    server.pace = 0.003
    env = environment(server, tmp_path)
    both = [start(env), start(env)]
    for process in both:
        _, errors = process.communicate(timeout=PATIENCE)
        assert process.returncode == 0, errors
    for repo, path in [(DISTILLED, HIGH), (DISTILLED, LOW), (BASE, T5)]:
        assert server.bytes_of(path) == len(server.files[repo][path]), path
    assert_whole(tmp_path, server)


@pytest.mark.slow
def test_when_one_of_two_is_killed_the_other_takes_over(server: HubServer, tmp_path: Path) -> None:
    stall(server, 2_000_000)
    env = environment(server, tmp_path)
    first = start(env)
    eventually(lambda: server.bytes_of(HIGH) == server.bytes_of(LOW) == 2_000_000)
    asked = len(server.asked)
    second = start(env, "--verbose")
    eventually(lambda: len(server.asked) >= asked + 2)  # the second has its plan and finds the files taken
    first.kill()
    first.communicate()
    _, errors = second.communicate(timeout=PATIENCE)
    assert second.returncode == 0, errors
    assert_whole(tmp_path, server)


@pytest.mark.slow
def test_ctrl_c_ends_it_and_keeps_its_bytes(server: HubServer, tmp_path: Path) -> None:
    stall(server, 4_000_000)
    process = start(environment(server, tmp_path))
    eventually(lambda: sum(partial_bytes(tmp_path).values()) > 2_000_000)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=PATIENCE)
    assert process.returncode == 130 and "The downloaded bytes are kept" in errors and "Traceback" not in errors
    assert sum(partial_bytes(tmp_path).values()) > 2_000_000


@pytest.mark.slow
def test_a_dry_run_prints_the_bytes_and_downloads_nothing(server: HubServer, tmp_path: Path) -> None:
    done = download(environment(server, tmp_path), PRESET, "--dry_run")
    assert done.returncode == 0, done.stderr
    assert f"12,000,000  to fetch  {DISTILLED}/{HIGH}" in done.stdout
    assert "24,135,029  bytes to fetch (24.1 MB)" in done.stdout
    assert not server.sent and not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_second_start_finds_everything_and_sends_no_request(server: HubServer, tmp_path: Path) -> None:
    env = environment(server, tmp_path)
    assert download(env, PRESET).returncode == 0
    asked = [path for path in server.asked if path.startswith(("/api/models", f"/{BASE}"))]
    again = download(env, PRESET)
    assert again.returncode == 0 and "0  bytes to fetch" in again.stdout and again.stdout.endswith("are here.\n")
    assert [path for path in server.asked if path.startswith(("/api/models", f"/{BASE}"))] == asked
    assert download(env | {"HF_HUB_OFFLINE": "1"}, PRESET).returncode == 0


@pytest.mark.slow
def test_files_in_models_dir_are_not_downloaded(server: HubServer, tmp_path: Path) -> None:
    own = tmp_path / "models" / DISTILLED
    own.mkdir(parents=True)
    for name in (HIGH, LOW):
        os.link(_written(tmp_path / "one", b"mine"), own / name)
    done = download(environment(server, tmp_path / "home"), PRESET, "--models_dir", str(tmp_path / "models"))
    assert done.returncode == 0, done.stderr
    assert not server.bytes_of(HIGH) and snapshot(tmp_path / "home", server, BASE).is_dir()


@pytest.mark.slow
def test_without_a_preset_it_lists_them_and_an_unknown_one_is_an_error(server: HubServer, tmp_path: Path) -> None:
    env = environment(server, tmp_path)
    listed = download(env)
    assert listed.returncode == 0 and "i2v_distill_merged" in listed.stdout
    unknown = download(env, "i2v_distill_merge")
    assert unknown.returncode == 2 and "There is no preset" in unknown.stderr and not server.asked


def test_a_model_path_that_does_not_exist_is_an_error(server: HubServer, tmp_path: Path) -> None:
    settings = tmp_path / "settings.json"
    settings.write_text('{"task": "i2v", "model_path": "' + str(tmp_path / "models") + '"}')
    done = download(environment(server, tmp_path / "home"), str(settings))
    assert done.returncode == 1 and "missing" in done.stdout and "neither on this machine nor on the Hub" in done.stderr


def _written(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path
