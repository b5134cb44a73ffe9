"""The same as `offload`, with 8-bit weights."""

from __future__ import annotations

from .bench import Bench
from .offload import measure


def run(bench: Bench) -> None:
    measure(bench, fp8=True)
