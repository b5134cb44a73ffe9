"""Write the tables that the presets decide into README.md, README_zh.md and docs/presets.md.

python scripts/readme_tables.py            write them
python scripts/readme_tables.py --check    change nothing; exit with 1 if a table is out of date
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from lightx2v.config.presets import list_presets, resolve  # noqa: E402
from lightx2v.config.request import Request  # noqa: E402
from lightx2v.cost.memory_forecast import Forecast, forecast_for_gpu  # noqa: E402
from lightx2v.cost.memory_plan import GIB  # noqa: E402

SIZES = (8, 12, 16, 24, 80)
"""GPUs of the memory table, in GB."""
CHOICES = (
    (8, "t2v_distill_gguf_q4", "i2v_distill_gguf_q4"),
    (12, "t2v_distill_fp8", "i2v_distill_fp8"),
    (24, "t2v_distill_fp8", "i2v_distill_fp8"),
    (48, "t2v_distill_fp8", "i2v_distill_fp8"),
    (80, "t2v_distill_merged", "i2v_distill_merged"),
)
"""GPU in GB, and the preset that suits it for each task: the least quantized one of four steps that needs no streaming,
or else the smallest one."""
HEADS = {
    "README.md": ("GPU", "text to video", "image to video", "GPU memory", "host memory", "none"),
    "README_zh.md": ("显卡", "文生视频", "图生视频", "显存", "内存", "无"),
}
BEGIN, END = "<!-- {}:begin (python scripts/readme_tables.py) -->", "<!-- {}:end -->"


def cards(readme: str) -> str:
    """One row for each size of GPU: a preset for each task, and the peak memory of both in GiB."""
    *head, none = HEADS[readme]
    rows = [[none, "`demo_t2v_distill_lora`", "`demo_i2v_distill_lora`", "–", "2"]]
    for size, *names in CHOICES:
        forecasts = [_forecast(name, size) for name in names]
        peaks = ", ".join(f"{max(each.plan.bytes.values()) / GIB:.0f}" for each in forecasts)
        host = max(each.host for each in forecasts) / GIB
        rows.append([f"{size} GB", *(f"`{name}`" for name in names), peaks, f"{host:.0f}" if host else "–"])
    return _table(head, rows)


def presets() -> str:
    rows = []
    for info in list_presets():
        request = resolve(info.name, {}).request
        size = f"{request['width']}x{request['height']}, {request['frames']}"
        steps = len(request["denoising_step_list"] or ()) or request["steps"]
        rows.append([f"`{info.name}`", info.title, size, str(steps)])
    return _table(["preset", "what it is", "size, frames", "steps"], rows)


def fits() -> str:
    """One row for all presets that need the same memory, without the variants for offload and several GPUs."""
    rows: dict[tuple[str, ...], list[str]] = {}
    for info in list_presets():
        if info.demo or info.offload or info.gpus > 1:
            continue
        forecasts = [_forecast(info.name, size) for size in SIZES]
        cells = [*map(_cell, forecasts), f"{max(each.host for each in forecasts) / GIB:.0f}"]
        rows.setdefault(tuple(cells), []).append(f"`{info.name}`")
    head = ["preset", *(f"{size} GB" for size in SIZES), "RAM"]
    return _table(head, [[", ".join(names), *cells] for cells, names in rows.items()])


def _forecast(preset: str, size: float) -> Forecast:
    resolved = resolve(preset)
    image = {} if resolved.engine.task == "t2v" else {"image_path": "x.png"}
    return forecast_for_gpu(resolved.engine, Request(prompt="x", **resolved.request | image), size)


def _cell(forecast: Forecast) -> str:
    word = {"resident": "", "swap": " swaps", "stream": " streams"}[forecast.plan.mode]
    return f"{max(forecast.plan.bytes.values()) / GIB:.1f}{word}" if forecast.fits else "–"


def _table(head: list[str], rows: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows))


def main() -> int:
    tables = {
        "README.md": {"cards": cards("README.md")},
        "README_zh.md": {"cards": cards("README_zh.md")},
        "docs/presets.md": {"presets": presets(), "fits": fits()},
    }
    stale = []
    for file, content in tables.items():
        path = ROOT / file
        text = new = path.read_text("utf-8")
        for name, table in content.items():
            begin, end = BEGIN.format(name), END.format(name)
            head, rest = new.split(begin)
            new = f"{head}{begin}\n{table}\n{end}{rest.split(end)[1]}"
        if new != text:
            stale.append(file)
            if "--check" not in sys.argv:
                path.write_text(new, "utf-8")
    if stale and "--check" in sys.argv:
        sys.stdout.write(f"out of date: {', '.join(stale)}; run python scripts/readme_tables.py\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
