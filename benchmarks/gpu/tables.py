"""Write docs/performance.md from the results: `python -m benchmarks.gpu.tables`. It lists what was not run, too.

If a measurement was repeated, its last run counts.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from .__main__ import RESULTS, SECTIONS

PAGE = Path("docs/performance.md")
REMARKS = Path("benchmarks/results/remarks.md")
"""The results in short and what they mean, written by hand; they open the page."""
METHOD = Path("benchmarks/results/method.md")
"""How the numbers were measured, written by hand; it follows the table of runs, after all results."""

Line = dict[str, Any]
GB = 1e9


def main() -> None:
    lines = [json.loads(line) for line in RESULTS.read_text("utf-8").splitlines()]
    cpu = sorted(RESULTS.parent.glob("cpu*.jsonl"))
    remarks, method = REMARKS.read_text("utf-8"), METHOD.read_text("utf-8")
    PAGE.write_text(page(lines, remarks, method, cpu), encoding="utf-8")
    sys.stdout.write(f"{PAGE}\n")


def page(lines: list[Line], remarks: str = "", method: str = "", cpu: Iterable[Path] = ()) -> str:
    lines = [line for line in lines if not line.get("tiny")]
    parts = [
        "# Measured performance",
        "Made by `python -m benchmarks.gpu.tables` from `benchmarks/results/`; do not edit. Full-size models of "
        "Wan2.2-A14B with random weights, batch 1, one prompt and no guidance unless a table says otherwise. 480p is "
        "832x480 and 720p is 1280x720, 81 frames each.",
        remarks.strip(),
        *(text for part in PARTS if (text := part(lines))),
        runs(lines),
        method.strip(),
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
    return "## How it was measured\n\n" + table(
        ["from (UTC)", "commit", "device", "torch", "CUDA", "cuDNN", "Triton", "Python"], table_rows
    )


def attention(lines: list[Line]) -> str:
    """Uses the newest run alone: a GPU's clock differs from day to day."""
    starts = [n for n, line in enumerate(lines) if (line["section"], line["name"]) == ("attention", "start")]
    found = last(lines[starts[-1] :] if starts else [], "attention", "kernel")
    rows = [
        [
            thousands(line["tokens"]),
            line["kernel"],
            *speed(line, 1e3),
            f"{line['error']:.1e}",
            *(f"{line[key]:.0f}" if key in line else "" for key in ("clock_mhz", "watts")),
        ]
        for line in sorted(found, key=lambda line: line["tokens"])
        if "seconds" in line
    ]
    head = ["tokens", "kernel", "ms", "TFLOP/s", "of the peak", "error to float32", "MHz", "W"]
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
        [
            line["clip"],
            line["linears"],
            line.get("attention", "cudnn"),
            line["steps"],
            *speed(line, 1),
            gb(line.get("peak_allocated")),
            number(line["first"]) if "first" in line else "",
        ]
        for line in found
    ]
    head = ["video", "linear layers", "attention", "element-wise steps", "s", "TFLOP/s", "of the peak"]
    return heading(
        "One forward of an expert, 40 blocks", [*head, "peak GB allocated", "the first one in its process, s"], rows
    )


