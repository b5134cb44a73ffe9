"""A really launched page over the painting engine, for tests and pictures."""

from __future__ import annotations

import asyncio
import importlib.util
import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

from page_engine import Painter

from app.exposure import Exposure
from app.studio import Studio

ROOT = Path(__file__).parents[1]


def entry() -> ModuleType:
    """The module app.py; `import app` is the package beside it."""
    if "studio_entry" not in sys.modules:
        spec = importlib.util.spec_from_file_location("studio_entry", ROOT / "app.py")
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules["studio_entry"] = module
        spec.loader.exec_module(module)
    return sys.modules["studio_entry"]


@dataclass(frozen=True)
class Running:
    url: str
    studio: Studio
    painter: Painter
    demo: Any


@contextmanager
def running(folder: Path, painter: Painter | None = None, exposure: Exposure | None = None) -> Iterator[Running]:
    """The page on a free port of this machine, until the block ends. Environment variables are put back."""
    painter = painter or Painter()
    port = free_port()
    hosts = frozenset({"127.0.0.1", "localhost"})
    exposure = replace(exposure or Exposure(hosts=hosts), host="127.0.0.1", port=port)
    before = dict(os.environ)
    app = entry()
    app.prepare_environment(folder)
    studio = Studio(painter, folder, exposure)
    # gradio makes an event loop where a thread has none, and leaves it open; so it gets one that is closed here.
    loop = asyncio.new_event_loop()
    asyncio.set_event_loop(loop)
    demo = app.launch(studio)
    try:
        yield Running(url=f"http://127.0.0.1:{port}", studio=studio, painter=painter, demo=demo)
    finally:
        demo.close(verbose=False)
        studio.close()
        asyncio.set_event_loop(None)
        loop.close()
        os.environ.clear()
        os.environ.update(before)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
