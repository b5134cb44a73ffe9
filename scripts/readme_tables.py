"""Writes the tables of README.md and README_zh.md that the presets decide: python scripts/readme_tables.py

`--check` changes nothing and exits 1 where a table is out of date.
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

CARDS = (12, 16, 24, 80)
PRESETS = {
    "README.md": "| preset | what it is | size, frames | steps |",
    "README_zh.md": "| 预设 | 说明 | 尺寸、帧数 | 步数 |",
}
FITS = {
    "README.md": ("| preset |", "RAM", {"resident": "", "swap": " swaps", "stream": " streams"}),
    "README_zh.md": ("| 预设 |", "内存", {"resident": "", "swap": " 交换", "stream": " 流式"}),
}
BEGIN, END = "<!-- {}:begin (python scripts/readme_tables.py) -->", "<!-- {}:end -->"


def presets(readme: str) -> str:
    rows = []
    for info in list_presets():
        request = resolve(info.name, {}).request
        size = f"{request['width']}x{request['height']}, {request['frames']}"
        steps = len(request["denoising_step_list"] or ()) or request["steps"]
        rows.append(f"| `{info.name}` | {info.title} | {size} | {steps} |")
    return "\n".join([PRESETS[readme], "|---|---|---|---|", *rows])


def fits(readme: str) -> str:
    """One row for all presets that take the same; of offload and several GPUs there is nothing else to say."""
    first, ram, words = FITS[readme]
    rows: dict[str, list[str]] = {}
    for info in list_presets():
        if info.demo or info.offload or info.gpus > 1:
            continue
        resolved = resolve(info.name)
        request = Request(prompt="x", **resolved.request | ({} if info.task == "t2v" else {"image_path": "x.png"}))
        found = [forecast_for_gpu(resolved.engine, request, card) for card in CARDS]
        cells = [_cell(each, words) for each in found] + [f"{max(each.host for each in found) / GIB:.0f}"]
        rows.setdefault(" | ".join(cells), []).append(f"`{info.name}`")
    head = first + "".join(f" {card} GB |" for card in CARDS) + f" {ram} |"
    return "\n".join([head, "|---" * (len(CARDS) + 2) + "|", *(f"| {', '.join(n)} | {c} |" for c, n in rows.items())])


def _cell(found: Forecast, words: dict[str, str]) -> str:
    return f"{max(found.plan.bytes.values()) / GIB:.1f}{words[found.plan.mode]}" if found.fits else "–"


def main() -> int:
    stale = []
    for readme in PRESETS:
        path = ROOT / readme
        text = new = path.read_text("utf-8")
        for name, table in (("presets", presets), ("fits", fits)):
            begin, end = BEGIN.format(name), END.format(name)
            head, rest = new.split(begin)
            new = f"{head}{begin}\n{table(readme)}\n{end}{rest.split(end)[1]}"
        if new != text:
            stale.append(readme)
            if "--check" not in sys.argv:
                path.write_text(new, "utf-8")
    if stale and "--check" in sys.argv:
        sys.stdout.write(f"out of date: {', '.join(stale)}; run python scripts/readme_tables.py\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
