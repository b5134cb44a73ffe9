"""Take screenshots of the page's main states into assets/screenshots:  make screenshots

Runs the page with the demo model in a process of its own and visits it with chromium. Every number in the pictures is
measured by that run. One run fails on purpose, to show the page's retry buttons.
"""

from __future__ import annotations

import argparse
import io
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from PIL import Image

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "support")]

from chromium import Person, browser, person  # noqa: E402
from studio_app import launched  # noqa: E402

PROMPTS = (
    "a red ball rolls left over green grass at night",
    "a pink heart grows over snow by day",
    "a yellow star spins over the sea at sunset",
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=ROOT / "assets" / "screenshots")
    parser.add_argument("--chromium", help="the browser's program; else LIGHTX2V_CHROMIUM, else the one on the PATH")
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as temporary:
        for name, picture in pictures(Path(temporary)):
            file = args.folder / f"{name}.webp"
            picture.save(file, quality=88, method=6)
            print(
                f"{file.relative_to(ROOT) if file.is_relative_to(ROOT) else file}  {file.stat().st_size / 1000:.0f} kB"
            )
    return 0


def pictures(folder: Path) -> Iterator[tuple[str, Image.Image]]:
    """(name, picture) of every state, in the order in which a visitor meets them."""
    with launched(folder / "outputs", demo=True) as page, browser() as chrome:
        with visit(chrome, page, color_scheme="light") as visitor:
            yield "start", shot(visitor)
            for prompt in PROMPTS:
                make(visitor, prompt)
            yield "finished", shot(visitor)
            visitor.tab.click("#preset-button")
            yield "presets", shot(visitor)
            visitor.tab.keyboard.press("Escape")
            pick(visitor, "demo_t2v_base")
            visitor.tab.fill("#prompt textarea", PROMPTS[2])
            visitor.tab.click("#advanced button")
            visitor.tab.fill("#steps input", "120")  # long enough to be seen on the way
            visitor.tab.click("#advanced button >> nth=0")
            visitor.tab.click("#generate")
            visitor.settle("() => /step [3-9]\\d /.test(document.querySelector('.stage .tag')?.innerText)")
            visitor.tab.evaluate("scrollTo(0, 0)")
            yield "running", shot(visitor)
            visitor.see("done")
            cookies = visitor.tab.context.storage_state()
        with visit(chrome, page, color_scheme="dark", storage_state=cookies) as visitor:
            visitor.see("done")
            visitor.tab.wait_for_timeout(4000)  # the player's controls fade
            yield "finished_dark", shot(visitor)
            for place in (1, 2):
                visitor.tab.hover(f"#history .run:nth-child({place})")
                visitor.tab.click(f"#history .run:nth-child({place}) [data-act=compare]")
                visitor.tab.wait_for_selector(f"#history .run:nth-child({place}).compared")
            visitor.tab.click("#tabs [role=tab]:nth-of-type(2)")
            visitor.tab.click("#compared [data-act=play]")
            visitor.settle("() => [...document.querySelectorAll('.compare video')].every(v => v.currentTime > 0.4)")
            visitor.settle("() => !document.querySelector('.toast-body')")
            yield "compare_dark", shot(visitor)
        with visit(chrome, page, color_scheme="dark", width=390, height=844, storage_state=cookies) as visitor:
            visitor.tab.evaluate("document.querySelector('#theatre').scrollIntoView()")
            yield "phone_dark", shot(visitor)
    with launched(folder / "failing") as page, browser() as chrome:
        with visit(chrome, page, color_scheme="light") as visitor:
            make(visitor, "a video that is too large for the memory", state="failed")
            yield "failed", shot(visitor)


@contextmanager
def visit(chrome: Any, page: Any, **options: Any) -> Iterator[Person]:
    with person(chrome, page, device_scale_factor=1, **options) as visitor:
        yield visitor


def make(visitor: Person, prompt: str, state: str = "done") -> None:
    """One run to its end, and its report."""
    before = visitor.job
    visitor.make(prompt)
    visitor.settle(
        "([before, state]) => { const s = document.querySelector('#stage .stage');"
        " return s && s.dataset.job !== before && s.dataset.state === state; }",
        [before, state],
    )
    if state == "done":
        visitor.tab.wait_for_selector(f"#history [data-id='{visitor.job}'] img")


def pick(visitor: Person, preset: str) -> None:
    visitor.tab.click("#preset-button")
    visitor.tab.click(f"#option-{preset}")
    visitor.tab.wait_for_selector(f"#option-{preset}[aria-selected=true]", state="attached")


def shot(visitor: Person) -> Image.Image:
    """What is on the screen, once everything on it has been drawn."""
    visitor.settle("() => [...document.images].every(i => i.complete)")
    visitor.settle("() => [...document.querySelectorAll('video')].every(v => v.readyState >= 2)")
    return Image.open(io.BytesIO(visitor.tab.screenshot(animations="disabled"))).convert("RGB")


if __name__ == "__main__":
    sys.exit(main())