def inexact(lines: list[Line]) -> str:
    """What attention that is not exact costs in error, and saves in time."""
    kernels = [line for line in last(lines, "inexact", "values") if not line["order"] or "sol_attn" in line["way"]]
    times = {(line["clip"], line["way"]): line["seconds"] for line in kernels if "seconds" in line}
    rows = [
        [
            line["clip"],
            line["way"].replace("auto", "flash_attn3, exact"),
            line["order"] or ("as they lie" if "sol_attn" in line["way"] else ""),
            number(times[line["clip"], line["way"]] * 1e3) if (line["clip"], line["way"]) in times else "",
            *(
                error(each["error"])
                for values in ("random", "like a video")
                for each in kernels
                if (each["clip"], each["way"], each["order"], each["values"])
                == (line["clip"], line["way"], line["order"], values)
            ),
        ]
        for line in kernels
        if line["values"] == "random"
    ]
    head = ["video", "attention", "order of tokens", "ms", "error on random values", "on values like a video"]
    text = heading("Attention that is not exact", head, rows)
    if not text:
        return ""
    parts = [[line["clip"], line["part"], number(line["seconds"] * 1e3)] for line in last(lines, "inexact", "part")]
    text += "\n\nErrors are relative to float32. The parts of `flash_attn3_fp8`:\n\n" + table(
        ["video", "part", "ms"], parts
    )
    found = last(lines, "inexact", "linears")
    exact = {(line["clip"], line["linears"]): line["seconds"] for line in found if line["way"] == "auto"}
    forwards = [
        [
            line["clip"],
            line["linears"],
            line["way"].replace("auto", "flash_attn3, exact"),
            number(line["seconds"]),
            f"{exact[line['clip'], line['linears']] / line['seconds']:.2f}",
            error(line["error"]) if line["error"] else "",
            gb(line.get("peak_allocated")),
        ]
        for line in found
    ]
    head = ["video", "linear layers", "attention", "s", "times as fast", "velocity off by", "peak GB allocated"]
    text += "\n\nOne forward of an expert, 40 blocks; the first of them is exact with `sol_attn`:\n\n" + table(
        head, forwards
    )
    whole = last(lines, "inexact", "total")
    first = {line["clip"]: line["total"] for line in whole if line["way"] == "auto"}
    rows = [
        [
            line["clip"],
            line["way"].replace("auto", "flash_attn3, exact"),
            number(line["total"]),
            f"{first[line['clip']] / line['total']:.2f}",
            *(number(line["stages"][stage]) for stage in ("denoise", "decode")),
            error(line["error"]) if line["error"] else "",
        ]
        for line in whole
    ]
    head = ["video", "attention", "s", "times as fast", "denoise", "decode", "latents off by"]
    return text + "\n\nImage to video in 4 steps, warm, from the prompt to the frames:\n\n" + table(head, rows)


def versus(lines: list[Line]) -> str:
    rows = []
    for line in last(lines, "versus", "ratio"):
        clip = {found["who"]: found for found in last(lines, "versus", "who") if found["clip"] == line["clip"]}
        ours, theirs = clip["ours"], clip[line["way"]]
        rows += [
            [
                line["clip"],
                line["way"],
                *(number(each["seconds"]) for each in (theirs, ours)),
                f"{line['ratio']:.3f}",
                f"{line['least']:.3f} to {line['most']:.3f}",
                f"{line['repeats']}",
                *(gb(each.get("peak_allocated")) for each in (theirs, ours)),
                f"{line['difference']:.1e}",
            ]
        ]
    head = ["video", "diffusers with", "diffusers s", "ours s", "ratio", "from round to round", "rounds"]
    text = heading(
        "Against diffusers: one forward, bf16", [*head, "diffusers peak GB", "ours peak GB", "outputs differ by"], rows
    )
    return text and text + (
        "\n\nOurs over theirs, in turns in one process, on the same weights; ours with cuDNN's attention."
    )


def magcache(lines: list[Line]) -> str:
    runs = last(lines, "magcache", "way")
    faster = {(line["task"], line["what"]): line for line in last(lines, "magcache", "what")}
    rows = []
    for line in runs:
        ratios = (faster[line["task"], what] for what in ("denoise", "total"))
        rows.append(
            [
                line["task"],
                line["way"],
                f"{line['computed']} of {line['computed'] + line['skipped']}",
                *(number(line[what]) for what in ("denoise", "total")),
                gb(line["peak"]),
                *(f"{each['ratio']:.2f}" if line["way"] != "exact" else "" for each in ratios),
            ]
        )
    head = ["task", "caching", "forwards computed", "denoising s", "whole run s", "peak GB allocated"]
    head += ["denoising, times faster", "whole run, times faster"]
    text = heading("MagCache: whole runs of 40 steps at 480p", head, rows)
    costs = [[line["clip"], f"{line['ratio'] - 1:+.2%}"] for line in last(lines, "magcache", "without")]
    layers = runs[0]["layers"] if runs else 0
    return text and text + (
        f"\n\nIn turns in one process, with {layers} of an expert's 40 blocks: what a skipped forward still runs "
        "weighs more beside fewer blocks, so whole experts gain at least this. The numbers are the authors'.\n\n"
        "What NAG adds to a forward without guidance, in turns with one that has none:\n\n"
        + table(["video", "time"], costs)
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
            line.get("attention", "cudnn"),
            number(line["total"]),
            *(number(line["stages"][stage]) for stage in ("text", "denoise", "decode")),
            share(line.get("denoise_over_resident")),
            number(line["switch_stall"] * 1e3) if "switch_stall" in line else "",
            number(line["exposed"]["experts"] * 1e3) if "exposed" in line else "",
            *(gb(line["peaks"][stage]) for stage in ("text", "denoise", "decode")),
        ]
        for line in found
        if "peaks" in line
    ]
    head = [
        "weights",
        "attention",
        "s",
        "text",
        "denoise",
        "decode",
        "denoise over resident",
        "switch stall ms",
        "waited for experts, ms",
    ]
    text = heading("Whole warm runs: text to video, 480p, 4 steps", [*head, "peak GB text", "denoise", "decode"], rows)
    if not text:
        return ""
    text += (
        "\n\nThe second run of each, without writing the mp4. Peaks count tensors only. Events on the computation's "
        "stream measure how long it waited for copies of the experts.\n\n"
    )
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


