"""The page's command line over the engine that paints:  python tests/support/painted_app.py [flags of app.py]

Beside the outputs it leaves `routes.json`, every route that the page answers, and `painted.jsonl`, a log of the runs.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from page_engine import Painter  # noqa: E402

from app import main as studio  # noqa: E402


def main() -> int:
    folder = Path(os.environ["LIGHTX2V_OUTPUT_DIR"])
    folder.mkdir(parents=True, exist_ok=True)
    if "--demo" in sys.argv:
        sys.argv.remove("--demo")
    else:
        painter = Painter(log=folder / "painted.jsonl")
        studio.open_engine = painter
        studio.preload.start = lambda: None  # painting needs no torch
        sys.modules["lightx2v.pipeline"] = ModuleType("lightx2v.pipeline")  # nothing may import the real one
    launch = studio.launch

    def launch_and_list(*args: Any, **kwargs: Any) -> Any:
        demo = launch(*args, **kwargs)
        (folder / "routes.json").write_text(json.dumps(list(routes_of(demo.app))))
        return demo

    studio.launch = launch_and_list
    return studio.main()


def routes_of(router: Any) -> Iterator[tuple[str, list[str]]]:
    """Path and methods of every route, including those of nested routers."""
    for route in router.routes:
        if (inner := getattr(route, "original_router", None)) is not None:
            yield from routes_of(inner)
        else:
            yield route.path, sorted(getattr(route, "methods", None) or [])


if __name__ == "__main__":
    sys.exit(main())
