"""preset_list: the presets as a table of text: what each is for, and its seconds on this machine."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..config.presets import list_presets, list_user_presets, resolve
from ..config.request import IMAGES, Request
from ..cost.machine import MachineReader
from .run_times import RunTimes


def preset_lines(folder: Path) -> Iterator[str]:
    """One line for each preset. `folder` has the times that runs of the page or the server have measured."""
    times, device = RunTimes(folder / "rates.json"), MachineReader()().name
    for info in (*list_presets(), *list_user_presets()):
        resolved, seconds = resolve(info.name), None
        if info.gpus == 1:  # nothing measures several here
            shown: dict[str, Any] = dict.fromkeys(("prompt", *IMAGES[resolved.engine.task]), "…")
            request = Request(**resolved.request, **shown)
            seconds = times.seconds(resolved.engine, request, device=device, loaded=True)
        yield f"{info.name:<32} {info.aim:<8} {_about(seconds):>8}  {info.title}"


def _about(seconds: float | None) -> str:
    if seconds is None:
        return "–"
    unit, name = next((each for each in ((3600, "h"), (60, "min")) if seconds >= 2 * each[0]), (1, "s"))
    return f"{seconds / unit:.{0 if seconds / unit >= 10 else 1}f} {name}"
