"""How well a run's time is predicted: python -m benchmarks.prediction

Runs of three sizes of the demo model teach the prediction; then sizes that it has not seen are predicted, run and
compared. Prints one row for each. Other programs on the machine would show as an error of the prediction, which they
are not: every size is run `--runs` times, and the fastest counts.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from app.measured import engine_key
from app.memory import shape_of
from lightx2v.config import resolve
from lightx2v.estimate import Rates, count
from lightx2v.pipeline import LightX2VPipeline
from lightx2v.request import Request

PRESET = "demo_t2v_base"
SEEN = ((64, 64, 17), (96, 96, 17), (128, 128, 33))
UNSEEN = ((128, 96, 17), (160, 128, 33), (64, 64, 9), (192, 192, 17))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default=PRESET)
    parser.add_argument("--runs", type=int, default=3)
    args = parser.parse_args()
    settings = resolve(args.preset)
    shape, engine = shape_of(settings.engine), engine_key(settings.engine)
    with (
        tempfile.TemporaryDirectory() as folder,
        LightX2VPipeline.from_config(settings.engine, preset=args.preset) as pipeline,
    ):
        rates = Rates(Path(folder) / "rates.json")

        def request(size: tuple[int, int, int]) -> Request:
            fields = {**settings.request, "height": size[0], "width": size[1], "frames": size[2], "seed": 1}
            return Request(prompt="a red ball rolls left over green grass at night", **fields)

        def once(size: tuple[int, int, int]) -> dict[str, float]:
            path = Path(folder) / f"{len(list(Path(folder).iterdir()))}.mp4"
            result = pipeline.run(request(size), save_result_path=path)
            return {name: s for name, s in result.timings.seconds.items() if name != "load"}

        def run(size: tuple[int, int, int]) -> dict[str, float]:
            return min((once(size) for _ in range(args.runs)), key=lambda seconds: sum(seconds.values()))

        once(SEEN[0])  # the first run of a process also warms caches up
        for size in SEEN:
            rates.record("here", engine, count(request(size), shape), run(size))
        print("| size, frames | predicted s | measured s | error |\n|---|---|---|---|")
        for size in UNSEEN:
            prediction = rates.predict("here", engine, count(request(size), shape), loaded=True)
            assert prediction is not None
            measured = sum(run(size).values())
            error = prediction.seconds / measured - 1
            print(f"| {size[1]} x {size[0]}, {size[2]} | {prediction.seconds:.2f} | {measured:.2f} | {error:+.0%} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
