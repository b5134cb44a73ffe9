"""A video's model files are known by size and content: a moved one is found again, a missing one is named."""

from __future__ import annotations

import hashlib
import threading
from pathlib import Path

import pytest
from model_tree import T2V, put

from lightx2v.catalog import used_files
from lightx2v.catalog.catalog import Catalog
from lightx2v.catalog.scan import scan
from lightx2v.catalog.used_files import UsedFiles, content_hash, find_again, known_hash
from lightx2v.errors import ConfigError


@pytest.fixture(autouse=True)
def memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIGHTX2V_CACHE_DIR", str(tmp_path / "cache"))


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_hash_is_computed_once_and_again_after_a_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = put(T2V / "Wan2.1_VAE.pth", tmp_path / "vae.pth")
    assert known_hash(file) is None
    assert content_hash(file) == sha256(file) == known_hash(file)
    with monkeypatch.context() as patch:
        patch.setattr(used_files, "_remembered_hash", None)
        assert content_hash(file) == sha256(file)
    file.write_bytes(b"something else")
    assert known_hash(file) is None and content_hash(file) == sha256(file)


def test_the_hubs_cache_tells_the_hash_without_reading(tmp_path: Path) -> None:
    blob = put(T2V / "Wan2.1_VAE.pth", tmp_path / "blobs" / ("c" * 64))
    link = tmp_path / "snapshots" / "vae.pth"
    link.parent.mkdir()
    link.symlink_to(blob)
    (record,) = UsedFiles({"VAE": link}).to_json()
    assert record == {"role": "VAE", "name": "vae.pth", "size": blob.stat().st_size, "sha256": "c" * 64}


def test_hashing_stops_when_the_program_ends(tmp_path: Path) -> None:
    file, stop = put(T2V / "Wan2.1_VAE.pth", tmp_path / "vae.pth"), threading.Event()
    stop.set()
    used_files._hash_all([file], stop)
    assert known_hash(file) is None


def test_files_are_hashed_in_the_background(tmp_path: Path) -> None:
    file = put(T2V / "Wan2.1_VAE.pth", tmp_path / "vae.pth")
    used = UsedFiles({"VAE": file})
    assert used.to_json()[0]["sha256"] is None
    used_files._hash_all([file], threading.Event())
    used.hash_in_background()  # nothing is left to do
    assert used.to_json([file])[1] == {
        "role": "LoRA",
        "name": "vae.pth",
        "size": file.stat().st_size,
        "sha256": sha256(file),
    }


def test_a_moved_file_is_found_by_its_content(tmp_path: Path) -> None:
    file = put(T2V / "Wan2.1_VAE.pth", tmp_path / "old" / "vae.pth")
    content_hash(file)
    records = UsedFiles({"VAE": file}).to_json()
    settings = {"vae_path": str(file), "model_path": "Wan-AI/Wan2.2-T2V-A14B", "loras": [{"path": str(file)}]}
    catalog = lambda: Catalog(scan([tmp_path / "new"]))  # noqa: E731
    assert find_again(settings, records, catalog) == settings, "a file at its place is taken"
    moved = tmp_path / "new" / "renamed.pth"
    moved.parent.mkdir()
    file.rename(moved)
    found = find_again(settings, records, catalog)
    assert found == settings | {"vae_path": str(moved), "loras": [{"path": str(moved)}]}
    moved.write_bytes(moved.read_bytes()[:-1] + b"x")  # the same size, other content
    with pytest.raises(
        ConfigError, match=r"The file .*vae.pth \(5.2 MB\) of this video is neither at its place.*--vae"
    ):
        find_again({"vae_path": str(file)}, records, catalog)
    assert find_again({"vae_path": str(file)}, records, catalog, {"vae"}) == {"vae_path": str(file)}


@pytest.mark.parametrize("records", [None, [], [1], [{"name": 5}], "x", [{"name": "vae.pth", "size": "many"}]])
def test_records_from_outside_are_read_with_care(tmp_path: Path, records: object) -> None:
    file = put(T2V / "Wan2.1_VAE.pth", tmp_path / "other.pth")
    assert find_again({"vae_path": str(file)}, records, Catalog) == {"vae_path": str(file)}


def test_a_file_at_its_place_with_other_content_is_not_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    file = put(T2V / "Wan2.1_VAE.pth", tmp_path / "vae.pth")
    unhashed = UsedFiles({"VAE": file}).to_json()
    content_hash(file)
    records, settings = UsedFiles({"VAE": file}).to_json(), {"vae_path": str(file)}
    assert find_again(settings, records, Catalog) == settings and not caplog.records
    assert find_again(settings, unhashed, Catalog) == settings and "only the size is compared" in caplog.text
    caplog.clear()
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    with pytest.raises(ConfigError, match=r"neither at its place nor, with the same content"):
        find_again(settings, records, Catalog)
    # An expert is too large to be read for this; its hash counts once it is known.
    monkeypatch.setattr(used_files, "HASHED_AT_ONCE", 0)
    file.write_bytes(file.read_bytes()[:-1] + b"y")
    assert find_again(settings, records, Catalog) == settings and "only the size is compared" in caplog.text
    content_hash(file)
    with pytest.raises(ConfigError, match=r"neither at its place"):
        find_again(settings, records, Catalog)


def test_two_experts_of_one_name_are_told_apart(tmp_path: Path) -> None:
    """The official layout calls both diffusion_pytorch_model.safetensors, and they have the same size."""
    name = "diffusion_pytorch_model.safetensors"
    files = {half: put(T2V / f"{half}_noise_model" / name, tmp_path / half / name) for half in ("high", "low")}
    for file in files.values():
        content_hash(file)
    records = UsedFiles({f"{half}-noise expert": file for half, file in files.items()}).to_json()
    settings = {f"{half}_noise_original_ckpt": str(file) for half, file in files.items()}
    assert find_again(settings, records, Catalog) == settings
    for half, file in files.items():
        moved = tmp_path / "new" / f"{half}_noise.safetensors"
        moved.parent.mkdir(exist_ok=True)
        file.rename(moved)
    found = find_again(settings, records, lambda: Catalog(scan([tmp_path / "new"])))
    assert found == {key: str(tmp_path / "new" / f"{key.partition('_')[0]}_noise.safetensors") for key in settings}
