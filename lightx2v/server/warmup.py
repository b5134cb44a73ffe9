"""A very short first run, so that no client waits while the engine compiles kernels and tries algorithms."""

from __future__ import annotations

import logging
import tempfile
from pathlib import Path

from ..config.presets import Resolved
from ..config.request import Request
from ..jobs.engine_slot import Engine
from ..progress import CancelToken, OnProgress

log = logging.getLogger("lightx2v.server")


def warm_up(engine: Engine, resolved: Resolved, on_progress: OnProgress, cancel: CancelToken) -> None:
    """Run five frames in the preset's size, with both experts."""
    from PIL import Image

    with tempfile.TemporaryDirectory(prefix="lightx2v-") as folder:
        settings = {**resolved.request, "frames": 5, "steps": 2, "seed": 0}
        if (steps := settings["denoising_step_list"]) is not None and len(steps) > 1:
            settings |= {"denoising_step_list": (steps[0], steps[-1]), "boundary_step_index": 1}
        if resolved.engine.task != "t2v":
            image = Path(folder) / "grey.png"
            Image.new("RGB", (settings["width"], settings["height"]), "grey").save(image)
            settings |= {"task": "i2v", "image_path": str(image)}
        request = Request(prompt="warm-up", **settings)
        log.info("Warming up")
        engine.run(request, save_result_path=Path(folder) / "warm.mp4", on_progress=on_progress, cancel=cancel)
