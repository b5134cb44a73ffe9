"""docs/performance.md from the results: `python -m benchmarks.gpu.tables`. What was not run is listed as that.

Of a measurement that is there several times the last one counts.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from .__main__ import RESULTS, SECTIONS

PAGE = Path("docs/performance.md")
REMARKS = Path("benchmarks/results/remarks.md")
"""What the numbers mean, by hand; put between the table of runs and the other tables."""

Line = dict[str, Any]
GB = 1e9


def main() -> None:
    lines = [json.loads(line) for line in RESULTS.read_text("utf-8").splitlines()]
    cpu = sorted(RESULTS.parent.glob("cpu*.jsonl"))
    remarks = REMARKS.read_text("utf-8") if REMARKS.is_file() else ""
    PAGE.write_text(page(lines, remarks, cpu), encoding="utf-8")
    sys.stdout.write(f"{PAGE}\n")


def page(lines: list[Line], remarks: str = "", cpu: Iterable[Path] = ()) -> str:
    lines = [line for line in lines if not line.get("tiny")]
    parts = [
        "# Measured performance",
        "Made by `python -m benchmarks.gpu.tables` from `benchmarks/results/`; do not edit. Full-size models of "
        "Wan2.2-A14B with random weights, batch 1, one prompt and no guidance unless a table says more. 480p is "
        "832x480 and 720p 1280x720, 81 frames each.",
        runs(lines),
        remarks.strip(),
        *(text for part in PARTS if (text := part(lines))),
        not_run(lines),
        *(cpu_table(path) for path in cpu),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def runs(lines: list[Line]) -> str:
    rows: dict[tuple[str, ...], list[str]] = {}
    for line in lines:
        if line["name"] == "start":
            what = [str(line.get(key)) for key in ("torch", "cuda", "cudnn", "triton", "python")]
            rows.setdefault((line.get("commit", ""), line["device"], *what), []).append(line["at"])
    table_rows = [[min(at), *key] for key, at in rows.items()]
    return "## Runs\n\n" + table(
        ["from (UTC)", "commit", "device", "torch", "CUDA", "cuDNN", "Triton", "Python"], table_rows
    )


def attention(lines: list[Line]) -> str:
    found = last(lines, "attention", "kernel")
    rows = [
        [f"{line['tokens']:,}".replace(",", " "), line["kernel"], *speed(line, 1e3), f"{line['error']:.1e}"]
        for line in sorted(found, key=lambda line: line["tokens"])
        if "seconds" in line
    ]
    head = ["tokens", "kernel", "ms", "TFLOP/s", "of the peak", "error to float32"]
    return heading("Self-attention, 40 heads of 128, bf16", head, rows)


def block(lines: list[Line]) -> str:
    found = last(lines, "block", "linears")
    rows = [[line["clip"], line["linears"], line["steps"], *speed(line, 1e3)] for line in found if "seconds" in line]
    steps = [
        [line["clip"], line["step"], line.get("steps", ""), f"{line['count']}", number(line["seconds"] * 1e3)]
        for line in last(lines, "block", "step")
    ]
    first = heading("One block", ["video", "linear layers", "element-wise steps", "ms", "TFLOP/s", "of the peak"], rows)
    return first and first + "\n\nIts steps, and how often each comes in a block (0: not used, for comparison):\n\n" + (
        table(["video", "step", "kernel", "times", "ms"], steps)
    )


def forward(lines: list[Line]) -> str:
    found = last(lines, "forward", "linears") + last(lines, "compiled", "linears")
    rows = [
        [line["clip"], line["linears"], line["steps"], *speed(line, 1), gb(line.get("peak_allocated"))]
        for line in found
    ]
    head = ["video", "linear layers", "element-wise steps", "s", "TFLOP/s", "of the peak", "peak GB allocated"]
    return heading("One forward of an expert, 40 blocks", head, rows)


def versus(lines: list[Line]) -> str:
    rows = [
        [line["clip"], line["way"], number(line["ratio"]), f"{line['difference']:.1e}"]
        for line in last(lines, "versus", "ratio")
    ]
    return heading(
        "Against diffusers: our seconds over theirs", ["video", "diffusers with", "ratio", "difference"], rows
    )


def coders(lines: list[Line]) -> str:
    rows = [
        [line["clip"], line["what"], line["how"], number(line["seconds"]), gb(line["peak_allocated"])]
        for line in last(lines, "coders", "what")
    ]
    text = heading("VAE, bf16", ["video", "what", "layout", "s", "peak GB allocated"], rows)
    rows = [[f"{line['tokens']}", number(line["seconds"] * 1e3)] for line in last(lines, "coders", "tokens")]
    return text and text + "\n\nThe text encoder, bf16:\n\n" + table(["tokens", "ms"], rows)


def offload(lines: list[Line]) -> str:
    found = last(lines, "offload", "total") + last(lines, "offload_fp8", "total")
    rows = [
        [
            line["name"],
            number(line["total"]),
            *(number(line["stages"][stage]) for stage in ("text", "denoise", "decode")),
            share(line.get("denoise_over_resident")),
            number(line["switch_stall"] * 1e3) if "switch_stall" in line else "",
            *(gb(line["peaks"][stage]) for stage in ("text", "denoise", "decode")),
        ]
        for line in found
        if "peaks" in line
    ]
    head = ["weights", "s", "text", "denoise", "decode", "denoise over resident", "switch stall ms"]
    text = heading("Whole warm runs: text to video, 480p, 4 steps", [*head, "peak GB text", "denoise", "decode"], rows)
    if not text:
        return ""
    text += "\n\nThe second run of each. Peaks are of tensors; without writing the mp4.\n\n"
    counted = [
        [line["name"], stage, gb(line["peaks"][stage]), gb(size), f"{size / line['peaks'][stage] - 1:+.1%}"]
        for line in found
        if "peaks" in line
        for stage, size in line["counted"].items()
    ]
    text += "What the planner counts before anything is loaded, against that:\n\n"
    text += table(["weights", "stage", "peak GB", "counted GB", "off by"], counted)
    naive = last(lines, "offload", "measured_blocks")
    return text + "".join(
        f"\n\nBy `.to()` both ways, from {line['measured_blocks']} blocks: {number(line['seconds'])} s for a switch of "
        f"experts, of which {number(line['come'])} s are the copy to the device."
        for line in naive
    )


def host(lines: list[Line]) -> str:
    found = last(lines, "host", "gbytes_per_second") + last(lines, "offload", "gbytes_per_second")
    rows = [
        [
            line["name"],
            number(line["gbytes_per_second"]),
            number(line["host_waited"] * 1e3) if "host_waited" in line else "",
        ]
        for line in found
    ]
    return heading("Copies of about 0.7 GB to the device", ["from", "GB/s", "the host waits, ms"], rows)


def cold(lines: list[Line]) -> str:
    rows = [
        [line["name"], number(line["seconds"]), number(line["load"]), *(number(x) for x in line["stages"].values())]
        for line in last(lines, "cold", "stages")
    ]
    head = ["run", "s", "of which loading", "text", "image", "denoise", "decode"]
    return heading("Image to video in 4 steps, FP8, from a fresh process", head, rows)


PARTS: tuple[Callable[[list[Line]], str], ...] = (attention, block, forward, versus, coders, offload, host, cold)


def not_run(lines: list[Line]) -> str:
    """Sections of which no run came to its end."""
    ended = {line["section"] for line in lines if line["name"] == "end"}
    begun = {line["section"] for line in lines}
    missing = [
        f"- `{section}`: {'not finished' if section in begun else 'not run'}"
        for section in SECTIONS
        if section not in ended
    ]
    return "## Not run\n\n" + "\n".join(missing or ["Every section was run."])


def cpu_table(path: Path) -> str:
    lines = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    text = "\n".join("- " + ", ".join(f"{key} {value}" for key, value in line.items()) for line in lines)
    return f"## On a CPU: {path.stem}\n\n{text}"


def last(lines: list[Line], section: str, key: str) -> list[Line]:
    """The lines of a section that have `key`, the last one of each name."""
    found = {line["name"]: line for line in lines if line["section"] == section and key in line}
    return list(found.values())


def speed(line: Line, scale: float) -> list[str]:
    return [number(line["seconds"] * scale), f"{line['tflops']:.0f}", share(line.get("of_peak"))]


def heading(title: str, head: list[str], rows: list[list[str]]) -> str:
    return f"## {title}\n\n{table(head, rows)}" if rows else ""


def table(head: list[str], rows: Iterable[list[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows))


def number(value: float) -> str:
    """Three digits that count, without an exponent."""
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.1f}" if abs(value) >= 10 else f"{value:.3g}"


def share(value: float | None) -> str:
    return "" if value is None else f"{value:.1%}"


def gb(size: int | None) -> str:
    return "" if size is None else f"{size / GB:.1f}"


if __name__ == "__main__":
    main()
