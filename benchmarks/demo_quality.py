"""Judge the demo model with a program: does the video show what the prompt says? Uses the engine and its presets.

    python -m benchmarks.demo_quality --prompts 200 --markdown assets/demo/README.md

Half of the prompts are combinations of attributes that were not in training. The detector reads kind, colour, motion,
ground and time of day from the frames (training/detector.py). The benchmark judges the detector first, on drawn clips.
`--only NAME ...` runs some rows and keeps the other rows of the JSON file.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from lightx2v.config.presets import resolve
from lightx2v.config.request import Request
from lightx2v.pipeline import LightX2VPipeline
from training.captions import caption
from training.detector import Reading, detect
from training.world import ATTRIBUTES, COMBINATIONS, Clips, held_out, place_clips, render, sample_clips, to_frames

VAE = Path("assets/demo/Wan2.2-T2V-Demo/Wan2.1_VAE.pth")
SEEDS = 16
SPEED_UPS = (1.0, 1.3, 1.5, 2.0)
"""Targets of MagCache; 1 is exact."""
NAG_SCALE = 11.0
TABLE_MARK = "<!-- table -->"


@dataclass(frozen=True, kw_only=True)
class Task:
    """The task: prompts, their attributes, which of them were not in training, and images if there are any."""

    prompts: Sequence[str]
    clips: Clips
    unseen: Tensor
    pictures: Sequence[Path] = ()


@dataclass(frozen=True, kw_only=True)
class Made:
    """Frames (N, T, H, W, 3) uint8, and the seconds that each clip took."""

    frames: np.ndarray
    seconds: Sequence[float]


Generate = Callable[[Task], Made]
Row = dict[str, float | str | int]


def make_task(count: int, folder: Path, *, pictures: bool) -> Task:
    """Half of the combinations are from training, half are not; in English and Chinese; with drawn first frames as
    images."""
    generator, chance = torch.Generator().manual_seed(2024), random.Random(2024)
    every = torch.arange(COMBINATIONS)
    groups = (every[~held_out(every)], every[held_out(every)])
    combination = torch.cat([group[torch.randperm(len(group), generator=generator)[: count // 2]] for group in groups])
    clips = place_clips(combination, generator)
    prompts = [caption(clips.words(i), chance) for i in range(len(clips))]
    files = []
    if pictures:
        for i, frame in enumerate(to_frames(render(clips, 1))[:, 0].numpy()):
            files.append(folder / f"{i}.png")
            Image.fromarray(frame).save(files[-1])
    return Task(prompts=prompts, clips=clips, unseen=held_out(combination), pictures=files)


def with_engine(preset: str, **changes: object) -> Generate:
    """Clips that a preset makes; `changes` are fields of the request."""

    def generate(task: Task) -> Made:
        resolved = resolve(preset, {})
        with LightX2VPipeline.from_config(resolved.engine, preset=preset) as pipe:
            frames, seconds = [], []
            for i, prompt in enumerate(task.prompts):
                picture = str(task.pictures[i]) if task.pictures else None
                fields = resolved.request | {"seed": i, "image_path": picture} | changes
                result = pipe.run(Request(prompt=prompt, **fields), return_frames=True)
                assert result.frames is not None
                frames.append(result.frames)
                seconds.append(result.timings.total)
        return Made(frames=np.stack(frames), seconds=seconds)

    return generate


def to_video(frames: np.ndarray) -> Tensor:
    return torch.from_numpy(frames).permute(0, 4, 1, 2, 3).float() / 127.5 - 1


def read(frames: np.ndarray) -> Reading:
    """The detector on any number of clips."""
    parts = [detect(to_video(frames[start : start + 32])) for start in range(0, len(frames), 32)]
    names = (*ATTRIBUTES, "outlines", "path")
    return Reading(**{name: torch.cat([getattr(part, name) for part in parts]) for name in names})


def judge(name: str, task: Task, made: Made) -> Row:
    reading = read(made.frames)
    right = reading.matches(task.clips)
    row: Row = {"name": name, "clips": len(made.frames)}
    row |= {key: round(value.float().mean().item(), 3) for key, value in right.items()}
    row["seen"] = round(right["all"][~task.unseen].float().mean().item(), 3)
    row["held_out"] = round(right["all"][task.unseen].float().mean().item(), 3)
    row["outline"] = round(reading.crispness(task.clips).mean().item(), 3)
    row["path"] = round(reading.path.mean().item(), 3)
    if task.pictures:
        given = np.stack([np.asarray(Image.open(path)) for path in task.pictures])
        decibels = psnr(made.frames[:, 0], given)
        row["first_dB"] = round(float(decibels.mean()), 1)
        row["first_above_25_dB"] = round(float((decibels >= 25).mean()), 3)
    row["seconds"] = round(statistics.median(made.seconds), 3)
    return row


def psnr(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Decibels of each pair of uint8 pictures or clips."""
    error = np.square((a.astype(np.float32) - b.astype(np.float32)) / 255).reshape(len(a), -1).mean(1)
    return -10 * np.log10(np.maximum(error, 1e-10))


