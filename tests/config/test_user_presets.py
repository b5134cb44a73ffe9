"""Presets of one's own are found by name everywhere, and never replace another."""

from __future__ import annotations

from pathlib import Path

import pytest

from lightx2v.config.presets import list_user_presets, read_json, resolve, shipped_names
from lightx2v.config.user_presets import save_preset, user_preset
from lightx2v.errors import ConfigError, OutputError

CONTENT = {
    "preset": {"title": "Mine"},
    "task": "t2v",
    "infer_steps": 12,
    "high_noise_original_ckpt": "/m/high.safetensors",
}


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LIGHTX2V_USER_DIR", str(tmp_path / "user"))
    return tmp_path / "user" / "presets"


@pytest.mark.parametrize("name", ["mine", "wan2.2_t2v+4step", "我的预设", " padded "])
def test_a_saved_preset_is_found_by_its_name(name: str) -> None:
    path = save_preset(name, CONTENT, shipped_names())
    assert read_json(path) == CONTENT
    resolved = resolve(name.strip())
    assert (resolved.preset.name, resolved.preset.title, resolved.request["steps"]) == (name.strip(), "Mine", 12)
    assert [info.name for info in list_user_presets()] == [name.strip()]


def test_nothing_is_ever_overwritten(folder: Path) -> None:
    path = save_preset("mine", CONTENT, shipped_names())
    before = path.read_bytes()
    with pytest.raises(ConfigError, match="There is a preset 'mine' already"):
        save_preset("mine", {"task": "i2v"}, shipped_names())
    with pytest.raises(ConfigError, match="There is a preset 't2v_base' already"):
        save_preset("t2v_base", CONTENT, shipped_names())
    assert path.read_bytes() == before and [item.name for item in folder.iterdir()] == ["mine.json"]


@pytest.mark.parametrize(
    "name",
    ["", " ", "../evil", "a/b", "a\\b", ".hidden", "a b", "a\0b", "x" * 300, "球" * 100, "a\ud83d", "-flag", "con:"],
)
def test_a_name_that_is_no_file_name_is_refused(folder: Path, name: str) -> None:
    with pytest.raises(ConfigError, match="cannot be a preset's name"):
        save_preset(name, CONTENT, shipped_names())
    assert user_preset(name) is None and not folder.exists()


def test_a_shipped_preset_is_never_hidden(folder: Path) -> None:
    folder.mkdir(parents=True)
    (folder / "t2v_base.json").write_text('{"infer_steps": 1}')
    assert resolve("t2v_base").request["steps"] == 40
    assert list_user_presets() == []


def test_a_broken_preset_is_left_out_of_the_list(folder: Path) -> None:
    save_preset("good", CONTENT, shipped_names())
    (folder / "broken.json").write_text("{")
    assert [info.name for info in list_user_presets()] == ["good"]
    with pytest.raises(ConfigError, match="broken.json is not valid JSON"):
        resolve("broken")


def test_a_folder_that_cannot_be_written_is_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("LIGHTX2V_USER_DIR", str(tmp_path / "file"))
    with pytest.raises(OutputError, match="cannot be written"):
        save_preset("mine", CONTENT, shipped_names())
