"""Runs the sections, one process each; see the package's docstring."""

from __future__ import annotations

import argparse
import importlib
import json
import subprocess
import sys
import time
from pathlib import Path

from .bench import Bench, environment

SECTIONS = ("attention", "block", "forward", "versus", "coders", "offload", "offload_fp8", "cold")
RESULTS = Path("benchmarks/results/gpu.jsonl")


def main() -> None:
    args = parse()
    sections = args.sections.split(",") if args.sections else list(SECTIONS)
    if unknown := set(sections) - set(SECTIONS):
        sys.exit(f"There is no section {min(unknown)}. Sections: {', '.join(SECTIONS)}.")
    results = Path(args.results)
    results.parent.mkdir(parents=True, exist_ok=True)
    if args.inside:
        measure(sections[0], results, tiny=args.tiny)
        return
    failed = []
    for section in sections:
        if not args.again and section in finished(results):
            print(f"{section} is in {results} already")
            continue
        if args.tiny:
            measure(section, results, tiny=True)
            continue
        command = [sys.executable, "-m", "benchmarks.gpu", "--inside", "--sections", section, "--results", str(results)]
        try:
            if subprocess.run(command, check=False, timeout=args.limit).returncode:
                failed.append(section)
        except subprocess.TimeoutExpired:
            failed.append(f"{section} (over {args.limit} s)")
    if failed:
        sys.exit(f"Failed: {', '.join(failed)}")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="benchmarks.gpu", description="The engine on a GPU, at full size")
    parser.add_argument("--sections", help=f"of {','.join(SECTIONS)}; all by default")
    parser.add_argument("--results", default=str(RESULTS), help="JSON lines; finished sections are not run again")
    parser.add_argument("--again", action="store_true", help="run sections that are in the results too")
    parser.add_argument("--tiny", action="store_true", help="toy sizes, in this process, on any device")
    parser.add_argument("--limit", type=int, default=180, help="seconds a section may take")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


def measure(section: str, results: Path, *, tiny: bool) -> None:
    bench = Bench(section, results, tiny=tiny)
    bench.write("start", **environment())
    began = time.perf_counter()
    importlib.import_module(f"benchmarks.gpu.{section}").run(bench)
    bench.write("end", seconds=time.perf_counter() - began)


def finished(results: Path) -> set[str]:
    if not results.exists():
        return set()
    lines = [json.loads(line) for line in results.read_text("utf-8").splitlines()]
    return {line["section"] for line in lines if line["name"] == "end"}


if __name__ == "__main__":
    main()
