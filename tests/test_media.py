"""mp4 out and back: exact, complete or not there at all."""

from __future__ import annotations

import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from lightx2v import media
from lightx2v.errors import BadRequest, Cancelled, LightX2VError, OutputError
from lightx2v.media import VideoInfo, VideoWriter, check_output_path, ffmpeg, probe, read_frame, read_settings
from lightx2v.progress import CancelToken

ROOT = Path(__file__).parents[1]


def clip(frames: int = 5, height: int = 32, width: int = 48) -> np.ndarray:
    """A moving gradient, uint8 (T, H, W, 3)."""
    t, y, x = np.mgrid[:frames, :height, :width]
    return np.stack([x * 255 // width, y * 255 // height, (t * 40) % 256], -1).astype(np.uint8)


def write(path: Path, frames: np.ndarray, fps: float = 16, **options: object) -> Path:
    with VideoWriter(path, frames.shape[2], frames.shape[1], fps, **options) as writer:  # type: ignore[arg-type]
        writer.write(frames[:1])
        for at in range(1, len(frames), 4):
            writer.write(frames[at : at + 4])
    return path


def assert_nothing_left(folder: Path) -> None:
    assert list(folder.iterdir()) == []


# ---- what is written ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fps", [16, 12.5, 24, 23.976, 1, 120])
@pytest.mark.parametrize(("frames", "height", "width"), [(1, 16, 16), (5, 32, 48), (17, 96, 80)])
def test_size_length_and_rate_are_as_asked(frames: int, height: int, width: int, fps: float, tmp_path: Path) -> None:
    info = probe(write(tmp_path / "a.mp4", clip(frames, height, width), fps))
    assert (info.width, info.height, info.frames) == (width, height, frames)
    assert info.fps == pytest.approx(fps, rel=1e-3)


def test_our_reading_of_the_boxes_agrees_with_ffmpeg(tmp_path: Path) -> None:
    import imageio_ffmpeg

    file = write(tmp_path / "a.mp4", clip(9))
    done = subprocess.run([ffmpeg(), "-hide_banner", "-i", str(file)], capture_output=True, text=True, check=False)
    assert "Video: h264" in done.stderr and "48x32" in done.stderr and " 16 fps" in done.stderr
    assert imageio_ffmpeg.count_frames_and_secs(str(file))[0] == 9


def test_a_grey_ramp_survives_within_3_levels(tmp_path: Path) -> None:
    ramp = np.broadcast_to(np.arange(256, dtype=np.uint8)[None, None, :, None], (9, 64, 256, 3))
    file = write(tmp_path / "ramp.mp4", ramp)
    for index in (0, 4, -1):
        back = np.asarray(read_frame(file, index)).astype(int)
        assert np.abs(back - ramp[0]).max() <= 3
        assert abs((back - ramp[0]).mean()) < 0.5


def test_flat_colours_survive(tmp_path: Path) -> None:
    colours = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0), (250, 160, 120), (18, 33, 70)]
    frames = np.array([np.full((32, 32, 3), colour) for colour in colours], dtype=np.uint8)
    file = write(tmp_path / "colours.mp4", frames)
    for index, colour in enumerate(colours):
        assert np.abs(np.asarray(read_frame(file, index)).astype(int) - colour).mean() <= 3


def test_colours_are_tagged_and_the_index_comes_first(tmp_path: Path) -> None:
    file = write(tmp_path / "a.mp4", clip())
    data = file.read_bytes()
    assert data.index(b"moov") < data.index(b"mdat")
    done = subprocess.run([ffmpeg(), "-hide_banner", "-i", str(file)], capture_output=True, text=True, check=False)
    assert "yuv420p(tv, bt709" in done.stderr


def test_the_same_frames_give_the_same_file(tmp_path: Path) -> None:
    files = [write(tmp_path / f"{name}.mp4", clip(), settings={"seed": 1}) for name in "ab"]
    assert files[0].read_bytes() == files[1].read_bytes()


