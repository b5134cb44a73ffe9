"""The same as `streaming`, for 720p."""

from __future__ import annotations

from .bench import Bench
from .streaming import measure


def run(bench: Bench) -> None:
    measure(bench, "720p", rounds=2, forwards=1, text_too=False)