def drawn_clips(count: int) -> tuple[Row, Row]:
    """The detector on drawn clips, and on the same clips after the VAE."""
    from lightx2v.models.vae import WanVAE
    from lightx2v.models.vae_config import VAEConfig
    from lightx2v.weights.checkpoint import open_checkpoint

    checkpoint = open_checkpoint(VAE)
    vae = WanVAE(VAEConfig.from_shapes(checkpoint.shapes))
    vae.load_state_dict({name: checkpoint.tensor(name).float() for name in checkpoint.shapes})
    clips = sample_clips(count, torch.Generator().manual_seed(77), split="all")
    video = torch.cat([render(clips[start : start + 32]) for start in range(0, count, 32)])
    real = to_frames(video).numpy()
    with torch.no_grad():
        again = [vae.decode_clip(vae.encode_clip(part)[0]) for part in video.split(8)]
    made = to_frames(torch.cat(again)).numpy()
    rows = []
    for name, frames in (("drawn clips", real), ("VAE reconstruction", made)):
        reading = read(frames)
        right = reading.matches(clips) | {"outline": reading.crispness(clips)}
        rows.append({"name": name, "clips": count} | {k: round(v.float().mean().item(), 3) for k, v in right.items()})
    rows[1]["dB"] = round(float(psnr(made, real).mean()), 1)
    return rows[0], rows[1]


def different_seeds(generate: Generate) -> Row:
    """16 seeds of one held-out prompt: the detector's score, and the distance of the two most similar clips."""
    words = {"kind": "star", "colour": "yellow", "motion": "bounce", "ground": "sand", "time": "night"}
    index = torch.zeros(1, dtype=torch.long)
    for name, values in ATTRIBUTES.items():
        index = index * len(values) + values.index(words[name])
    assert held_out(index).all()
    clips = place_clips(index.repeat(SEEDS), torch.Generator().manual_seed(0))
    prompt = "a yellow star bounces on the beach at night"
    task = Task(prompts=[prompt] * SEEDS, clips=clips, unseen=torch.ones(SEEDS, dtype=torch.bool))
    made = generate(task)
    pixels = made.frames.astype(np.float32)
    apart = [np.abs(pixels[i] - pixels[j]).mean() for i in range(SEEDS) for j in range(i)]
    right = read(made.frames).matches(clips)["all"].float().mean().item()
    return {
        "name": "16 seeds of one held-out prompt",
        "clips": SEEDS,
        "all": round(right, 3),
        "closest_pair_mean_difference_of_255": round(float(min(apart)), 2),
    }


