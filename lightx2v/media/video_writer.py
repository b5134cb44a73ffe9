"""Write frames as an mp4 through ffmpeg: streamed, verified, renamed into place, with the run's settings inside.

    with VideoWriter("video.mp4", width, height, fps, settings={...}) as writer:
        for frames in vae.decode(latents):
            writer.write(frames)            # uint8 (T, H, W, 3); ffmpeg encodes while the next ones are decoded

The file appears under its name only after the block has ended without an error and the video reads back with the right
size, rate and number of frames. ffmpeg works in its own folder beside the target, under names that we choose. So a
target called `-vf.mp4` or `a%03d.mp4` means nothing to ffmpeg, and a failed run leaves one folder to remove.

ffmpeg only opens files that we wrote. mp4.py reads uploads.
"""

import contextlib
import json
import math
import os
import select
import shutil
import signal
import subprocess
import threading
import time
from collections import deque
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

import numpy as np
from PIL import Image

from ..errors import BadRequest, OutputError, short_path
from ..progress import CancelToken
from .mp4 import SETTINGS_KEY, VideoInfo, probe
from .work_folder import WorkFolder, sweep

STALL_SECONDS = 120.0
"""ffmpeg takes a frame in milliseconds. If it takes none for this long, it hangs."""

# At CRF 18 the eye cannot tell the video from the frames (LightX2V uses 23, where flat gradients band). Four threads as
# in LightX2V: x264's output depends on their number, and the same frames should give the same file on every machine.
# The colours are converted to BT.709 and tagged so: players guess 601 or 709 for untagged video from its size.
# `setparams` tags the frames. All versions of ffmpeg take the tags of the stream and of the `colr` atom from the
# frames; new ones ignore the output options -color_primaries and -color_trc.
FILTERS = (
    "scale=in_range=pc:out_range=tv:out_color_matrix=bt709:flags=accurate_rnd+full_chroma_int+bicubic",
    "setparams=range=tv:color_primaries=bt709:color_trc=bt709:colorspace=bt709",
)
ENCODER = (
    *("-vf", ",".join(FILTERS)),
    *("-c:v", "libx264", "-preset", "medium", "-crf", "18", "-pix_fmt", "yuv420p", "-threads", "4"),
    *("-movflags", "+faststart", "-f", "mp4"),
)


def check_output_path(path: str | Path, *, force: bool = False) -> Path:
    """The absolute path for a new video. Raises before any work is done where the video could not be written.

    This includes a folder that is not writable and a missing ffmpeg. Removes what killed writers left there.
    """
    target = _free_name(path, force=force)
    ffmpeg()
    try:
        sweep(target.parent)
        WorkFolder(target.parent).close()
    except OSError as error:
        raise _not_written(target, error.strerror or str(error)) from None
    return target


def original_path(video: str | Path) -> Path:
    """Where a video without interpolation is kept: `name.original.mp4` beside `name.mp4`."""
    return Path(video).with_suffix(".original.mp4")


def _free_name(path: str | Path, *, force: bool) -> Path:
    name = os.fspath(path)
    if not name or "\0" in name:
        raise BadRequest("The output's file name is empty or has a NUL character. Give a name such as video.mp4.")
    target = Path(name).absolute()
    try:
        length = len(os.fsencode(target.name))
        os.fsencode(target)
    except UnicodeEncodeError:  # half a surrogate pair
        raise BadRequest(f"The output {short_path(target)} is no possible file name. Choose another one.") from None
    if length > 255:
        raise BadRequest(f"The output's name is {length} bytes long; at most 255 are allowed. Choose a shorter one.")
    try:
        if target.is_dir():
            raise BadRequest(f"The output {short_path(target)} is a folder; give a file name such as video.mp4.")
        if target.exists() and not target.is_file():  # --force as root would replace /dev/null by a video
            raise BadRequest(
                f"The output {short_path(target)} is a device or a pipe; give a file name such as video.mp4."
            )
        if target.exists() and not force:
            raise BadRequest(f"{short_path(target)} exists already. Choose another name, or force overwriting.")
        if not target.parent.is_dir():
            raise OutputError(f"There is no folder {short_path(target.parent)} to write the video to. Create it first.")
    except OSError as error:
        raise OutputError(f"{short_path(target)} cannot be written: {error.strerror}.") from None
    return target


