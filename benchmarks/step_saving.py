"""What saving a run's step costs: for the run, which waits for the copy only, and for the thread that writes.

    python -m benchmarks.step_saving [--device cuda] [--folder .] [--repeats 5]

The steps have the sizes of image-to-video with UniPC and guidance, the largest that a run saves. The claim: at one save
in 20 seconds, below 1 % of the run's time, also where the writer's processor time is the run's (on a CPU).
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from lightx2v.engine.saved_step import SavedStep
from lightx2v.step_file import SAVE_EVERY, StepFile

SHAPES = {"480x832, 81 frames": (21, 60, 104), "720x1280, 81 frames": (21, 90, 160)}
TEXT = (512, 4096)


def step_of(frames_height_width: tuple[int, int, int], device: str) -> SavedStep:
    random = lambda channels: torch.randn((channels, *frames_height_width), device=device)  # noqa: E731
    return SavedStep(
        step=20,
        steps=40,
        latents=random(16),
        solver_state={name: random(16) for name in ("sample", "x0", "older")},
        contexts=[torch.randn(TEXT, device=device).bfloat16() for _ in range(2)],
        condition=random(20),
        made_by={},
        tokens={},
        warnings=[],
    )


def seconds(call: Callable[[], object], clock: Callable[[], float] = time.perf_counter) -> float:
    started = clock()
    call()
    return clock() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--folder", type=Path, help="on the disk to write to (default: the temporary one)")
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    print(f"{'step':<20} {'MB':>6} {'run waits ms':>13} {'thread ms':>10} {'CPU ms':>7} {'resume ms':>10} {'share':>7}")
    for name, shape in SHAPES.items():
        step = step_of(shape, args.device)
        with tempfile.TemporaryDirectory(dir=args.folder) as folder:
            file = StepFile(Path(folder) / "video.mp4")
            rows = []
            for _ in range(args.repeats):
                copy = seconds(lambda step=step: step.on(torch.Tensor.cpu))
                host = step.on(torch.Tensor.cpu)
                cpu = time.process_time()
                write = seconds(lambda host=host, file=file: file.write(host.to_bytes()))
                cpu = time.process_time() - cpu
                back = seconds(lambda file=file: SavedStep.from_bytes(file.read() or b""))
                rows.append((copy, write, cpu, back))
            copy, write, cpu, back = map(statistics.median, zip(*rows, strict=True))
            share = (copy + (cpu if args.device == "cpu" else 0.0)) / SAVE_EVERY
            print(
                f"{name:<20} {file.path.stat().st_size / 1e6:6.0f} {1000 * copy:13.2f} {1000 * write:10.0f} "
                f"{1000 * cpu:7.0f} {1000 * back:10.0f} {share:7.2%}"
            )


if __name__ == "__main__":
    main()