def speed_ups(preset: str, task: Task) -> list[Row]:
    """The exact run and MagCache's, clip by clip in turns: the detector's score, the distance to the exact clip, the
    median seconds of denoising, and how many forwards were computed."""
    resolved = resolve(preset, {})
    frames: dict[float, list[np.ndarray]] = {factor: [] for factor in SPEED_UPS}
    seconds: dict[float, list[float]] = {factor: [] for factor in SPEED_UPS}
    computed: dict[float, int] = {}
    with LightX2VPipeline.from_config(resolved.engine, preset=preset) as pipe:
        for i, prompt in enumerate(task.prompts):
            picture = str(task.pictures[i]) if task.pictures else None
            for factor in SPEED_UPS:
                fields = resolved.request | {"seed": i, "image_path": picture, "speed_up": factor}
                result = pipe.run(Request(prompt=prompt, **fields), return_frames=True)
                assert result.frames is not None
                frames[factor].append(result.frames)
                seconds[factor].append(result.timings.seconds["denoise"])
                computed[factor] = result.forwards["computed"]
    rows, exact = [], np.stack(frames[1.0])
    for factor in SPEED_UPS:
        made = Made(frames=np.stack(frames[factor]), seconds=seconds[factor])
        row = judge(f"{preset}, {'exact' if factor == 1 else f'{factor}x'}", task, made)
        row["computed"] = computed[factor]
        if factor > 1:
            row["to_exact_dB"] = round(float(psnr(made.frames, exact).mean()), 1)
        rows.append(row)
    return rows


def negative_prompts(preset: str, count: int, how: str = "", **changes: object) -> list[Row]:
    """Prompts without a time of day: how often it is night, with and without a negative prompt. `how` names `changes`
    of the request."""
    generator, chance = torch.Generator().manual_seed(5), random.Random(5)
    clips = sample_clips(count, generator, split="train")
    prompts = []
    for i in range(count):
        words = clips.words(i)
        del words["time"]
        prompts.append(caption(words, chance))
    task = Task(prompts=prompts, clips=clips, unseen=torch.zeros(count, dtype=torch.bool))
    rows: list[Row] = []
    for negative in ("", "at night"):
        reading = read(with_engine(preset, negative_prompt=negative, **changes)(task).frames)
        share = (reading.time == ATTRIBUTES["time"].index("night")).float().mean().item()
        said = f'negative prompt "{negative}"' if negative else "default negative prompt"
        rows.append({"name": f"{preset}{how}, time left open, {said}", "clips": count, "night": round(share, 3)})
    return rows


def all_rows(count: int, few: int, folder: Path) -> dict[str, Callable[[], list[Row]]]:
    """The rows by name. Rows about a setting use fewer clips."""
    tasks: dict[tuple[str, int], Task] = {}

    def task(kind: str, size: int) -> Task:
        if (kind, size) not in tasks:
            place = folder / f"{kind}_{size}"
            place.mkdir()
            tasks[kind, size] = make_task(size, place, pictures=kind == "i2v")
        return tasks[kind, size]

    def judged(name: str, preset: str, size: int, **changes: object) -> Callable[[], list[Row]]:
        def run() -> list[Row]:
            asked = task("i2v" if "i2v" in preset else "t2v", size)
            return [judge(name, asked, with_engine(preset, **changes)(asked))]

        return run

    rows: dict[str, Callable[[], list[Row]]] = {"drawn": lambda: list(drawn_clips(count))}
    for kind in ("t2v", "i2v"):
        for variant in ("base", "distill_lora", "merged", "fp8"):
            preset = f"demo_{kind}_{variant}"
            rows[preset] = judged(preset, preset, count)
    rows["seeds"] = lambda: [different_seeds(with_engine("demo_t2v_base"))]
    effects: dict[str, tuple[str, dict[str, object]]] = {
        "guidance 1": ("demo_t2v_base", {"guidance": (1.0, 1.0)}),
        "guidance 3": ("demo_t2v_base", {"guidance": (3.0, 3.0)}),
        "guidance 8": ("demo_t2v_base", {"guidance": (8.0, 8.0)}),
        "shift 1": ("demo_t2v_base", {"shift": 1.0}),
        "shift 3": ("demo_t2v_base", {"shift": 3.0}),
        "shift 100": ("demo_t2v_base", {"shift": 100.0}),
        "4 steps without the LoRA": ("demo_t2v_base", {"steps": 4}),
        "LoRA with shift 1": ("demo_t2v_distill_lora", {"shift": 1.0}),
        "LoRA with guidance on": ("demo_t2v_distill_lora", {"enable_cfg": True, "guidance": (4.0, 3.0)}),
    }
    for name, (preset, changes) in effects.items():
        rows[name] = judged(f"{preset}, {name}", preset, few, **changes)
    rows["negative"] = lambda: negative_prompts("demo_t2v_base", few)
    rows["NAG"] = lambda: [
        *negative_prompts("demo_t2v_distill_lora", few),
        *negative_prompts("demo_t2v_distill_lora", few, ", NAG", nag_scale=NAG_SCALE),
    ]
    for kind in ("t2v", "i2v"):
        rows[f"{kind} speed-ups"] = lambda kind=kind: speed_ups(f"demo_{kind}_base", task(kind, few))
    return rows


