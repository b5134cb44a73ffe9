"""A video names its pictures so that they are found again, and without saying where its maker keeps them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from lightx2v.config.engine_config import EngineConfig
from lightx2v.config.recorded_settings import find_picture, recorded_settings
from lightx2v.config.request import Request

REQUEST = Request(task="i2v", prompt="it moves", image_path="cat.png")


@pytest.fixture(autouse=True)
def working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    here = tmp_path / "here"
    for folder in (here / "pictures", tmp_path / "outputs", tmp_path / "secret"):
        folder.mkdir(parents=True)
        (folder / "cat.png").write_bytes(folder.name.encode())
    (here / "link.png").symlink_to(tmp_path / "secret" / "cat.png")
    monkeypatch.chdir(here)
    monkeypatch.setenv("HOME", str(tmp_path / "nobody"))
    return here


@pytest.mark.parametrize(
    ("given", "named", "found"),
    [
        ("pictures/cat.png", "pictures/cat.png", "pictures/cat.png"),
        ("{}/here/pictures/cat.png", "pictures/cat.png", "pictures/cat.png"),
        ("{}/here/link.png", "link.png", "link.png"),
        ("{}/outputs/cat.png", "cat.png", "{}/outputs/cat.png"),
        ("{}/secret/cat.png", "cat.png", None),  # beside the video lies another picture of that name
        ("{}/secret/gone.png", "gone.png", None),
    ],
)
def test_a_picture_is_named_so_that_it_is_found_here(tmp_path: Path, given: str, named: str, found: str | None) -> None:
    request = replace(REQUEST, image_path=given.format(tmp_path))
    video = tmp_path / "outputs" / "a.mp4"
    settings = json.loads(json.dumps(recorded_settings("p", EngineConfig(task="i2v"), request, video)))
    assert settings["request"] == {**request.to_json(), "image_path": named}
    assert str(tmp_path) not in json.dumps(settings)
    wanted = None if found is None else Path(found.format(tmp_path))
    assert find_picture(settings, "image_path", video) == wanted


def test_a_video_from_before_names_a_whole_path(tmp_path: Path) -> None:
    settings = {"request": {"image_path": str(tmp_path / "secret" / "cat.png"), "last_frame_path": "a" * 300}}
    assert find_picture(settings, "image_path", "a.mp4") == tmp_path / "secret" / "cat.png"
    assert find_picture(settings, "last_frame_path", "a.mp4") is None
