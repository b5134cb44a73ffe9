"""The accuracy of predicted run times: python -m benchmarks.prediction

The prediction learns from three runs of the demo model, of three sizes or of one; then it predicts new sizes, and their
runs are measured. Other programs on the machine would look like errors of the prediction, so all sizes run in turn,
`--rounds` times, and the fastest run of each counts.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from PIL import Image

from lightx2v.config.presets import resolve
from lightx2v.config.request import Request
from lightx2v.cost.model_size import shape_of
from lightx2v.cost.run_time import Rates, RunCost, estimate_cost
from lightx2v.pipeline import LightX2VPipeline

Size = tuple[int, int, int]
"""Height, width, frames."""

THREE_SIZES: tuple[Size, ...] = ((64, 64, 17), (96, 96, 17), (128, 128, 33))
ONE_SIZE: tuple[Size, ...] = ((96, 96, 17),) * 3
UNSEEN: tuple[Size, ...] = ((64, 64, 5), (64, 64, 9), (128, 96, 17), (64, 96, 49), (160, 128, 33), (192, 192, 17))


class Runs:
    """One loaded demo model, and the fastest run of each size so far: seconds by stage."""

    def __init__(self, preset: str) -> None:
        self._settings = resolve(preset)
        self._shape = shape_of(self._settings.engine)
        self._pipeline = LightX2VPipeline.from_config(self._settings.engine, preset=preset)
        self._fastest: dict[Size, dict[str, float]] = {}
        self._folder = tempfile.TemporaryDirectory()

    def request(self, size: Size) -> Request:
        height, width, frames = size
        fields = {**self._settings.request, "height": height, "width": width, "frames": frames, "seed": 1}
        if self._settings.engine.task == "i2v":
            path = Path(self._folder.name) / f"{width}x{height}.png"
            Image.effect_noise((width, height), 60).convert("RGB").save(path)
            fields["image_path"] = str(path)
        return Request(prompt="a red ball rolls left over green grass at night", **fields)

    def work(self, size: Size) -> RunCost:
        return estimate_cost(self.request(size), self._shape)

    def round(self) -> None:
        """Run each size once."""
        for size in dict.fromkeys((*THREE_SIZES, *ONE_SIZE, *UNSEEN)):
            path = Path(self._folder.name) / "video.mp4"
            timings = self._pipeline.run(self.request(size), save_result_path=path, force=True).timings
            found = {stage: seconds for stage, seconds in timings.seconds.items() if stage != "load"}
            self._fastest[size] = min(self._fastest.get(size, found), found, key=lambda run: sum(run.values()))

    def measured(self, size: Size) -> float:
        return sum(self._fastest[size].values())

    def predicted(self, size: Size, taught: tuple[Size, ...]) -> float:
        """Predicted seconds for `size`, learned from the runs of `taught`."""
        with tempfile.TemporaryDirectory() as folder:
            rates = Rates(Path(folder) / "rates.json")
            for known in taught:
                rates.record("here", "demo", self.work(known), self._fastest[known])
            prediction = rates.predict("here", "demo", self.work(size), loaded=True)
        assert prediction is not None
        return prediction.seconds

    def error(self, size: Size, taught: tuple[Size, ...]) -> float:
        """The relative error: 0.1 if the prediction is a tenth too high."""
        return self.predicted(size, taught) / self.measured(size) - 1

    def close(self) -> None:
        self._pipeline.close()
        self._folder.cleanup()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="demo_t2v_base")
    parser.add_argument("--rounds", type=int, default=4, help="the first one warms caches up")
    args = parser.parse_args()
    runs = Runs(args.preset)
    for _ in range(args.rounds):
        runs.round()
    print("| size, frames | measured s | predicted from three sizes | from one size |\n|---|---|---|---|")
    for size in UNSEEN:
        both = " | ".join(
            f"{runs.predicted(size, taught):.2f} ({runs.error(size, taught):+.0%})"
            for taught in (THREE_SIZES, ONE_SIZE)
        )
        print(f"| {size[1]} x {size[0]}, {size[2]} | {runs.measured(size):.2f} | {both} |")
    runs.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