def to_markdown(rows: Sequence[Row], command: str) -> str:
    columns = ("all", "seen", "held_out", *ATTRIBUTES, "outline", "path", "dB")
    columns = (*columns, "first_dB", "first_above_25_dB", "night")
    rows, faster = [row for row in rows if "computed" not in row], [row for row in rows if "computed" in row]
    used = [column for column in columns if any(column in row for row in rows)]
    lines = [f"Made by `{command}`.", "", "| what | clips | " + " | ".join(c.replace("_", " ") for c in used) + " |"]
    lines.append("|---" * (len(used) + 2) + "|")
    for row in rows:
        cells = [str(row.get(column, "")) for column in used]
        lines.append(f"| {row['name']} | {row['clips']} | " + " | ".join(cells) + " |")
    extra = [row for row in rows if "closest_pair_mean_difference_of_255" in row]
    for row in extra:
        far = row["closest_pair_mean_difference_of_255"]
        lines += ["", f"{row['name']}: the two most alike clips differ by {far} of 255 on average."]
    if faster:
        names = ("all", "outline", "to_exact_dB", "computed", "seconds")
        head = ("what", "clips", "all", "outline", "dB to exact", "forwards", "seconds of denoising")
        lines += ["", "What a speed-up costs:", "", "| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
        for row in faster:
            cells = [str(row.get(name, "")) for name in ("name", "clips", *names)]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--few", type=int, default=60, help="prompts for the effects of settings")
    parser.add_argument("--only", nargs="+", help="names of rows")
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/demo_quality.json"))
    parser.add_argument("--markdown", type=Path)
    args = parser.parse_args()
    command = f"python -m benchmarks.demo_quality --prompts {args.prompts} --few {args.few}"
    with tempfile.TemporaryDirectory() as folder:
        rows = all_rows(args.prompts, args.few, Path(folder))
        unknown = set(args.only or ()) - set(rows)
        if unknown:
            raise SystemExit(f"no such rows: {', '.join(sorted(unknown))}; there are {', '.join(rows)}")
        done: dict[str, list[Row]] = json.loads(args.json.read_text()) if args.json.exists() else {}
        for name in args.only or rows:
            done[name] = rows[name]()
            for row in done[name]:
                print(row, flush=True)
            args.json.parent.mkdir(parents=True, exist_ok=True)
            args.json.write_text(json.dumps(done, indent=1) + "\n")
    table = to_markdown([row for name in rows for row in done.get(name, [])], command)
    print(table)
    if args.markdown:
        kept, mark, _ = args.markdown.read_text().partition(TABLE_MARK)
        if not mark:
            raise SystemExit(f"{args.markdown} has no line {TABLE_MARK}, after which the table could go")
        args.markdown.write_text(f"{kept}{mark}\n\n{table}")


if __name__ == "__main__":
    main()
