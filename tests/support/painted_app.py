"""app.py as it is, over the engine that paints:  python tests/painted_app.py [flags of app.py]

Beside the outputs it leaves `routes.json`, every route that the server answers, and `painted.jsonl`, what ran when.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from importlib.util import module_from_spec, spec_from_file_location  # noqa: E402

from page_engine import Painter  # noqa: E402


@cache
def entry() -> ModuleType:
    """The module app.py; `import app` is the package beside it."""
    spec = spec_from_file_location("studio_entry", ROOT / "app.py")
    assert spec is not None and spec.loader is not None
    module = module_from_spec(spec)
    sys.modules["studio_entry"] = module
    spec.loader.exec_module(module)
    return module


def main() -> int:
    app = entry()
    folder = Path(os.environ["LIGHTX2V_OUTPUT_DIR"])
    folder.mkdir(parents=True, exist_ok=True)
    if "--demo" in sys.argv:
        sys.argv.remove("--demo")
    else:
        painter = Painter(log=folder / "painted.jsonl")
        app.open_engine = painter
        app.preload.start = lambda: None  # painting needs no torch
        sys.modules["lightx2v.pipeline"] = pipeline = ModuleType("lightx2v.pipeline")
        pipeline.LightX2VPipeline = SimpleNamespace(from_config=painter)  # type: ignore[attr-defined]
    launch = app.launch

    def launch_and_list(*args: Any, **kwargs: Any) -> Any:
        demo = launch(*args, **kwargs)
        (folder / "routes.json").write_text(json.dumps(list(routes_of(demo.app))))
        return demo

    app.launch = launch_and_list
    return app.main()


def routes_of(router: Any) -> Iterator[tuple[str, list[str]]]:
    """Path and methods of every route, those of included routers too."""
    for route in router.routes:
        if (inner := getattr(route, "original_router", None)) is not None:
            yield from routes_of(inner)
        else:
            yield route.path, sorted(getattr(route, "methods", None) or [])


if __name__ == "__main__":
    sys.exit(main())