@pytest.mark.parametrize(
    "name",
    [
        "-vf.mp4",
        "a%03d.mp4",
        "concat:x.mp4",
        "pipe:1",
        "CON",
        "dot.",
        "no suffix",
        "file.mkv",
        "a\r\nb.mp4",
        "红.mp4",
        "'\";$(x).mp4",
    ],
)
def test_strange_names_are_only_names(name: str, tmp_path: Path) -> None:
    folder = tmp_path / "a%d:b"
    folder.mkdir()
    write(folder / name, clip())
    assert [file.name for file in folder.iterdir()] == [name]
    assert probe(folder / name).frames == 5
    assert read_frame(folder / name).size == (48, 32)


def test_a_relative_name_is_kept_when_the_process_changes_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "elsewhere").mkdir()
    with VideoWriter("a.mp4", 48, 32, 16) as writer:
        monkeypatch.chdir(tmp_path / "elsewhere")
        writer.write(clip())
    assert (tmp_path / "a.mp4").is_file()


def test_close_and_abort_work_without_a_with_block(tmp_path: Path) -> None:
    writer = VideoWriter(tmp_path / "a.mp4", 48, 32, 16)
    writer.write(clip())
    writer.close()
    writer.abort()
    assert probe(tmp_path / "a.mp4").frames == 5
    other = VideoWriter(tmp_path / "b.mp4", 48, 32, 16)
    other.abort()
    other.abort()
    assert [file.name for file in tmp_path.iterdir()] == ["a.mp4"]
    with pytest.raises(ValueError, match="closed"):
        other.write(clip())
    with pytest.raises(ValueError, match="closed"):
        writer.close()


def test_frames_of_another_shape_or_type_are_refused(tmp_path: Path) -> None:
    with VideoWriter(tmp_path / "a.mp4", 48, 32, 16) as writer:
        for wrong in (clip().astype(np.float32), clip(5, 48, 32), clip()[0], clip()[..., :1]):
            with pytest.raises(ValueError, match="expected uint8"):
                writer.write(wrong)
        writer.write(clip()[:, ::1, ::-1][:, :, ::-1])
        writer.write(np.asfortranarray(clip()))
    assert probe(tmp_path / "a.mp4").frames == 10
    with pytest.raises(ValueError, match="even"):
        VideoWriter(tmp_path / "b.mp4", 47, 32, 16)


# ---- settings inside ----------------------------------------------------------------------------------------------


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
        command = Path(f"/proc/{writer._process.pid}/cmdline").read_bytes()
        assert b"rawvideo" in command and b"secret" not in command


@settings(max_examples=15, deadline=None)
@given(text=st.text(st.characters(codec=None), max_size=300), long=st.booleans())
def test_any_text_survives_in_the_settings(text: str, long: bool, tmp_path_factory: pytest.TempPathFactory) -> None:
    given_ = {"prompt": text * (1 + 99 * long)}
    assert read_settings(write(tmp_path_factory.mktemp("s") / "a.mp4", clip(1, 16, 16), settings=given_)) == given_


def test_settings_that_are_not_json_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON"):
        VideoWriter(tmp_path / "a.mp4", 48, 32, 16, settings={"guidance": float("nan")})
    assert_nothing_left(tmp_path)


@pytest.mark.parametrize("data", [b"", b"\0" * 64, b"GIF89a....", b"\0\0\0\x08moov", b"\0\0\0\1moov" + b"\xff" * 8])
def test_what_is_no_mp4_is_refused(data: bytes, tmp_path: Path) -> None:
    file = tmp_path / "a.mp4"
    file.write_bytes(data)
    for read in (read_settings, probe):
        with pytest.raises(BadRequest):
            read(file)
    for missing in (tmp_path / "none.mp4", tmp_path, "/dev/zero", "a\0b"):
        with pytest.raises(BadRequest):
            read_settings(missing)


