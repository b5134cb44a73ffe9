"""What you trade: seconds, forwards, adherence, motion and the distance to the exact video, for every option.

    python -m benchmarks.trades --prompts 60 --markdown docs/trades.md

Runs the demo model. All options make the same prompts with the same seeds, one after the other in each round, so that
other programs on the machine slow all of them alike. Adherence is the share of clips that show all five attributes of
their prompt; motion is the mean path of the toy's edges (training/detector.py), as a share of that in drawn clips; PSNR
is to the exact video of the same seed. An option that this version lacks is left out. `--only NAME ...` measures some
options and keeps the other rows of the JSON file.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from lightx2v.config.magcache import forwards_of
from lightx2v.config.presets import resolve
from lightx2v.config.request import Request
from lightx2v.config.request_settings import SETTINGS
from lightx2v.cost.model_size import shape_of
from lightx2v.cost.run_time import Rates, estimate_cost
from lightx2v.pipeline import LightX2VPipeline
from training.world import render, to_frames

from .demo_quality import Made, Task, judge, make_task, psnr, read

JSON = Path("benchmarks/results/trades.json")
GPU = Path("benchmarks/results/gpu.jsonl")
BEGIN, END = "<!-- {}:begin (python -m benchmarks.trades) -->", "<!-- {}:end -->"
Row = dict[str, Any]


@dataclass(frozen=True)
class Option:
    """A preset of the demo model, without its task, and settings over it."""

    name: str
    preset: str
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def known(self) -> bool:
        return self.settings.keys() <= SETTINGS.keys()


EXACT = Option("exact", "base")
OPTIONS = (
    EXACT,
    Option("hybrid", "hybrid"),
    Option("three phases", "three_phase"),
    Option("distilled", "distill_lora"),
    *(Option(f"MagCache {speed_up:g}x", "base", {"speed_up": speed_up}) for speed_up in (1.3, 1.5, 2.0)),
    Option("distilled, NAG", "distill_lora", {"nag_scale": 11.0}),
)


class Run:
    """One loaded option, what it has made, and the seconds of each video, in total and of denoising."""

    def __init__(self, option: Option, kind: str) -> None:
        self.option = option
        self.resolved = resolve(f"demo_{kind}_{option.preset}", option.settings)
        self.pipe = LightX2VPipeline.from_config(self.resolved.engine, preset=self.resolved.preset.name)
        self.frames: list[np.ndarray] = []
        self.seconds: list[float] = []
        self.denoising: list[float] = []
        self.forwards = 0

    def request(self, task: Task, i: int) -> Request:
        picture = str(task.pictures[i]) if task.pictures else None
        return Request(**{**self.resolved.request, "prompt": task.prompts[i], "seed": i, "image_path": picture})

    def make(self, task: Task, i: int) -> None:
        result = self.pipe.run(self.request(task, i), return_frames=True)
        assert result.frames is not None
        self.frames.append(result.frames)
        self.seconds.append(result.timings.total)
        self.denoising.append(result.timings.seconds["denoise"])
        self.forwards = result.report()["forwards"]["computed"]

    def predicted(self, task: Task, taught: Run, seconds: Sequence[float]) -> float:
        """The seconds of denoising, predicted from those of another option's runs."""
        shape = shape_of(self.resolved.engine)
        with tempfile.TemporaryDirectory() as folder:
            rates = Rates(Path(folder) / "rates.json")
            for i, took in enumerate(seconds):
                rates.record("here", "demo", estimate_cost(taught.request(task, i), shape), {"denoise": took})
            prediction = rates.predict("here", "demo", estimate_cost(self.request(task, 0), shape), loaded=True)
        assert prediction is not None
        return prediction.stages["denoise"]


def measure(kind: str, options: Sequence[Option], count: int, folder: Path) -> list[Row]:
    """A row for each option, and one for drawn clips."""
    task = make_task(count, folder, pictures=kind == "i2v")
    drawn = read(to_frames(render(task.clips)).numpy()).path.mean().item()
    runs = [Run(option, kind) for option in options]
    for i in range(count):
        for run in runs:
            run.make(task, i)
    exact = next(run for run in runs if run.option is EXACT)
    rows = []
    for run in runs:
        row = _row(kind, run, task, drawn, exact)
        print(row, flush=True)
        rows.append(row)
        run.pipe.close()
    return rows


