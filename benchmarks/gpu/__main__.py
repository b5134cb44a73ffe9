"""Run the sections, each in a process of its own; see the package's docstring."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from .bench import Bench, Wanted, environment

SECTIONS = (
    "host",
    "attention",
    "block",
    "forward",
    "inexact",
    "compiled",
    "coders",
    "offload",
    "offload_fp8",
    "streaming",
    "streaming_720p",
    "gguf",
    "versus",
    "magcache",
    "presets",
    "demo",
    "parallel",
)
RESULTS = Path("benchmarks/results/gpu.jsonl")
LEAST = 20
"""Seconds below which no section is started."""


def main() -> None:
    args = parse()
    sections = args.sections.split(",") if args.sections else list(SECTIONS)
    if unknown := set(sections) - set(SECTIONS):
        sys.exit(f"There is no section {min(unknown)}. Sections: {', '.join(SECTIONS)}.")
    results = Path(args.results)
    results.parent.mkdir(parents=True, exist_ok=True)
    if args.inside:
        measure(sections[0], results, args)
        return
    failed = []
    end = time.monotonic() + args.budget
    for section in sections:
        if not args.again and section in finished(results):
            print(f"{section} is in {results} already")
            continue
        if args.tiny:
            measure(section, results, args)
            continue
        left = end - time.monotonic()
        if left < LEAST:
            failed.append(f"{section} (no time left)")
            continue
        command = [sys.executable, "-m", "benchmarks.gpu", "--inside", "--sections", section, "--results", str(results)]
        command += ["--commit", args.commit, "--presets", args.presets, "--gpus", str(args.gpus)]
        command += ["--clip", args.clip]
        command += ["--models", args.models] if args.models else []
        command += [f"--{name}" for name in ("whole", "again") if getattr(args, name)]
        if problem := within(command, min(args.limit, left)):
            failed.append(f"{section} ({problem})")
    if failed:
        sys.exit(f"Failed: {', '.join(failed)}")


def within(command: list[str], seconds: float) -> str:
    """Run a section and return why it failed, or "". At the time limit, stop it with all processes that it started."""
    process = subprocess.Popen(command, start_new_session=True)
    try:
        code = process.wait(seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        return f"over {seconds:.0f} s"
    return f"exit status {code}" if code else ""


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="benchmarks.gpu", description="The engine on a GPU, at full size")
    parser.add_argument("--sections", help=f"of {','.join(SECTIONS)}; all by default")
    parser.add_argument("--results", default=str(RESULTS), help="JSON lines; finished sections are not run again")
    parser.add_argument("--again", action="store_true", help="run sections that are in the results too")
    parser.add_argument("--tiny", action="store_true", help="toy sizes, in this process, on any device")
    parser.add_argument("--limit", type=int, default=180, help="seconds a section may take")
    parser.add_argument(
        "--budget", type=float, default=float("inf"), help="seconds that all sections may take together"
    )
    parser.add_argument("--commit", default="", help="of the code, to be written beside the results")
    parser.add_argument("--presets", default="", help="of the section presets only these: t2v_base,i2v_base")
    parser.add_argument("--clip", default="", help="480p or 720p, for presets at another size than their own")
    parser.add_argument("--gpus", type=int, default=1, help="that the presets share")
    parser.add_argument("--models", help="a folder in which the presets' files are kept, 67 GB; they are written once")
    parser.add_argument("--whole", action="store_true", help="presets of 40 steps run all of them, and not two")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


def measure(section: str, results: Path, args: argparse.Namespace) -> None:
    """A section that ran only in part writes no "end" line."""
    presets = tuple(args.presets.split(",")) if args.presets else ()
    models = Path(args.models) if args.models else None
    wanted = Wanted(presets=presets, clip=args.clip, gpus=args.gpus, models=models, whole=args.whole, again=args.again)
    bench = Bench(section, results, tiny=args.tiny, wanted=wanted)
    bench.write("start", **environment(), commit=args.commit)
    began = time.perf_counter()
    importlib.import_module(f"benchmarks.gpu.{section}").run(bench)
    if section != "presets" or not presets:
        bench.write("end", seconds=time.perf_counter() - began)


def finished(results: Path) -> set[str]:
    if not results.exists():
        return set()
    lines = [json.loads(line) for line in results.read_text("utf-8").splitlines()]
    return {line["section"] for line in lines if line["name"] == "end"}


if __name__ == "__main__":
    main()