class VideoWriter:
    """Writes uint8 frames as an H.264 mp4: any number of calls of `write`, then `close`, which makes the file appear.

    `abort` instead of `close` leaves no file. As a context manager, the writer calls the right one of the two. A set
    `cancel` ends a `write` or `close` within a tenth of a second. Memory is bounded: `write` returns when ffmpeg has
    taken the frames. `settings` is a dict for JSON; None writes no metadata.
    """

    def __init__(
        self,
        path: str | Path,
        width: int,
        height: int,
        fps: float,
        settings: dict[str, Any] | None = None,
        *,
        force: bool = False,
        cancel: CancelToken | None = None,
    ) -> None:
        if width % 2 or height % 2 or width <= 0 or height <= 0:
            raise ValueError(f"yuv420p needs even sizes, got {width}x{height}")
        self.path = _free_name(path, force=force)
        self.frames = 0
        self._width, self._height = width, height
        self._fps = Fraction(fps).limit_denominator(1001)
        self._settings = settings
        self._force = force
        self._cancel = cancel or CancelToken()
        self._stderr: deque[str] = deque(maxlen=20)
        self._drain: threading.Thread | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._work: WorkFolder | None = None
        try:
            self._work = WorkFolder(self.path.parent)
            self._process = self._start(self._work.path)
        except OSError as error:
            self.abort()
            raise self._failed(error.strerror or str(error)) from None
        except BaseException:
            self.abort()
            raise
        self._drain = threading.Thread(target=self._read_stderr, daemon=True, name="ffmpeg-stderr")
        self._drain.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if kind is None:
            self.close()
        else:
            self.abort()

    def write(self, frames: np.ndarray) -> None:
        """Encode uint8 (T, H, W, 3) frames."""
        if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[1:] != (self._height, self._width, 3):
            raise ValueError(f"expected uint8 (T, {self._height}, {self._width}, 3), got {frames.dtype} {frames.shape}")
        self._feed(np.ascontiguousarray(frames).data.cast("B"))
        self.frames += len(frames)

    def close(self) -> None:
        """Finish the video, read it back and give it its name. Any error leaves no file."""
        try:
            self._finish()
        finally:
            self.abort()

    def abort(self) -> None:
        """End ffmpeg and remove its folder; a finished video is no longer in it. May be called again."""
        if self._process is not None:
            if self._process.poll() is None:
                self._process.kill()
            self._process.wait()
            if self._drain is not None:
                self._drain.join(timeout=1)
            for pipe in (self._process.stdin, self._process.stderr):
                if pipe is not None:
                    with contextlib.suppress(OSError):
                        pipe.close()
            self._process = None
        if self._work is not None:
            self._work.close()
            self._work = None

    def _start(self, folder: Path) -> subprocess.Popen[bytes]:
        command = [ffmpeg(), "-hide_banner", "-loglevel", "error", "-nostats", "-y"]
        command += ["-f", "rawvideo", "-pix_fmt", "rgb24", "-video_size", f"{self._width}x{self._height}"]
        command += ["-framerate", str(self._fps), "-i", "pipe:0"]
        if self._settings is not None:  # a file and not an argument: `ps` shows arguments, and prompts are private
            (folder / "settings.txt").write_bytes(_ffmetadata(self._settings))
            command += ["-f", "ffmetadata", "-i", "settings.txt", "-map_metadata", "1"]
        command += ["-map", "0:v", *ENCODER, "video.mp4"]
        process = subprocess.Popen(
            command,
            cwd=folder,
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            start_new_session=True,  # on Ctrl-C, ffmpeg would end the file early and report success
        )
        os.set_blocking(_pipe(process.stdin).fileno(), False)
        return process

    def _feed(self, data: memoryview) -> None:
        """Write all of `data`. Ten times a second, check for a cancel and for an ffmpeg that hangs."""
        if self._process is None:
            raise ValueError("the writer is closed")
        pipe = _pipe(self._process.stdin).fileno()
        ready = select.poll()
        ready.register(pipe, select.POLLOUT)
        deadline = time.monotonic() + STALL_SECONDS
        while data:
            self._cancel.check()
            if not ready.poll(100):
                if time.monotonic() > deadline:
                    raise self._failed(f"ffmpeg has taken no data for {STALL_SECONDS:.0f} seconds")
                continue
            try:
                data = data[os.write(pipe, data) :]
            except BrokenPipeError:
                raise self._failed(self._why_ended()) from None
            except BlockingIOError:
                continue
            deadline = time.monotonic() + STALL_SECONDS

    def _finish(self) -> None:
        process, work = self._process, self._work
        if process is None or work is None:
            raise ValueError("the writer is closed")
        _pipe(process.stdin).close()
        deadline = time.monotonic() + STALL_SECONDS
        while process.poll() is None:
            self._cancel.check()
            if time.monotonic() > deadline:
                raise self._failed(f"ffmpeg did not finish within {STALL_SECONDS:.0f} seconds")
            time.sleep(0.005)
        if process.returncode:
            raise self._failed(self._why_ended())
        self._verify(work.path / "video.mp4")
        self._cancel.check()
        _free_name(self.path, force=self._force)
        try:
            os.replace(work.path / "video.mp4", self.path)
        except OSError as error:
            raise self._failed(error.strerror or str(error)) from None

    def _verify(self, file: Path) -> None:
        """Read the video back: the numbers in its boxes, and the number of frames that decode."""
        import imageio_ffmpeg

        if not self.frames:
            raise self._failed("no frames were written")
        try:
            info = probe(file)
            decoded, _ = imageio_ffmpeg.count_frames_and_secs(str(file))
        except (BadRequest, RuntimeError, OSError, ValueError):
            raise self._failed("ffmpeg left no readable video") from None
        wanted = VideoInfo(width=self._width, height=self._height, frames=self.frames, fps=float(self._fps))
        same_rate = math.isclose(info.fps, wanted.fps, rel_tol=1e-3)
        if (info.width, info.height, info.frames) != (wanted.width, wanted.height, wanted.frames) or not same_rate:
            raise self._failed(f"the video reads back as {info}, expected {wanted}")
        if decoded != self.frames:
            raise self._failed(f"{decoded} of {self.frames} frames can be read back")

    def _read_stderr(self) -> None:
        """Keep the last lines. Without a reader, ffmpeg would block at a full pipe."""
        if self._process is not None:
            for line in _pipe(self._process.stderr):
                self._stderr.append(line[:500].decode(errors="replace").strip())

    def _why_ended(self) -> str:
        """Why ffmpeg ended, with the last lines of its output."""
        if self._process is None:
            return "ffmpeg is not running"
        try:
            code = self._process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            return "ffmpeg closed its input"
        if self._drain is not None:
            self._drain.join(timeout=1)
        how = f"was stopped by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
        folder = str(self._work and self._work.path)
        output = "; ".join(line.replace(folder, "…") for line in list(self._stderr)[-3:] if line)
        return f"ffmpeg {how}" + (f" ({output})" if output else "")

    def _failed(self, reason: str) -> OutputError:
        return _not_written(self.path, reason)


