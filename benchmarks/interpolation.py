"""Seconds for each new frame: RIFE with random weights, and ffmpeg's motion interpolation.

python benchmarks/interpolation.py [--size 832x480] [--frames 9] [--fps 32] [--device cpu]
"""

import argparse
import time

import numpy as np
import torch

from lightx2v.config.request import INTERPOLATIONS, Request
from lightx2v.engine.interpolation import RifeFrames
from lightx2v.media.ffmpeg_interpolation import FfmpegFrames
from lightx2v.media.frame_times import frame_times
from lightx2v.models.rife import Rife
from lightx2v.progress import CancelToken, peak_rss


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="832x480", help="width and height")
    parser.add_argument("--frames", type=int, default=9, help="of the original, 4n + 1")
    parser.add_argument("--fps", type=float, default=32)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    width, height = map(int, options.size.split("x"))
    request = Request(prompt="a cat", frames=options.frames, interpolated_fps=options.fps)
    frames = np.random.default_rng(0).integers(0, 256, (options.frames, height, width, 3), dtype=np.uint8)
    for name in INTERPOLATIONS:
        if name == "rife":
            made = RifeFrames(Rife().to(options.device).eval(), request, CancelToken())
        else:
            made = FfmpegFrames(request.frames, request.fps, request.video_fps, CancelToken())
        started, count = time.perf_counter(), 0
        with torch.inference_mode():
            for at in range(0, len(frames), 4):
                count += sum(1 for _ in made.add(frames[at : at + 4]))
            count += sum(1 for _ in made.finish())
        seconds = time.perf_counter() - started
        made.abort()
        new = sum(1 for _, part in frame_times(request.frames, request.fps, request.video_fps) if part)
        print(
            f"{name}: {count} frames, {new} of them new, in {seconds:.2f} s: {seconds / new:.3f} s for each new frame; "
            f"peak {peak_rss() / 2**30:.2f} GiB"
        )


if __name__ == "__main__":
    main()