def _compared(line: Line) -> list[str]:
    """One way of a forward: its seconds, and their ratio to the reference of the same rounds."""
    return [
        line["clip"],
        line["way"],
        line["attention"],
        number(line["seconds"]),
        f"{line['ratio'] - 1:+.2%}",
        f"{line['least'] - 1:+.2%} to {line['most'] - 1:+.2%}",
    ]


def streaming(lines: list[Line]) -> str:
    rows = [
        [*_compared(line), number(line["waited"] * 1e3) if "waited" in line else ""]
        for section in ("streaming", "streaming_720p")
        for line in last(lines, section, "way")
    ]
    head = ["video", "of 40 blocks", "attention", "s", "over all blocks kept", "from round to round", "waited, ms"]
    text = heading("Streaming in bf16: one forward, its blocks from host memory", head, rows)
    return text and text + (
        "\n\nAll ways ran in turns in one process, so that they meet the same GPU clock. Events on the computation's "
        "stream measure how long it waited for copies."
    )


def gguf(lines: list[Line]) -> str:
    rows = [_compared(line) for line in last(lines, "gguf", "way")]
    head = ["video", "weights", "attention", "s", "over bf16", "from round to round"]
    text = heading("GGUF weights: one forward, 40 blocks", head, rows)
    kernels = [
        [line["form"], number(line["expert_seconds"] * 1e3), "yes" if line["same"] else "no"]
        for line in last(lines, "gguf", "form")
    ]
    return text and text + (
        "\n\nAll ways ran in turns in one process (`python -m benchmarks.gpu --sections gguf`). Streamed: no block is "
        "kept on the GPU. The LoRA has rank 64, in float32, on every matrix; it is added to the dequantised weights."
        "\n\nDequantising the 14 billion weights of an expert to bf16:\n\n"
        + table(["format", "ms", "the bits of the plain function"], kernels)
    )


def host(lines: list[Line]) -> str:
    sections = ("host", "offload", "offload_fp8")
    rows = [
        [
            line["name"],
            number(line["gbytes_per_second"]),
            number(statistics.median(line["rates"])) if "rates" in line else "",
            number(line["host_waited"] * 1e3) if "host_waited" in line else "",
        ]
        for section in sections
        for line in last(lines, section, "gbytes_per_second")
    ]
    head = ["from", "GB/s", "median of many", "the host waits, ms"]
    return heading("Copies of about 0.7 GB (FP8: 0.35 GB) to the device", head, rows)


TUTORIAL = {
    "t2v_base": (823.5, 78940),
    "t2v_base_offload": (839.8, 51894),
    "t2v_distill_lora": (43.4, 71810),
    "t2v_distill_lora_offload": (65.0, 44640),
    "i2v_base": (430.0, 79058),
    "i2v_base_offload": (477.6, 43666),
    "i2v_distill_lora": (75.1, 77228),
    "i2v_distill_lora_offload": (100.3, 34426),
    "i2v_distill_merged": (67.0, 79108),
    "i2v_distill_merged_offload": (88.4, 34426),
    "i2v_distill_fp8": (57.1, 47274),
    "i2v_distill_fp8_offload": (69.0, 29250),
}
"""LightX2V's tutorial for one H100: seconds with loading, MiB by nvidia-smi."""


