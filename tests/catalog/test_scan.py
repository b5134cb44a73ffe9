"""Folders are scanned within their bounds, and each header is read once for each content."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from model_tree import T2V, comfy_tree, put, style_lora

from lightx2v.catalog.describe import describe
from lightx2v.catalog.folders import forget_folder, model_folders, tell_folder, told_folders
from lightx2v.catalog.found_file import FoundFile
from lightx2v.catalog.scan import scan
from lightx2v.config.environment import Environment
from lightx2v.errors import ConfigError


@pytest.fixture
def counted() -> tuple[list[Path], Callable[[Path, int], FoundFile | None]]:
    seen: list[Path] = []

    def look(path: Path, size: int) -> FoundFile | None:
        seen.append(path)
        return describe(path, size)

    return seen, look


def kinds(files: list[FoundFile]) -> dict[str, str]:
    return {file.path.name: file.kind for file in files}


def test_a_tree_like_comfyuis_is_found_whole(tmp_path: Path) -> None:
    found = scan([comfy_tree(tmp_path)])
    assert sorted(file.kind for file in found) == [
        *["LoRA"] * 4, "VAE", *["expert"] * 4, "text encoder", *["tokenizer"] * 2,
    ]  # fmt: skip


def test_a_header_is_read_once_until_its_file_or_note_changes(
    tmp_path: Path, counted: tuple[list[Path], Callable[[Path, int], FoundFile | None]]
) -> None:
    seen, look = counted
    models, memory = comfy_tree(tmp_path), tmp_path / "memory.json"
    lora = style_lora(models)
    first = scan([models], memory, describe=look)
    assert len(seen) == len(set(seen)) == 11
    assert scan([models], memory, describe=look) == first and len(seen) == 11
    os.utime(models / "vae/wan_2.1_vae.pth", ns=(1, 1))
    lora.with_suffix(".civitai.info").write_text(json.dumps({"trainedWords": ["new word"]}))
    os.utime(lora.with_suffix(".civitai.info"), ns=(2**62, 2**62))
    changed = scan([models], memory, describe=look)
    assert (
        sorted(path.name for path in seen[11:]) == ["watercolour.safetensors", "wan_2.1_vae.pth"][::-1]
        or len(seen) == 13
    )
    assert next(file for file in changed if file.path == lora).triggers == ("wtrclr style", "new word")


@pytest.mark.parametrize(
    "content", ["", "{}", "[1]", '{"version": 1, "files": {"/a": [1, 2, {"path": "/a"}]}}', "\xff"]
)
def test_a_damaged_memory_is_made_anew(tmp_path: Path, content: str) -> None:
    models, memory = tmp_path / "models", tmp_path / "memory.json"
    put(T2V / "Wan2.1_VAE.pth", models / "vae.pth")
    memory.write_text(content, "latin-1")
    assert kinds(scan([models], memory)) == {"vae.pth": "VAE"}
    assert json.loads(memory.read_text())["files"].keys() == {str(models / "vae.pth")}


def test_other_folders_stay_remembered(tmp_path: Path) -> None:
    memory = tmp_path / "memory.json"
    for name in ("one", "two"):
        put(T2V / "Wan2.1_VAE.pth", tmp_path / name / "vae.pth")
        scan([tmp_path / name], memory)
    assert len(json.loads(memory.read_text())["files"]) == 2


def test_no_link_leads_out_of_the_folders(tmp_path: Path) -> None:
    inside, outside = tmp_path / "models", tmp_path / "private"
    put(T2V / "Wan2.1_VAE.pth", outside / "secret.pth")
    put(T2V / "Wan2.1_VAE.pth", inside / "vae.pth")
    (inside / "linked.pth").symlink_to(outside / "secret.pth")
    (inside / "folder").symlink_to(outside)
    (inside / "circle").symlink_to(inside)
    (inside / "gone.pth").symlink_to(tmp_path / "nowhere.pth")
    assert kinds(scan([inside])) == {"vae.pth": "VAE"}
    assert len(scan([inside, outside])) == 2, "a link into another told folder names a file that is found there"


def test_the_hubs_cache_counts_a_file_of_two_commits_once(tmp_path: Path) -> None:
    repo = tmp_path / "hub" / "models--Wan-AI--Wan2.2-T2V-A14B"
    put(T2V / "Wan2.1_VAE.pth", repo / "blobs" / ("a" * 64))
    for commit in ("1" * 40, "2" * 40):
        link = repo / "snapshots" / commit / "Wan2.1_VAE.pth"
        link.parent.mkdir(parents=True)
        link.symlink_to(Path("../../blobs") / ("a" * 64))
    assert kinds(scan([tmp_path / "hub"])) == {"Wan2.1_VAE.pth": "VAE"}


def test_shards_are_one_model(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(T2V / "low_noise_model/diffusion_pytorch_model.safetensors")
    names = sorted(tensors)
    folder = tmp_path / "Wan2.2-T2V" / "low_noise_model"
    folder.mkdir(parents=True)
    for part, half in enumerate((names[::2], names[1::2]), 1):
        save_file({name: tensors[name] for name in half}, folder / f"model-{part:05}-of-00002.safetensors")
    (found,) = scan([tmp_path])
    assert (found.path, found.kind, found.expert) == (folder, "expert", "low")
    assert found.size == sum(file.stat().st_size for file in folder.iterdir())
    (folder / "model-00001-of-00002.safetensors").unlink()
    assert scan([tmp_path]) == [], "half a model is none"


def test_folders_are_told_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIGHTX2V_USER_DIR", str(tmp_path / "user"))
    home = tmp_path / "home"
    comfy, mine = home / "ComfyUI" / "models", tmp_path / "mine"
    for folder in (comfy, mine, mine / "inner"):
        folder.mkdir(parents=True)
    monkeypatch.setenv("HOME", str(home))
    tell_folder(mine)
    tell_folder(mine)
    assert told_folders() == [mine]
    environment = Environment.read({"LIGHTX2V_MODEL_DIRS": str(mine / "inner")})
    assert {mine, comfy} <= {*model_folders([], environment)}
    assert mine / "inner" not in model_folders([], environment), "it is scanned with the folder above"
    forget_folder(mine)
    assert mine not in model_folders() and mine.is_dir()
    with pytest.raises(ConfigError, match="none of the folders"):
        forget_folder(mine)
    for wrong in (tmp_path / "absent", "a\0b"):
        with pytest.raises(ConfigError, match="There is no folder"):
            tell_folder(wrong)
        with pytest.raises(ConfigError, match="There is no folder"):
            model_folders([wrong])


EXTRA = """
# a comment
comfyui:
    base_path: %(base)s
    is_default: true
    loras: loras/
    diffusion_models: |
        diffusion_models/
        unet

    custom_nodes: custom_nodes/
