"""A video is complete or not there at all, whatever the disk, the encoder or the user does."""

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
from functools import partial
from pathlib import Path

import pytest
from clips import assert_nothing_left, clip, write
from patience import PATIENCE

from lightx2v.errors import BadRequest, Cancelled, LightX2VError, OutputError
from lightx2v.media import video_writer
from lightx2v.media.mp4 import VideoInfo, probe, read_settings
from lightx2v.media.video_writer import VideoWriter, check_output_path, read_frame
from lightx2v.progress import CancelToken

ROOT = Path(__file__).parents[2]


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


NO_NAMES = ["A" * 5000, "x\ud800.mp4", "half\udc80/\ud800.mp4", "a\x1b[31m\n/b.mp4", "~nobody/a.mp4"]


@pytest.mark.parametrize("name", NO_NAMES)
def test_a_name_that_no_file_has_is_refused_in_short(name: str, tmp_path: Path) -> None:
    for act in (probe, read_settings, read_frame, check_output_path, partial(VideoWriter, width=48, height=32, fps=16)):
        with pytest.raises(LightX2VError) as caught:
            act(tmp_path / name)
        message = str(caught.value)
        assert len(message) < 250 and message.isprintable() and message.encode()
    assert_nothing_left(tmp_path)


def test_a_pipe_or_a_device_is_never_replaced(tmp_path: Path) -> None:
    """As root, `--save_result_path /dev/null --force` would put a video where the machine's /dev/null was."""
    pipe = tmp_path / "pipe.mp4"
    os.mkfifo(pipe)
    for name in (pipe, Path("/dev/null")):
        with pytest.raises(BadRequest, match="a device or a pipe"):
            check_output_path(name, force=True)


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


@pytest.mark.slow
def test_cancelling_ends_an_encoder_that_hangs(
    tmp_path: Path, fake_ffmpeg: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(video_writer, "STALL_SECONDS", 600)
    script(fake_ffmpeg, "time.sleep(600)")  # longer than a test may take
    token = CancelToken()
    timer = threading.Timer(0.3, token.cancel)
    started = time.monotonic()
    timer.start()
    with pytest.raises(Cancelled), VideoWriter(tmp_path / "out" / "a.mp4", 512, 512, 16, cancel=token) as writer:
        writer.write(clip(5, 512, 512))
    timer.join()
    assert time.monotonic() - started < 5
    assert_nothing_left(tmp_path / "out")


@pytest.mark.slow
def test_an_encoder_that_hangs_is_an_error(tmp_path: Path, fake_ffmpeg: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(video_writer, "STALL_SECONDS", 0.3)
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
    """The path of a program that replaces ffmpeg; outputs go to tmp_path/out."""
    (tmp_path / "out").mkdir()
    program = tmp_path / "ffmpeg"
    monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", str(program))
    return program


def script(program: Path, body: str) -> None:
    program.write_text(f"#!{sys.executable}\nimport sys, time, os\n{textwrap.dedent(body)}\n")
    program.chmod(0o755)


@pytest.mark.slow
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
def test_an_encoder_that_fails_is_an_error_with_its_output(
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


def test_a_missing_encoder_is_named_and_before_any_work(tmp_path: Path, fake_ffmpeg: Path) -> None:
    for begin in (lambda path: VideoWriter(path, 48, 32, 16), check_output_path):
        with pytest.raises(OutputError, match="no ffmpeg"):
            begin(tmp_path / "out" / "a.mp4")
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
    for begin in (lambda path: VideoWriter(path, 48, 32, 16), check_output_path):
        with pytest.raises(OutputError, match="GiB are free"):
            begin("/proc/a.mp4")


PRELUDE = "import sys, os, resource\nimport numpy as np\nfrom lightx2v.media.video_writer import VideoWriter\n"


def run_python(body: str, folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", PRELUDE + textwrap.dedent(body), str(folder)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.slow
def test_a_full_disk_is_an_error_and_leaves_nothing(tmp_path: Path) -> None:
    """A limit on file sizes replaces the full disk: ffmpeg sees the same error."""
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


@pytest.mark.slow
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
        assert process.wait(PATIENCE) == code  # left alone it would write for ever
    assert time.monotonic() - started < 5
    assert_nothing_left(tmp_path)


@pytest.mark.slow
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


@pytest.mark.slow
def test_many_writers_leak_neither_processes_nor_descriptors_nor_threads(tmp_path: Path) -> None:
    write(tmp_path / "warm.mp4", clip())
    files, threads = len(os.listdir("/proc/self/fd")), set(threading.enumerate())
    for number in range(4):
        write(tmp_path / f"{number}.mp4", clip(1, 16, 16))
        VideoWriter(tmp_path / "no.mp4", 16, 16, 16).abort()
    assert len(os.listdir("/proc/self/fd")) <= files and not set(threading.enumerate()) - threads
    assert len(list(tmp_path.iterdir())) == 5