def presets(lines: list[Line]) -> str:
    """One row per preset, followed by its runs at other sizes or on several GPUs, which the tutorial does not have."""
    found = {line["name"]: line for line in last(lines, "presets", "stages")}
    cold_runs = [line for name, line in found.items() if name.endswith(", cold")]
    rows = []
    order = list(TUTORIAL)
    for cold in sorted(cold_runs, key=lambda line: (order.index(line["preset"]), line.get("where", ""))):
        preset, where = cold["preset"], cold.get("where", "")
        warm = found.get(f"{preset}{where}, warm")
        shown = [number(cold["seconds"]), number(cold["load"]), number(cold["total"])]
        shown += [number(warm["seconds"]) if warm else "", thousands(int(cold["smi_mib"])) if "smi_mib" in cold else ""]
        allocated = max(peak["allocated"] for peak in cold["peaks"].values()) if cold["peaks"] else None
        steps = f"{cold['steps']} of 40" if "base" in preset and cold["steps"] < 40 else f"{cold['steps']}"
        steps += f" of {statistics.median(cold['steps_seconds']):.2f} s"
        waited = number(cold["exposed"]["experts"] * 1e3) if "experts" in (cold.get("exposed") or {}) else ""
        seconds, mib = TUTORIAL[preset]
        tutorial = ["", ""] if where else [number(seconds), thousands(mib)]
        device = cold["device"].split()[1]
        named = [f"{preset}{where}", device, cold["clip"]]
        rows.append([*named, *shown, gb(allocated), cold.get("mode") or "", steps, waited, *tutorial])
    head = ["preset", "on", "video", "cold s", "of which loading", "its run", "warm s", "nvidia-smi MiB", "tensors GB"]
    head += ["experts", "steps", "waited for experts, ms", "tutorial s", "tutorial MiB"]
    return heading("The presets, whole", head, rows)


def demo(lines: list[Line]) -> str:
    rows = [
        [line["preset"], line["device"].split()[1], line["dtype"], error(line["error"])]
        for line in last(lines, "demo", "error")
    ]
    head = ["preset", "on", "precision", "off by"]
    return heading("The demo model's latents against those of a CPU in float32", head, rows)


def parallel(lines: list[Line]) -> str:
    """All measurements with several GPUs."""
    alone = {
        (line["clip"], line.get("coder")): line["seconds"]
        for line in last(lines, "parallel", "layout")
        if line["layout"] == "alone"
    }

    def in_order(line: Line) -> tuple[str, int]:
        return line["clip"], 0 if line["layout"] == "alone" else line["gpus"]

    def efficiency(line: Line) -> str:
        one = alone.get((line["clip"], line.get("coder")))
        if one is None or line["layout"] == "alone":
            return ""
        return share(line.get("branches", 1) * one / line["gpus"] / line["seconds"])

    sped = [
        [
            line["clip"],
            "1" if line["layout"] == "alone" else f"{line['gpus']}",
            line["layout"],
            f"{line['branches']}",
            number(line["seconds"]),
            efficiency(line),
            *(share(line[part] / line["seconds"]) if part in line else "" for part in ("exchange", "packing")),
            gb(line.get("swapped")),
            gb(line.get("peak_allocated")),
        ]
        for line in sorted(last(lines, "parallel", "branches"), key=in_order)
    ]
    head = ["video", "GPUs", "layout", "prompts", "s", "efficiency", "exchanges", "packing", "GB sent", "peak GB"]
    text = heading("Several GPUs: one step of an expert, 40 blocks, bf16", head, sped)
    if not text:
        return ""
    devices = " and ".join(sorted({line["device"] for line in lines if line["section"] == "parallel"}))
    text += (
        f"\n\nOn {devices}. "
        "A layout is guidance branches x parts of the sequence. Efficiency is that against the same prompts one "
        "after another on one GPU. Exchanges and packing are shares of the time; waiting for the other processes is in "
        "them. GB sent are of one process, all-to-all alone."
    )
    coded = [
        [
            line["clip"],
            line["coder"],
            "1" if line["layout"] == "alone" else f"{line['gpus']}",
            line["layout"],
            number(line["seconds"]),
            efficiency(line),
        ]
        for line in sorted(last(lines, "parallel", "coder"), key=in_order)
    ]
    text += "\n\nThe VAE, bf16:\n\n" + table(["video", "what", "GPUs", "how", "s", "efficiency"], coded)
    loaded = [
        [f"{line['gpus']}", line["way"], gb(line["bytes"]), number(line["seconds"]), number(line["gbytes_per_second"])]
        for line in last(lines, "parallel", "way")
    ]
    text += "\n\nLoading, the file in the page cache:\n\n" + table(["GPUs", "who reads", "GB", "s", "GB/s"], loaded)
    checked = [
        [
            line["what"],
            f"{line['gpus']}",
            line["layout"],
            line.get("dtype", ""),
            error(line.get("error")),
            error(line.get("largest_difference")),
            f"{line['levels']}" if "levels" in line else "",
            *(error(line.get(key)) for key in ("alone_to_float32", "to_float32")),
        ]
        for line in last(lines, "parallel", "what")
    ]
    head = ["what", "GPUs", "layout", "precision", "error", "largest difference", "levels of 255"]
    text += "\n\nAgainst one GPU; errors are relative, |difference| / |reference|:\n\n"
    text += table([*head, "one GPU to float32", "several to float32"], checked)
    killed = [
        [line["name"], number(line["seconds"]), f"{line['code']}", f"{line['left']}", "; ".join(line["told"])]
        for line in last(lines, "parallel", "work")
    ]
    text += "\n\nOne of two processes is killed while it denoises:\n\n"
    return text + table(["what", "s until all have ended", "exit code", "processes left", "told"], killed)