def read_frame(path: str | Path, index: int = -1) -> Image.Image:
    """One frame of a video that we wrote, as RGB. By default the last one, to continue it with image-to-video."""
    info = probe(path)
    index = index + info.frames if index < 0 else index
    if not 0 <= index < info.frames:
        raise BadRequest(f"{short_path(path)} has frames 0 to {info.frames - 1}; there is no frame {index}.")
    return read_frames(path, [index], info.width, info.height)[0]


def read_frames(path: str | Path, indices: Sequence[int], width: int, height: int) -> list[Image.Image]:
    """The frames with these numbers, which increase, of a video that we wrote: as RGB, scaled to width x height."""
    exact = "flags=bicubic+accurate_rnd+full_chroma_int+full_chroma_inp"  # without all four, greys become 2 darker
    wanted = "+".join(f"eq(n\\,{index})" for index in indices)
    # New timestamps without gaps: ffmpeg would repeat frames to fill those between the ones that are left.
    filters = f"select={wanted},setpts=N/FRAME_RATE/TB,scale={width}:{height}:in_range=tv:out_range=pc"
    command = [ffmpeg(), "-hide_banner", "-v", "error", "-nostdin", "-protocol_whitelist", "file,pipe", "-f", "mov"]
    command += ["-i", f"file:{Path(path).absolute()}", "-map", "0:v:0"]
    command += ["-vf", f"{filters}:in_color_matrix=bt709:{exact}", "-frames:v", str(len(indices))]
    command += ["-f", "rawvideo", "-pix_fmt", "rgb24", "pipe:1"]
    try:
        done = subprocess.run(command, capture_output=True, timeout=STALL_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired):
        done = None
    size = width * height * 3
    if done is None or done.returncode or len(done.stdout) != len(indices) * size:
        which = f"Frame {indices[0]}" if len(indices) == 1 else f"{len(indices)} frames"
        raise OutputError(f"{which} of {short_path(path)} could not be read back.")
    parts = (done.stdout[start : start + size] for start in range(0, len(done.stdout), size))
    return [Image.frombytes("RGB", (width, height), part) for part in parts]


def ffmpeg() -> str:
    """The ffmpeg program: IMAGEIO_FFMPEG_EXE if set, else that of imageio-ffmpeg, else the system's."""
    import imageio_ffmpeg

    try:
        name = imageio_ffmpeg.get_ffmpeg_exe()
    except RuntimeError:
        name = "ffmpeg"
    program = shutil.which(name)
    if program is None:
        raise OutputError(
            f"There is no ffmpeg to write the video with ({short_path(name)}). Install it: pip install imageio-ffmpeg."
        )
    return program


def _ffmetadata(settings: dict[str, Any]) -> bytes:
    """The settings as the file's comment: the one tag that all players show and all copies keep."""
    text = json.dumps({SETTINGS_KEY: settings}, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    text = text.encode(errors="backslashreplace").decode()  # UTF-8 cannot hold half a surrogate pair, JSON can
    escaped = "".join("\\" + c if c in "=;#\\\n" else c for c in text)
    return f";FFMETADATA1\ncomment={escaped}\n".encode()


def _not_written(path: Path, reason: str) -> OutputError:
    return OutputError(f"{short_path(path)} could not be written: {reason}. {_free_space(path.parent)}")


def _free_space(folder: Path) -> str:
    """The free space of the disk, for the message: a full disk is the usual reason."""
    while not folder.exists():
        folder = folder.parent
    return f"{shutil.disk_usage(folder).free / 2**30:.2f} GiB are free there."


def _pipe(pipe: IO[bytes] | None) -> IO[bytes]:
    if pipe is None:
        raise ValueError("opened without a pipe")
    return pipe
