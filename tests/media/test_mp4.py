"""Reading mp4 files: the settings inside, and files that are damaged or not mp4."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from clips import assert_nothing_left, clip, write
from hypothesis import given, settings
from hypothesis import strategies as st
from patience import eventually

from lightx2v.errors import BadRequest, LightX2VError
from lightx2v.media.mp4 import probe, read_settings
from lightx2v.media.video_writer import VideoWriter, ffmpeg


def test_settings_come_back_exactly(tmp_path: Path) -> None:
    given_ = {
        "request": {"prompt": '红 🎈 =;#\\ "quoted"\nline\0end', "seed": 2**63 - 1, "fps": 16.0, "n": None},
        "a": [1, 2.5],
    }
    assert read_settings(write(tmp_path / "a.mp4", clip(), settings=given_)) == given_


def test_settings_survive_a_lossless_copy(tmp_path: Path) -> None:
    file = write(tmp_path / "a.mp4", clip(), settings={"seed": 7})
    copy = tmp_path / "copy.mp4"
    subprocess.run([ffmpeg(), "-v", "error", "-i", str(file), "-c", "copy", str(copy)], check=True)
    assert read_settings(copy) == {"seed": 7}


def test_without_settings_nothing_about_the_run_is_in_the_file(tmp_path: Path) -> None:
    file = write(tmp_path / "a.mp4", clip())
    assert b"lightx2v" not in file.read_bytes()
    with pytest.raises(BadRequest, match="no settings"):
        read_settings(file)


def test_the_prompt_is_not_in_the_list_of_processes(tmp_path: Path) -> None:
    with VideoWriter(tmp_path / "a.mp4", 48, 32, 16, settings={"prompt": "secret words"}) as writer:
        writer.write(clip())
        assert writer._process is not None
        arguments = Path(f"/proc/{writer._process.pid}/cmdline")
        eventually(lambda: bool(arguments.read_bytes()))  # empty while the kernel starts the program
        assert b"rawvideo" in arguments.read_bytes() and b"secret" not in arguments.read_bytes()


@pytest.mark.slow
@settings(max_examples=15)
@given(text=st.text(st.characters(codec=None), max_size=300), long=st.booleans())
def test_any_text_survives_in_the_settings(text: str, long: bool, tmp_path_factory: pytest.TempPathFactory) -> None:
    given_ = {"prompt": text * (1 + 99 * long)}
    assert read_settings(write(tmp_path_factory.mktemp("s") / "a.mp4", clip(1, 16, 16), settings=given_)) == given_


def test_settings_that_are_not_json_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON"):
        VideoWriter(tmp_path / "a.mp4", 48, 32, 16, settings={"guidance": float("nan")})
    assert_nothing_left(tmp_path)


@pytest.mark.parametrize("data", [b"", b"\0" * 64, b"GIF89a....", b"\0\0\0\x08moov", b"\0\0\0\1moov" + b"\xff" * 8])
def test_a_file_that_is_not_an_mp4_is_refused(data: bytes, tmp_path: Path) -> None:
    file = tmp_path / "a.mp4"
    file.write_bytes(data)
    for read in (read_settings, probe):
        with pytest.raises(BadRequest):
            read(file)
    for missing in (tmp_path / "none.mp4", tmp_path, "/dev/zero", "a\0b"):
        with pytest.raises(BadRequest):
            read_settings(missing)


@pytest.mark.slow
def test_foreign_comments_are_not_taken_for_settings(tmp_path: Path) -> None:
    file = write(tmp_path / "a.mp4", clip())
    for number, comment in enumerate(
        ["hello", "{}", '{"lightx2v": 3}', "[" * 100_000, '{"lightx2v": ' + "9" * 5000 + "}"]
    ):
        copy = tmp_path / f"{number}.mp4"
        with VideoWriter(copy, 48, 32, 16, settings={}) as writer:
            assert writer._work is not None
            writer.write(clip())
        command = [
            ffmpeg(),
            "-v",
            "error",
            "-y",
            "-i",
            str(file),
            "-c",
            "copy",
            "-metadata",
            f"comment={comment}",
            str(copy),
        ]
        subprocess.run(command, check=True)
        with pytest.raises(BadRequest, match=r"settings"):
            read_settings(copy)


@pytest.mark.slow
@settings(max_examples=200)
@given(data=st.data())
def test_damaged_files_only_ever_give_our_errors(
    data: st.DataObject, sample: bytes, tmp_path_factory: pytest.TempPathFactory
) -> None:
    raw = bytearray(sample)
    moov = raw.index(b"moov")
    for _ in range(data.draw(st.integers(1, 6))):
        raw[data.draw(st.integers(max(0, moov - 40), len(raw) - 1))] = data.draw(st.integers(0, 255))
    file = tmp_path_factory.getbasetemp() / "damaged.mp4"
    file.write_bytes(raw[: data.draw(st.integers(0, len(raw)))] if data.draw(st.booleans()) else raw)
    for read in (read_settings, probe):
        try:
            read(file)
        except LightX2VError as error:
            assert isinstance(error, BadRequest)


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return write(tmp_path_factory.mktemp("sample") / "a.mp4", clip(1, 16, 16), settings={"seed": 7}).read_bytes()
