"""Scaling: how many replicas the waiting jobs need."""

import math
from dataclasses import dataclass

MORE_SECONDS = 60.0
"""Predicted seconds until the last waiting job starts above which more replicas are worth their start."""
IDLE_SECONDS = 300.0
"""Seconds without a job after which a replica is given back."""


@dataclass(slots=True)
class Scaling:
    """From `low` to `high` replicas. `wanted` is the number now."""

    low: int
    high: int
    wanted: int = 0

    def __post_init__(self) -> None:
        self.wanted = self.low

    def update(self, backlog: float, working: int, longest_idle: float) -> int:
        """`backlog`: predicted seconds until the last queued job starts on the `working` replicas, infinite where that
        cannot be said; `longest_idle`: seconds since the end of the last job of the replica that has been idle for
        longest. It grows at once to what the backlog needs, and shrinks one by one."""
        if MORE_SECONDS < backlog < math.inf:
            self.wanted = max(self.wanted, min(self.high, math.ceil(working * backlog / MORE_SECONDS)))
        elif backlog == 0 and longest_idle > IDLE_SECONDS and self.wanted > self.low:
            self.wanted -= 1
        return self.wanted