def test_foreign_comments_are_not_taken_for_settings(tmp_path: Path) -> None:
    file = write(tmp_path / "a.mp4", clip())
    for number, comment in enumerate(
        ["hello", "{}", '{"lightx2v": 3}', "[" * 100_000, '{"lightx2v": ' + "9" * 5000 + "}"]
    ):
        copy = tmp_path / f"{number}.mp4"
        with VideoWriter(copy, 48, 32, 16, settings={}) as writer:
            assert writer._folder is not None
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


@settings(max_examples=200, deadline=None)
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


# ---- frames back --------------------------------------------------------------------------------------------------


def test_the_last_frame_is_the_last_one(tmp_path: Path) -> None:
    frames = clip(9)
    file = write(tmp_path / "a.mp4", frames)
    for index in (0, 3, 8, -1, -9):
        error = np.abs(np.asarray(read_frame(file, index)).astype(int) - frames[index]).mean()
        assert error < 6, index
    assert isinstance(read_frame(file), Image.Image)
    for index in (9, -10):
        with pytest.raises(BadRequest, match="9 frames"):
            read_frame(file, index)


# ---- refusals and failures ----------------------------------------------------------------------------------------


def test_an_existing_file_is_only_replaced_by_force(tmp_path: Path) -> None:
    file = write(tmp_path / "a.mp4", clip())
    before = file.read_bytes()
    with pytest.raises(BadRequest, match="exists already"):
        VideoWriter(file, 48, 32, 16)
    assert file.read_bytes() == before
    write(file, clip(9), force=True)
    assert probe(file).frames == 9


def test_a_file_that_appears_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    with pytest.raises(BadRequest, match="exists already"), VideoWriter(tmp_path / "a.mp4", 48, 32, 16) as writer:
        writer.write(clip())
        (tmp_path / "a.mp4").write_text("precious")
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [("a.mp4", "precious")]


def test_impossible_names_are_refused_before_any_work(tmp_path: Path) -> None:
    for name in ("", "a\0b.mp4", str(tmp_path / ("x" * 300)), str(tmp_path), "红" * 86):
        with pytest.raises(BadRequest):
            check_output_path(name)
    with pytest.raises(OutputError, match="no folder"):
        check_output_path(tmp_path / "none" / "a.mp4")
    with pytest.raises(OutputError):
        check_output_path(tmp_path / "/".join(["x" * 250] * 20) / "a.mp4")


def test_a_failed_run_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), VideoWriter(tmp_path / "a.mp4", 48, 32, 16) as writer:
        writer.write(clip())
        raise ZeroDivisionError
    assert_nothing_left(tmp_path)


def test_a_failed_run_keeps_the_file_that_it_was_to_replace(tmp_path: Path) -> None:
    file = write(tmp_path / "a.mp4", clip())
    with pytest.raises(ZeroDivisionError), VideoWriter(file, 48, 32, 16, force=True) as writer:
        writer.write(clip(1))
        raise ZeroDivisionError
    assert probe(file).frames == 5


def test_a_video_without_frames_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="no frames|ended with code"), VideoWriter(tmp_path / "a.mp4", 48, 32, 16):
        pass
    assert_nothing_left(tmp_path)


def test_cancelling_leaves_nothing(tmp_path: Path) -> None:
    token = CancelToken()
    with pytest.raises(Cancelled), VideoWriter(tmp_path / "a.mp4", 48, 32, 16, cancel=token) as writer:
        writer.write(clip())
        token.cancel()
        writer.write(clip())
    with pytest.raises(Cancelled), VideoWriter(tmp_path / "a.mp4", 48, 32, 16, cancel=CancelToken()) as writer:
        writer.write(clip())
        writer._cancel.cancel()
    assert_nothing_left(tmp_path)


def test_cancelling_ends_an_encoder_that_hangs(tmp_path: Path, fake_ffmpeg: Path) -> None:
    script(fake_ffmpeg, "time.sleep(60)")
    token = CancelToken()
    timer = threading.Timer(0.3, token.cancel)
    started = time.monotonic()
    timer.start()
    with pytest.raises(Cancelled), VideoWriter(tmp_path / "out" / "a.mp4", 512, 512, 16, cancel=token) as writer:
        writer.write(clip(5, 512, 512))
    timer.join()
    assert time.monotonic() - started < 5
    assert_nothing_left(tmp_path / "out")


