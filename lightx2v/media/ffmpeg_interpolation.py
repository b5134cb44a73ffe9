"""FfmpegFrames: a video at a higher rate with ffmpeg's own motion interpolation (its filter minterpolate), streamed.

An ffmpeg of its own takes the frames and returns those of the new rate, a few frames later. Where one of them is a
frame of the original, that one is taken instead: it has not been through another colour space.
"""

import os
import select
import subprocess
import tempfile
import time
from collections import deque
from collections.abc import Iterator

import numpy as np

from ..errors import OutputError
from ..progress import CancelToken
from .frame_times import exact_rate, frame_times
from .video_writer import STALL_SECONDS, ffmpeg

# Overlapping blocks of 8 pixels whose motion is searched from both frames: of the filter's choices the nearest to the
# true frames of a moving texture (36 dB; its defaults 33 dB, mixing both frames 28 dB).
MOTION = "mi_mode=mci:mc_mode=aobmc:me_mode=bidir:mb_size=8:vsbmc=1"
AHEAD = 4
"""Copies of the last frame at the end: the filter looks ahead, and makes nothing from the last frames otherwise."""
CHUNK = 1 << 20


class FfmpegFrames:
    """`add` frames (T, H, W, 3) uint8 as they come, then `finish`; both yield frames of the new video in their order.
    `abort` ends ffmpeg; it may be called at any time."""

    def __init__(self, frames: int, fps: float, new_fps: float, cancel: CancelToken) -> None:
        self._rates = exact_rate(fps), exact_rate(new_fps)
        self._times = deque(frame_times(frames, fps, new_fps))
        self._cancel = cancel
        self._process: subprocess.Popen[bytes] | None = None
        self._log = tempfile.TemporaryFile()
        self._came = bytearray()
        self._originals: dict[int, np.ndarray] = {}
        self._index = 0
        self._shape = (0, 0, 3)

    def add(self, frames: np.ndarray) -> Iterator[np.ndarray]:
        if self._process is None:
            self._shape = (*frames.shape[1:3], 3)
            self._process = self._start()
        for frame in frames:
            self._originals[self._index] = frame
            self._index += 1
            yield from self._exchange(np.ascontiguousarray(frame).data.cast("B"))

    def finish(self) -> Iterator[np.ndarray]:
        if self._process is None:
            return
        assert self._process.stdin is not None
        self._process.stdin.close()
        yield from self._exchange(None)
        if self._times:
            self._log.seek(0)
            lines = self._log.read().decode(errors="replace").strip().splitlines()[-3:]
            raise self._failed(f"it ended {len(self._times)} frames early ({'; '.join(lines)[:500]})")

    def abort(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            for pipe in (self._process.stdin, self._process.stdout):
                if pipe is not None and not pipe.closed:
                    pipe.close()
            self._process = None
        self._log.close()

    def _start(self) -> subprocess.Popen[bytes]:
        fps, new_fps = self._rates
        height, width, _ = self._shape
        filters = f"format=yuv444p,tpad=stop={AHEAD}:stop_mode=clone,minterpolate=fps={new_fps}:{MOTION}"
        raw = ["-f", "rawvideo", "-pix_fmt", "rgb24"]
        command = [ffmpeg(), "-hide_banner", "-loglevel", "error", "-nostats", *raw]
        command += ["-video_size", f"{width}x{height}", "-framerate", str(fps), "-i", "pipe:0"]
        command += ["-vf", filters, "-fps_mode", "passthrough", *raw, "pipe:1"]
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, bufsize=0, start_new_session=True
        )
        assert process.stdin is not None and process.stdout is not None
        os.set_blocking(process.stdin.fileno(), False)
        return process

    def _exchange(self, data: memoryview | None) -> Iterator[np.ndarray]:
        """Write all of `data`, or with None wait for the end, and read meanwhile. Yields the frames that came."""
        assert self._process is not None and self._process.stdin is not None and self._process.stdout is not None
        into, out = self._process.stdin, self._process.stdout.fileno()
        ready = select.poll()
        ready.register(out, select.POLLIN)
        if data is not None:
            ready.register(into.fileno(), select.POLLOUT)
        deadline = time.monotonic() + STALL_SECONDS
        while data is None or len(data):
            self._cancel.check()
            events = dict(ready.poll(100))
            if events:
                deadline = time.monotonic() + STALL_SECONDS
            elif time.monotonic() > deadline:
                raise self._failed(f"it has done nothing for {STALL_SECONDS:.0f} seconds")
            if out in events:
                read = os.read(out, CHUNK)
                if not read and data is None:
                    return
                if not read:
                    raise self._failed("it ended before its last frame")
                self._came += read
                yield from self._complete()
            if data is not None and into.fileno() in events:
                try:
                    data = data[os.write(into.fileno(), data) :]
                except BlockingIOError:
                    continue
                except BrokenPipeError:
                    raise self._failed("it ended before its last frame") from None

    def _complete(self) -> Iterator[np.ndarray]:
        size = int(np.prod(self._shape))
        while len(self._came) >= size:
            frame = np.frombuffer(bytes(self._came[:size]), np.uint8).reshape(1, *self._shape)
            del self._came[:size]
            if not self._times:
                continue  # between copies of the last frame
            index, part = self._times.popleft()
            for old in [known for known in self._originals if known < index]:
                del self._originals[old]
            yield frame if part else self._originals[index][None]

    def _failed(self, reason: str) -> OutputError:
        return OutputError(
            f"ffmpeg could not interpolate the frames: {reason}. Set interpolated_fps to null, or interpolation to "
            "rife."
        )