PARTS: tuple[Callable[[list[Line]], str], ...] = (
    attention,
    block,
    forward,
    inexact,
    versus,
    magcache,
    presets,
    coders,
    offload,
    streaming,
    gguf,
    host,
    demo,
    parallel,
)


def not_run(lines: list[Line]) -> str:
    """Sections and presets without a finished run."""
    ended = {line["section"] for line in lines if line["name"] == "end"}
    begun = {line["section"] for line in lines}
    found = {line["preset"] for line in last(lines, "presets", "stages") if not line.get("where")}
    without = ", ".join(f"`{preset}`" for preset in TUTORIAL if preset not in found)
    if not without:  # they may have been run a few at a time
        ended.add("presets")
    missing = [
        f"- `{section}`: {'not finished' if section in begun else 'not run'}"
        for section in SECTIONS
        if section not in ended
    ]
    missing = [f"{each}; without {without}" if found and "`presets`" in each else each for each in missing]
    cut = {line["preset"]: line["steps"] for line in last(lines, "presets", "stages") if not line.get("where")}
    missing += [
        f"- all steps of `{name}`: {steps} of 40" for name, steps in cut.items() if "base" in name and steps < 40
    ]
    return "## Not run\n\n" + "\n".join(missing or ["Every section was run."])


def cpu_table(path: Path) -> str:
    lines = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    text = "\n".join("- " + ", ".join(f"{key} {value}" for key, value in line.items()) for line in lines)
    return f"## On a CPU: {path.stem}\n\n{text}"


def last(lines: list[Line], section: str, key: str) -> list[Line]:
    """The last line of each name in a section, among lines that have `key`."""
    found = {line["name"]: line for line in lines if line["section"] == section and key in line}
    return list(found.values())


def speed(line: Line, scale: float) -> list[str]:
    return [number(line["seconds"] * scale), f"{line['tflops']:.0f}", share(line.get("of_peak"))]


def heading(title: str, head: list[str], rows: list[list[str]]) -> str:
    return f"## {title}\n\n{table(head, rows)}" if rows else ""


def table(head: list[str], rows: Iterable[list[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows))


def thousands(value: int) -> str:
    return f"{value:,}".replace(",", " ")


def number(value: float) -> str:
    """Three significant digits, without an exponent."""
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.1f}" if abs(value) >= 10 else f"{value:.3g}"


def share(value: float | None) -> str:
    return "" if value is None else f"{value:.1%}"


def error(value: float | None) -> str:
    return "" if value is None else f"{value:.1e}"


def gb(size: int | None) -> str:
    return "" if size is None else f"{size / GB:.1f}"


if __name__ == "__main__":
    main()