def test_an_encoder_that_hangs_is_given_up(tmp_path: Path, fake_ffmpeg: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(media, "STALL_SECONDS", 0.3)
    script(fake_ffmpeg, "time.sleep(60)")
    with (
        pytest.raises(OutputError, match="taken no data"),
        VideoWriter(tmp_path / "out" / "a.mp4", 512, 512, 16) as writer,
    ):
        writer.write(clip(5, 512, 512))
    with (
        pytest.raises(OutputError, match="did not finish"),
        VideoWriter(tmp_path / "out" / "a.mp4", 16, 16, 16) as writer,
    ):
        writer.write(clip(1, 16, 16))
    assert_nothing_left(tmp_path / "out")


@pytest.fixture
def fake_ffmpeg(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The path of a program that is taken for ffmpeg; outputs go to tmp_path/out."""
    (tmp_path / "out").mkdir()
    program = tmp_path / "ffmpeg"
    monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", str(program))
    return program


def script(program: Path, body: str) -> None:
    program.write_text(f"#!{sys.executable}\nimport sys, time, os\n{textwrap.dedent(body)}\n")
    program.chmod(0o755)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("sys.stdin.buffer.read(); sys.exit(0)", "no readable video"),
        ("sys.stdin.buffer.read(); open('video.mp4', 'wb').close()", "no readable video"),
        ("sys.stdin.buffer.read(); open('video.mp4', 'wb').write(b'junk' * 99)", "no readable video"),
        ("sys.stdin.buffer.read(); print('x264: out of luck', file=sys.stderr); sys.exit(3)", "code 3 .*out of luck"),
        ("sys.exit(4)", "code 4"),
        ("os.kill(os.getpid(), 11)", "SIGSEGV"),
        ("sys.stdin.buffer.read(); print('e' * 10**7, file=sys.stderr); sys.exit(5)", "code 5"),
    ],
)
def test_an_encoder_that_fails_is_an_error_with_its_last_words(
    body: str, message: str, tmp_path: Path, fake_ffmpeg: Path
) -> None:
    script(fake_ffmpeg, body)
    with (
        pytest.raises(OutputError, match=message) as caught,
        VideoWriter(tmp_path / "out" / "a.mp4", 256, 256, 16) as writer,
    ):
        for _ in range(4):
            writer.write(clip(9, 256, 256))
    assert "GiB are free" in str(caught.value) and str(tmp_path) not in str(caught.value)
    assert_nothing_left(tmp_path / "out")


def test_frames_that_the_encoder_lost_are_noticed(tmp_path: Path, fake_ffmpeg: Path) -> None:
    real = _bundled()
    script(
        fake_ffmpeg,
        f"""
        import subprocess
        if "rawvideo" not in sys.argv:
            sys.exit(subprocess.call([{real!r}, *sys.argv[1:]]))
        data = sys.stdin.buffer.read()
        sys.exit(subprocess.run([{real!r}, *sys.argv[1:]], input=data[: 3 * 48 * 32 * 3]).returncode)
        """,
    )
    with pytest.raises(OutputError, match="3 frames .*expected .* 5 frames"):
        write(tmp_path / "out" / "a.mp4", clip())
    assert_nothing_left(tmp_path / "out")


def _bundled() -> str:
    import imageio_ffmpeg

    folder = Path(imageio_ffmpeg.__file__).parent / "binaries"
    return str(next(file for file in folder.iterdir() if file.name.startswith("ffmpeg")))


def test_a_missing_encoder_is_named(tmp_path: Path, fake_ffmpeg: Path) -> None:
    with pytest.raises(OutputError, match="no ffmpeg"):
        VideoWriter(tmp_path / "out" / "a.mp4", 48, 32, 16)
    fake_ffmpeg.write_text("not a program")
    fake_ffmpeg.chmod(0o755)
    with pytest.raises(OutputError):
        VideoWriter(tmp_path / "out" / "a.mp4", 48, 32, 16)
    assert_nothing_left(tmp_path / "out")


def test_a_folder_that_vanishes_is_an_error(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    folder.mkdir()
    with pytest.raises(OutputError, match="GiB are free"), VideoWriter(folder / "a.mp4", 48, 32, 16) as writer:
        writer.write(clip())
        shutil.rmtree(folder)
    assert_nothing_left(tmp_path)


def test_a_folder_that_cannot_be_written_is_an_error() -> None:
    with pytest.raises(OutputError, match="GiB are free"):
        VideoWriter("/proc/a.mp4", 48, 32, 16)


PRELUDE = "import sys, os, resource\nimport numpy as np\nfrom lightx2v.media import VideoWriter\n"


def run_python(body: str, folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", PRELUDE + textwrap.dedent(body), str(folder)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)


def test_a_full_disk_is_an_error_and_leaves_nothing(tmp_path: Path) -> None:
    """A limit on file sizes is a full disk for ffmpeg."""
    done = run_python(
        """
        from lightx2v.errors import OutputError
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
        frames = np.random.default_rng(0).integers(0, 255, (60, 128, 128, 3), dtype=np.uint8)
        try:
            with VideoWriter(sys.argv[1] + "/a.mp4", 128, 128, 16) as writer:
                writer.write(frames)
        except OutputError as error:
            print(error)
        """,
        tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert "GiB are free" in done.stdout and "ffmpeg" in done.stdout
    assert_nothing_left(tmp_path)


def test_a_read_only_folder_is_an_error() -> None:
    with tempfile.TemporaryDirectory() as name:  # not below tmp_path, which only its owner may enter
        folder = Path(name)
        folder.chmod(0o555)
        body = """
            from lightx2v.errors import OutputError
            os.geteuid() == 0 and os.setuid(65534)  # root may write everywhere
            try:
                VideoWriter(sys.argv[1] + "/a.mp4", 128, 128, 16)
            except OutputError as error:
                print(error)
            """
        done = run_python(body, folder)
        assert "Permission denied" in done.stdout and "GiB are free" in done.stdout, done.stderr
        assert_nothing_left(folder)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_while_writing_leaves_nothing(number: signal.Signals, code: int, tmp_path: Path) -> None:
    body = f"""
        import signal, time
        def stop(number, frame):
            raise SystemExit(128 + number)
        signal.signal({int(number)}, stop)
        with VideoWriter(sys.argv[1] + "/a.mp4", 128, 128, 16) as writer:
            print("ready", flush=True)
            while True:
                writer.write(np.zeros((4, 128, 128, 3), np.uint8))
        """
    command = [sys.executable, "-c", PRELUDE + textwrap.dedent(body), str(tmp_path)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE)
    assert process.stdout is not None
    with process.stdout:
        process.stdout.readline()
        time.sleep(0.2)
        started = time.monotonic()
        process.send_signal(number)
        assert process.wait(timeout=10) == code
    assert time.monotonic() - started < 5
    assert_nothing_left(tmp_path)


def test_memory_stays_bounded_while_a_long_video_streams(tmp_path: Path) -> None:
    frames = clip(4, 256, 256)
    with VideoWriter(tmp_path / "a.mp4", 256, 256, 16) as writer:
        for _ in range(10):
            writer.write(frames)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        for _ in range(100):
            writer.write(frames)
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 20_000
    assert probe(tmp_path / "a.mp4") == VideoInfo(width=256, height=256, frames=440, fps=16.0)


def test_many_writers_leak_neither_processes_nor_descriptors_nor_threads(tmp_path: Path) -> None:
    write(tmp_path / "warm.mp4", clip())
    files, threads = len(os.listdir("/proc/self/fd")), threading.active_count()
    for number in range(4):
        write(tmp_path / f"{number}.mp4", clip(1, 16, 16))
        VideoWriter(tmp_path / "no.mp4", 16, 16, 16).abort()
    assert len(os.listdir("/proc/self/fd")) == files and threading.active_count() == threads
    assert len(list(tmp_path.iterdir())) == 5
