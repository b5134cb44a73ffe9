"""From a preset to local files: the plan, the download, and where the files are found afterwards."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from hub_models import (
    BASE,
    CONFIG,
    DISTILLED,
    HIGH,
    LOW,
    NEEDED,
    T5,
    TOKENIZER,
    VAE,
    assert_whole,
    merged,
    point_here,
    quick,
    small_hub,
    snapshot,
)
from hub_server import Fault, HubServer, serving, sha256
from huggingface_hub import hf_hub_download, try_to_load_from_cache

from lightx2v.config.model_paths import RIFE
from lightx2v.config.presets import resolve
from lightx2v.errors import Cancelled, ConfigError, DownloadError
from lightx2v.hub import ensure, fetch, find, make_plan, missing
from lightx2v.loading.model_files import locate
from lightx2v.progress import CancelToken, Meter, Progress


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    point_here(monkeypatch, tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def server(home: Path) -> Iterator[HubServer]:
    with serving(small_hub()) as started:
        yield started


def test_a_merged_preset_needs_no_file_of_the_base_experts(home: Path, server: HubServer) -> None:
    plan = make_plan(merged(), hub=quick(server))
    assert {file.name for file in plan.files} == {f"{repo}/{path}" for repo, paths in NEEDED.items() for path in paths}
    assert plan.left == sum(len(server.files[repo][path]) for repo, paths in NEEDED.items() for path in paths)
    assert not server.sent and not (home / "hub").exists()


def test_a_base_preset_needs_both_folders_of_experts(server: HubServer) -> None:
    plan = make_plan(resolve("i2v_base").engine, hub=quick(server))
    shards = [file.name for file in plan.files if file.name.endswith(".safetensors")]
    assert len(shards) == 4 and all(name.startswith(f"{BASE}/") for name in shards)


def test_downloaded_files_are_where_other_programs_look(home: Path, server: HubServer) -> None:
    hub = quick(server)
    fetch(make_plan(merged(), hub=hub), meter=Meter(), hub=hub)
    assert_whole(home, server)
    assert try_to_load_from_cache(BASE, VAE, cache_dir=home / "hub") == str(snapshot(home, server, BASE) / VAE)
    before = len(server.sent)
    assert Path(hf_hub_download(BASE, T5, endpoint=server.url, cache_dir=home / "hub")).stat().st_size == 90_000
    assert len(server.sent) == before


def test_files_of_other_programs_are_not_downloaded_again(home: Path, server: HubServer) -> None:
    hf_hub_download(DISTILLED, HIGH, endpoint=server.url, cache_dir=home / "hub")
    ensure(merged(), meter=Meter(), hub=quick(server))
    assert server.bytes_of(HIGH) == len(server.files[DISTILLED][HIGH])
    assert_whole(home, server)


def test_locate_finds_a_downloaded_model_by_its_name(home: Path, server: HubServer) -> None:
    assert missing(merged()) and find(f"{BASE}/{VAE}", merged()) is None
    ensure(merged(), meter=Meter(), hub=quick(server))
    files = locate(merged())
    assert files.high == snapshot(home, server, DISTILLED) / HIGH and files.vae == snapshot(home, server, BASE) / VAE
    assert files.architecture == {"dim": 64, "num_layers": 2}
    asked = len(server.asked)
    ensure(merged(), meter=Meter(), hub=quick(server))
    assert len(server.asked) == asked and missing(merged()) == []


@pytest.mark.slow
def test_local_files_are_used_and_only_the_rest_is_downloaded(home: Path, server: HubServer) -> None:
    local = home / "models" / DISTILLED / HIGH
    local.parent.mkdir(parents=True)
    local.write_bytes(b"mine")
    config = replace(merged(), models_dir=str(home / "models"))
    plan = make_plan(config, hub=quick(server))
    assert (f"{DISTILLED}/{HIGH}", 4) in plan.present and not server.bytes_of(HIGH)
    ensure(config, meter=Meter(), hub=quick(server))
    assert locate(config).high == local and not server.bytes_of(HIGH)


def test_nothing_is_downloaded_for_a_local_model_folder(home: Path) -> None:
    (home / BASE).mkdir(parents=True)
    assert missing(merged()) == [f"{DISTILLED}/{HIGH}", f"{DISTILLED}/{LOW}"]


def test_a_folder_without_all_its_shards_counts_as_missing(home: Path, server: HubServer) -> None:
    config = resolve("i2v_base").engine
    ensure(config, meter=Meter(), hub=quick(server))
    assert missing(config) == []
    shard = next(snapshot(home, server, BASE).glob("low_noise_model/*-00002-of-00002.safetensors"))
    shard.resolve().unlink()
    assert missing(config) == [f"{BASE}/low_noise_model/"]
    ensure(config, meter=Meter(), hub=quick(server))
    assert missing(config) == [] and shard.stat().st_size == 700_000


@pytest.mark.slow
def test_two_files_with_the_same_content_are_downloaded_once(home: Path, server: HubServer) -> None:
    server.files[BASE]["low_noise_model/config.json"] = server.files[BASE][CONFIG]
    config = resolve("i2v_base").engine
    ensure(config, meter=Meter(), hub=quick(server))
    assert missing(config) == []
    assert [sent.path.rpartition("/")[2] for sent in server.sent].count("config.json") == 1


@pytest.mark.slow
def test_a_new_commit_with_the_same_files_costs_no_bytes(home: Path, server: HubServer) -> None:
    ensure(merged(), meter=Meter(), hub=quick(server))
    sent = len(server.sent)
    server.commit = "5" * 40
    server.files[BASE]["added.pth"] = b"x" * 3000
    hf_hub_download(BASE, "added.pth", endpoint=server.url, cache_dir=home / "hub")  # makes the new commit current
    assert missing(merged())
    ensure(merged(), meter=Meter(), hub=quick(server))
    assert len(server.sent) == sent + 1 and missing(merged()) == []
    assert find(f"{BASE}/added.pth", merged()) is not None


def test_a_plan_that_does_not_fit_is_refused_with_the_numbers(home: Path, server: HubServer) -> None:
    hub = quick(server)
    plan = make_plan(merged(), hub=hub, free=lambda folder: 300_000)
    with pytest.raises(DownloadError, match=r"of 535 kB does not fit: 300 kB are free .* Free 262 kB more"):
        fetch(plan, meter=Meter(), hub=hub)
    assert not server.sent and not (home / "hub").exists()


def test_the_plan_counts_the_bytes_of_partial_files(home: Path, server: HubServer) -> None:
    blobs = snapshot(home, server, DISTILLED).parents[1] / "blobs"
    blobs.mkdir(parents=True)
    whole = server.files[DISTILLED][HIGH]
    (blobs / f"{sha256(whole)}.incomplete").write_bytes(whole[:150_000])
    plan = make_plan(merged(), hub=quick(server))
    (file,) = [file for file in plan.files if file.file.path == HIGH]
    assert (file.here, file.left) == (150_000, 50_000)


@pytest.mark.slow
def test_progress_counts_bytes_up_to_the_total(server: HubServer) -> None:
    events: list[Progress] = []
    server.pace = 0.6
    ensure(merged(), meter=Meter(on_progress=events.append), hub=quick(server))
    assert {event.stage for event in events} == {"download"}
    steps = [event.step for event in events if event.total]
    assert steps == sorted(steps) and steps[-1] == events[-1].total == 535_029
    assert any(0 < step < 535_029 for step in steps)
    assert events[-1].message.endswith("/s")
    begun = [event for event in events if 0 < event.step < event.total]
    assert begun[0].eta is None, "the first bytes tell nothing about the rest"
    moved = [event.eta for event in begun if event.step > begun[0].step]  # others say that nothing has come meanwhile
    assert moved and all(moved)


@pytest.mark.slow
def test_a_cancelled_download_stops_at_once_and_keeps_its_bytes(home: Path, server: HubServer) -> None:
    server.faults = {path: [Fault(stall_after=70_000)] for path in (HIGH, LOW)}
    token = CancelToken()

    def cancel_when_stalled(event: Progress) -> None:
        if event.total and event.total - event.step == 200_000 + 200_001 - 2 * 70_000:  # all that comes has come
            token.cancel()

    with pytest.raises(Cancelled):
        ensure(merged(), meter=Meter(on_progress=cancel_when_stalled), cancel=token, hub=quick(server))
    for partial in (home / "hub").rglob("*.incomplete"):
        assert partial.stat().st_size == 70_000
    ensure(merged(), meter=Meter(), hub=quick(server))
    assert server.bytes_of(HIGH) == 200_000 and server.bytes_of(LOW) == 200_001
    assert_whole(home, server)


def test_abandoned_partial_files_are_deleted(home: Path, server: HubServer) -> None:
    blobs = snapshot(home, server, BASE).parents[1] / "blobs"
    blobs.mkdir(parents=True)
    old, young, resumable = (blobs / f"{'a' * 64}{name}.incomplete" for name in (".0123abcd", ".4567cdef", ""))
    for path in (old, young, resumable):
        path.write_bytes(b"part")
    for path in (old, resumable):
        os.utime(path, (time.time() - 2 * 86400,) * 2)
    ensure(merged(), meter=Meter(), hub=quick(server))
    assert (old.exists(), young.exists(), resumable.exists()) == (False, True, True)


def test_the_error_about_a_file_that_a_repository_lacks_lists_those_it_has(server: HubServer) -> None:
    config = replace(merged(), high_noise_original_ckpt=f"{DISTILLED}/another.safetensors")
    with pytest.raises(DownloadError, match=rf"has no another.safetensors. It has: .*{HIGH}"):
        make_plan(config, hub=quick(server))


def test_a_whole_repository_is_never_downloaded(server: HubServer) -> None:
    with pytest.raises(ConfigError, match="on the Hub it would be a whole repository"):
        make_plan(replace(merged(), vae_path=BASE), hub=quick(server))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["../../evil", "/evil", "a\\..\\evil", "high_noise_model/../../evil"])
def test_a_listing_cannot_name_files_outside_of_the_cache(server: HubServer, name: str) -> None:
    server.files[BASE][name] = b"x"
    with pytest.raises(DownloadError, match="without a size or a valid name"):
        make_plan(merged(), hub=quick(server))


@pytest.mark.parametrize(
    "name",
    ["half\ud83d.json", "a\0b", "a\nb", "x" * 300, "球" * 100, "a/" * 600 + "b"],
    ids=lambda name: ascii(name)[:20],
)
def test_a_listing_cannot_name_files_that_no_folder_can_hold(server: HubServer, name: str) -> None:
    server.files[BASE][name] = b"x"
    with pytest.raises(DownloadError, match="without a size or a valid name") as refused:
        make_plan(merged(), hub=quick(server))
    assert len(str(refused.value)) < 400 and str(refused.value).isprintable()


def test_the_hub_gets_the_token_and_the_content_network_does_not(
    server: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    ensure(merged(), meter=Meter(), hub=quick(server))
    tokens = {sent.path: sent.token for sent in server.sent}
    assert tokens[CONFIG] == "Bearer hf_secret" and tokens[TOKENIZER] == tokens[T5] == tokens[HIGH] is None


def test_rife_is_planned_fetched_and_found_where_a_run_needs_it(home: Path, server: HubServer) -> None:
    repo, path = "Comfy-Org/frame_interpolation", "frame_interpolation/rife_v4.25.safetensors"
    assert f"{repo}/{path}" == RIFE
    server.files[repo] = {path: b"weights" * 100}
    config, hub = merged(), quick(server)
    assert RIFE not in [file.name for file in make_plan(config, hub=hub).files]
    plan = make_plan(config, also=(RIFE,), hub=hub)
    assert [file.file.size for file in plan.files if file.name == RIFE] == [700]
    ensure(config, also=(RIFE,), meter=Meter(), hub=hub)
    place = find(RIFE, config)
    assert place is not None and place.read_bytes() == b"weights" * 100
    sent = len(server.sent)
    ensure(config, also=(RIFE,), meter=Meter(), hub=hub)
    assert len(server.sent) == sent  # nothing is missing
