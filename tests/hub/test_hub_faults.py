"""Faults of a download and their messages: cuts, silence, wrong headers and contents, refusals, a full disk."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
from hub_models import (
    BASE,
    DISTILLED,
    HIGH,
    LOW,
    T5,
    assert_whole,
    content,
    download,
    environment,
    merged,
    point_here,
    quick,
    small_hub,
    snapshot,
)
from hub_server import Fault, HubServer, serving, sha256
from huggingface_hub import constants
from patience import PATIENCE

from lightx2v.errors import DownloadError
from lightx2v.hub import Hub, ensure
from lightx2v.progress import Meter

SIZE = 200_000
"""Bytes of the file HIGH."""


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    point_here(monkeypatch, tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    return tmp_path


@pytest.fixture
def server(home: Path) -> Iterator[HubServer]:
    with serving(small_hub()) as started:
        yield started


def fetch_all(server: HubServer, **patience: float) -> None:
    ensure(merged(), meter=Meter(), hub=quick(server, **patience))  # type: ignore[arg-type]


def ranges(server: HubServer, path: str = HIGH) -> list[str | None]:
    return [sent.range for sent in server.sent if sent.path == path]


def partial(home: Path, server: HubServer) -> Path:
    """The partial file of HIGH."""
    return (
        snapshot(home, server, DISTILLED).parents[1] / "blobs" / f"{sha256(server.files[DISTILLED][HIGH])}.incomplete"
    )


# ---- recovers by itself ---------------------------------------------------------------------------------------------


def test_after_a_cut_it_continues_inside_the_file(home: Path, server: HubServer) -> None:
    server.faults[HIGH] = [Fault(cut_after=70_000), Fault(cut_after=50_000)]
    fetch_all(server)
    assert ranges(server) == [None, "bytes=70000-", "bytes=120000-"] and server.bytes_of(HIGH) == SIZE
    assert_whole(home, server)


@pytest.mark.slow
def test_a_silent_connection_is_replaced(home: Path, server: HubServer) -> None:
    server.faults[HIGH] = [Fault(stall_after=70_000), Fault(stall_after=0)]
    fetch_all(server, stall=2.0)
    assert ranges(server) == [None, "bytes=70000-", "bytes=70000-"] and server.bytes_of(HIGH) == SIZE
    assert_whole(home, server)


def test_it_never_gives_up_while_each_connection_brings_bytes(home: Path, server: HubServer) -> None:
    server.faults[HIGH] = [Fault(cut_after=10_000) for _ in range(12)]
    fetch_all(server, tries=2)
    assert server.bytes_of(HIGH) == SIZE
    assert_whole(home, server)


@pytest.mark.slow
@pytest.mark.parametrize("status", [429, 500, 503, 403])
def test_a_busy_network_or_an_expired_address_is_asked_again(home: Path, server: HubServer, status: int) -> None:
    server.faults[HIGH] = [Fault(status=status, retry_after="0")]
    fetch_all(server)
    assert_whole(home, server)


def test_a_server_that_ignores_ranges_sends_the_file_again(home: Path, server: HubServer) -> None:
    server.faults[HIGH] = [Fault(cut_after=70_000), Fault(no_range=True)]
    fetch_all(server)
    assert ranges(server) == [None, "bytes=70000-"] and server.bytes_of(HIGH) == 70_000 + SIZE
    assert_whole(home, server)


def test_a_range_that_is_refused_starts_the_file_over(home: Path, server: HubServer) -> None:
    server.faults[HIGH] = [Fault(cut_after=70_000), Fault(status=416)]
    fetch_all(server)
    assert ranges(server) == [None, "bytes=70000-", None]
    assert_whole(home, server)


def test_a_wrong_range_is_refused(home: Path, server: HubServer) -> None:
    server.faults[HIGH] = [Fault(cut_after=70_000), Fault(shift=10)]
    fetch_all(server)
    assert ranges(server) == [None, "bytes=70000-", "bytes=70000-"]
    assert_whole(home, server)


def test_a_damaged_partial_file_is_noticed_and_downloaded_again(
    home: Path, server: HubServer, caplog: pytest.LogCaptureFixture
) -> None:
    partial(home, server).parent.mkdir(parents=True)
    partial(home, server).write_bytes(b"\0" * 150_000)
    with caplog.at_level(logging.WARNING, "lightx2v.hub"):
        fetch_all(server)
    assert ranges(server) == ["bytes=150000-", None] and "damaged" in caplog.text
    assert_whole(home, server)


@pytest.mark.slow
@pytest.mark.parametrize("size", [SIZE, SIZE + 5])
def test_a_partial_file_with_all_bytes_or_more_is_checked_first(home: Path, server: HubServer, size: int) -> None:
    partial(home, server).parent.mkdir(parents=True)
    partial(home, server).write_bytes((server.files[DISTILLED][HIGH] + b"extra")[:size])
    fetch_all(server)
    assert ranges(server) == ([] if size == SIZE else [None])
    assert_whole(home, server)


# ---- gives up with a reason -----------------------------------------------------------------------------------------


def test_a_file_with_the_wrong_checksum_is_deleted(home: Path, server: HubServer) -> None:
    server.said[HIGH] = content(SIZE, 99)
    with pytest.raises(DownloadError, match=rf"{HIGH} from {DISTILLED} does not have the checksum .*deleted"):
        fetch_all(server)
    blobs = snapshot(home, server, DISTILLED).parents[1] / "blobs"
    assert sha256(server.said[HIGH]) not in {path.name for path in blobs.iterdir()}
    assert (blobs / f"{sha256(server.said[HIGH])}.incomplete").stat().st_size == 0
    assert not snapshot(home, server, DISTILLED).exists()


@pytest.mark.slow
@pytest.mark.parametrize("length", [SIZE - 1, SIZE + 1, 10**12])
def test_a_wrong_content_length_is_refused(home: Path, server: HubServer, length: int) -> None:
    server.faults[HIGH] = [Fault(length=length) for _ in range(9)]
    with pytest.raises(DownloadError, match=rf"announces {length} bytes, the Hub lists {SIZE}\), 3 times"):
        fetch_all(server)
    assert partial(home, server).stat().st_size == 0


def test_connections_without_bytes_end_the_download_and_keep_its_bytes(home: Path, server: HubServer) -> None:
    server.faults[HIGH] = [Fault(cut_after=70_000), *(Fault(cut_after=0) for _ in range(9))]
    with pytest.raises(DownloadError, match=r"stopped at 70 kB of 200 kB \(.*\), 3 times in a row\. The .* are kept"):
        fetch_all(server)
    assert partial(home, server).stat().st_size == 70_000


def test_an_unknown_repository_says_what_to_check(server: HubServer) -> None:
    del server.files[BASE]
    with pytest.raises(DownloadError, match=rf"no folder {BASE} on this machine.*Check the name.*hf auth login"):
        fetch_all(server)


@pytest.mark.slow
def test_a_gated_repository_says_where_to_accept_its_conditions(
    server: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.gated.add(DISTILLED)
    with pytest.raises(
        DownloadError, match=rf"{DISTILLED} is gated: accept its conditions on {server.url}/{DISTILLED}"
    ):
        fetch_all(server)
    server.token = "hf_mine"
    monkeypatch.setenv("HF_TOKEN", "hf_mine")
    fetch_all(server)


def test_a_file_that_vanished_since_the_listing_is_named(server: HubServer) -> None:
    listing = server.listing
    server.listing = lambda repo: {  # type: ignore[method-assign]
        **listing(repo),
        "siblings": [*listing(repo)["siblings"], *([gone] if repo == BASE else [])],
    }
    gone = {"rfilename": "google/umt5-xxl/gone.json", "size": 3, "blobId": "d" * 40}
    with pytest.raises(DownloadError, match=f"{BASE} no longer has this file"):
        fetch_all(server)


def test_an_unreachable_hub_is_an_error_about_network_and_mirror(home: Path) -> None:
    with pytest.raises(DownloadError, match="cannot be reached .*HF_ENDPOINT"):
        ensure(merged(), meter=Meter(), hub=Hub(endpoint="http://127.0.0.1:9"))


def test_a_response_that_is_not_a_list_of_files_is_an_error_about_proxies(server: HubServer) -> None:
    server.listing = lambda repo: "<html>"  # type: ignore[method-assign, assignment, return-value]
    with pytest.raises(DownloadError, match="did not answer with a list of files"):
        fetch_all(server)


def test_offline_mode_sends_no_request(server: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(DownloadError, match="HF_HUB_OFFLINE is set"):
        fetch_all(server)
    assert not server.asked


@pytest.mark.slow
def test_a_full_disk_is_an_error_and_the_next_start_continues(home: Path, server: HubServer) -> None:
    """A limit on the size of files replaces the full disk: it gives the same error at the same place."""
    import subprocess

    from hub_models import ROOT, command

    env = environment(server, home)
    text = snapshot(home, server, BASE).parents[1] / "blobs" / sha256(server.files[BASE][T5])
    server.faults = {path: [Fault(after=text.exists)] for path in (HIGH, LOW)}  # the text encoder is there by then
    limited = ["bash", "-c", 'ulimit -f 100; exec "$@"', "bash", *command("i2v_distill_merged")]
    ended = subprocess.run(limited, env=env, cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE, check=False)
    assert ended.returncode == 1 and "could not be written to" in ended.stderr and "102 kB of 200 kB" in ended.stderr
    kept = {path: server.bytes_of(path) for path in (HIGH, LOW, T5)}
    again = download(env, "i2v_distill_merged")
    assert again.returncode == 0, again.stderr
    assert_whole(home, server)
    assert "bytes=102400-" in ranges(server, HIGH) + ranges(server, LOW) and kept[T5] == server.bytes_of(T5) == 90_000