a111:
    vae: ["%(absolute)s"]
    loras: ../beside
empty:
"""


def test_the_folders_of_comfyuis_extra_paths_are_looked_through(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """With a base path or beside the file, one or several of a kind; folders that hold no models are not."""
    home = tmp_path / "home"
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("BIG_DISK", str(tmp_path / "disk"))
    (home / "ComfyUI/models").mkdir(parents=True)
    wanted = {
        *(tmp_path / "disk" / name for name in ("loras", "diffusion_models", "unet")),
        *(tmp_path / "vaes", home / "beside"),
    }
    for folder in (*wanted, tmp_path / "disk/custom_nodes"):
        folder.mkdir(parents=True)
    values = {"base": "$BIG_DISK", "absolute": tmp_path / "vaes"}
    (home / "ComfyUI/extra_model_paths.yaml").write_text(EXTRA % values)
    found = {*model_folders()}
    assert wanted <= found and tmp_path / "disk/custom_nodes" not in found and not caplog.text
    (tmp_path / "disk/unet").rmdir()
    assert tmp_path / "disk/unet" not in model_folders()
    assert "ComfyUI/extra_model_paths.yaml: there is no folder" in caplog.text and "disk/unet for" in caplog.text
    told = tmp_path / "told"
    (told / "models").mkdir(parents=True)
    (told / "extra_model_paths.yaml").write_text("x: {loras: mine}")
    (told / "mine").mkdir()
    assert told / "mine" in model_folders([told / "models"]), "beside a told folder, too"


ALIASES = b"z:\n  l0: &l0 [b]\n" + b"".join(
    b"  l%d: &l%d [%s]\n" % (n, n, b",".join([b"*l%d" % (n - 1)] * 9)) for n in range(1, 13)
)
"""A few bytes that stand for 9 to the 12th values."""


@pytest.mark.parametrize(
    "text",
    [
        b"a: [",
        b"\xff\xfe\x00",
        b"!!python/object/apply:os.system ['touch evil']",
        b"- 1\n- 2",
        b"just a sentence",
        b"a: 5",
        b"a: {loras: {b: c}}",
        b"a: {base_path: [1], loras: x}",
        b"a: {base_path: 2001-99-99}",
        b"{[1]: 2}",
        b"[" * 5000,
        b"#" * (1 << 21),
        b'a: {loras: "x\\0y"}',
        ALIASES + b"a: *l12",
        ALIASES + b"a: {loras: [*l12]}",
        ALIASES + b"a: {base_path: *l12, loras: x}",
    ],
)
def test_a_broken_file_of_extra_paths_is_named_and_left_out(
    text: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "ComfyUI/models").mkdir(parents=True)
    (tmp_path / "ComfyUI/extra_model_paths.yaml").write_bytes(text)
    assert tmp_path / "ComfyUI/models" in model_folders() and not (tmp_path / "evil").exists()
    assert "ComfyUI/extra_model_paths.yaml" in caplog.text and len(caplog.text) < 900


def test_a_folder_that_went_away_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIGHTX2V_USER_DIR", str(tmp_path / "user"))
    (tmp_path / "disk").mkdir()
    tell_folder(tmp_path / "disk")
    shutil.rmtree(tmp_path / "disk")
    assert tmp_path / "disk" not in model_folders()