def _row(kind: str, run: Run, task: Task, drawn: float, exact: Run) -> Row:
    made = np.stack(run.frames)
    judged = judge(run.option.name, task, Made(frames=made, seconds=run.seconds))
    denoising = statistics.median(run.denoising[1:])  # the first run warms caches up
    estimate = run.predicted(task, exact, exact.denoising[1:])
    row: Row = {"task": kind, "option": run.option.name, "clips": len(made)}
    row["forwards"] = run.forwards
    row["seconds"] = round(statistics.median(run.seconds[1:]), 3)
    row["denoising"] = round(denoising, 3)
    row["estimated"] = round(estimate, 3)
    row["adherence"] = judged["all"]
    row["motion"] = round(float(judged["path"]) / drawn, 3)
    if run is not exact:
        row["dB"] = round(float(psnr(made, np.stack(exact.frames)).mean()), 1)
    return row


def to_markdown(rows: Sequence[Row]) -> str:
    head = ("task", "option", "forwards", "seconds", "denoising", "estimated", "adherence", "motion", "dB")
    titles = ("", "", "forwards", "s", "denoising s", "estimate", "adherence", "motion", "PSNR, dB")
    lines = ["| " + " | ".join(titles) + " |", "|---" * len(titles) + "|"]
    lines += ["| " + " | ".join(str(row.get(name, "–")) for name in head) + " |" for row in rows]
    return "\n".join(lines)


def on_h200() -> str:
    """Seconds of denoising with A14B in bf16 on an H200: the forwards of each option times the measured seconds of one,
    beside whole runs where one was measured."""
    lines = [json.loads(line) for line in GPU.read_text("utf-8").splitlines() if line.strip()]
    runs = {line["name"]: line for line in lines if line["section"] == "presets" and "H200" in line["device"]}
    # The first step of a process compiles kernels; each of the others is one forward.
    one = {
        clip: statistics.median(runs[f"{preset}, cold"]["steps_seconds"][1:])
        for clip, preset in (("480p", "t2v_distill_lora"), ("720p", "i2v_distill_lora"))
    }
    whole = {
        ("exact", "480p"): runs["t2v_base at 480p, cold"]["stages"]["denoise"],
        ("distilled", "480p"): runs["t2v_distill_lora, warm"]["stages"]["denoise"],
    }
    head = ("", "T2V forwards", "480p s", "measured", "720p s", "I2V forwards", "480p s", "720p s")
    out = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for option in OPTIONS:
        cells = [option.name]
        for kind in ("t2v", "i2v"):
            resolved = resolve(f"{kind}_{option.preset}", option.settings)
            shown = {"image_path": "x.png"} if kind == "i2v" else {}
            count = forwards_of(Request(prompt="x", **resolved.request, **shown)).computed
            small, large = (f"{count * one[clip]:.0f}" for clip in ("480p", "720p"))
            seen = whole.get((option.name, "480p"))
            cells += [f"{count}", small, *([f"{seen:.0f}" if seen else ""] if kind == "t2v" else []), large]
        out.append("| " + " | ".join(cells) + " |")
    return "\n".join(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--prompts", type=int, default=60)
    parser.add_argument("--only", nargs="+", help="names of options; exact is always measured beside them")
    parser.add_argument("--json", type=Path, default=JSON)
    parser.add_argument("--markdown", type=Path, help="a file with the marks between which the table goes")
    args = parser.parse_args()
    known = {option.name: option for option in OPTIONS if option.known}
    if unknown := set(args.only or ()) - known.keys():
        raise SystemExit(f"no such options: {', '.join(sorted(unknown))}; there are {', '.join(known)}")
    wanted = [option for name, option in known.items() if not args.only or name in args.only or option is EXACT]
    done: list[Row] = json.loads(args.json.read_text()) if args.json.exists() else []
    for kind in ("t2v", "i2v"):
        with tempfile.TemporaryDirectory() as folder:
            rows = measure(kind, wanted, args.prompts, Path(folder))
        new = {(row["task"], row["option"]): row for row in (*done, *rows)}
        order = [(task, name) for task in ("t2v", "i2v") for name in known]
        done = [new[key] for key in order if key in new]
        args.json.write_text(json.dumps(done, indent=1) + "\n")
    table = to_markdown(done)
    print(table)
    if args.markdown:
        text = args.markdown.read_text("utf-8")
        for name, content in (("trades", table), ("h200", on_h200())):
            before, rest = text.split(BEGIN.format(name))
            text = f"{before}{BEGIN.format(name)}\n{content}\n{END.format(name)}{rest.split(END.format(name))[1]}"
        args.markdown.write_text(text, "utf-8")


if __name__ == "__main__":
    main()
