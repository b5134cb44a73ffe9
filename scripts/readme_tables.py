"""Writes the tables of README.md and README_zh.md that the presets decide: python scripts/readme_tables.py

`--check` changes nothing and exits 1 where a table is out of date.
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from lightx2v.config import list_presets, resolve  # noqa: E402

HEADINGS = {
    "README.md": "| preset | what it is | size, frames | steps |",
    "README_zh.md": "| 预设 | 说明 | 尺寸、帧数 | 步数 |",
}
BEGIN, END = "<!-- presets:begin (python scripts/readme_tables.py) -->", "<!-- presets:end -->"


def table(heading: str) -> str:
    rows = []
    for info in list_presets():
        request = resolve(info.name, {}).request
        size = f"{request['width']}x{request['height']}, {request['frames']}"
        steps = len(request["denoising_step_list"] or ()) or request["steps"]
        rows.append(f"| `{info.name}` | {info.title} | {size} | {steps} |")
    return "\n".join([heading, "|---|---|---|---|", *rows])


def main() -> int:
    stale = []
    for name, heading in HEADINGS.items():
        path = ROOT / name
        text = path.read_text("utf-8")
        head, rest = text.split(BEGIN)
        new = f"{head}{BEGIN}\n{table(heading)}\n{END}{rest.split(END)[1]}"
        if new != text:
            stale.append(name)
            if "--check" not in sys.argv:
                path.write_text(new, "utf-8")
    if stale and "--check" in sys.argv:
        sys.stdout.write(f"out of date: {', '.join(stale)}; run python scripts/readme_tables.py\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
