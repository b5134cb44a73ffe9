"""MagCache: which forwards of a run are skipped. A pure function of a Request, known before the run, without torch.

A forward is one prompt through one expert in one step. A skipped one adds what all blocks added last time, r, in place
of running them: the embeddings and the head still run. The table of a model says how much the length of r changes with
each step. From that follow the error of a skip and, while it stays small, the skips (arXiv 2506.09045). No number of
the run itself counts, so the cost is exact in advance and several processes need not agree on anything.
"""

from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import groupby

from . import magcache_tables
from .phases import Expert
from .request import Request
from .schedule import Schedule, schedule_of

AUTHORS = {"t2v": (0.06, 2, 0.4), "i2v": (0.06, 2, 0.1)}
"""The authors' threshold, K and retention ratio for Wan2.2-A14B. First-last-frame video is made like I2V."""
LIMITS = ((2, 1.0), (4, 0.2), (6, 0.2))
"""K, and the largest retention ratio beside it, that a speed-up may use: those of the authors, of SGLang and of
LightX2V, from the mildest. Only where one does not reach the speed-up, the next is tried."""
THRESHOLDS = tuple(round(0.005 * n, 3) for n in range(1, 401))
"""The thresholds among which a speed-up takes the smallest that reaches it."""


@dataclass(frozen=True, slots=True)
class Forwards:
    """`runs[step][branch]`: whether the blocks run for the prompt (branch 0) and, with guidance, the negative one."""

    runs: tuple[tuple[bool, ...], ...]

    @property
    def computed(self) -> int:
        return sum(map(sum, self.runs))

    @property
    def total(self) -> int:
        return sum(map(len, self.runs))

    @property
    def skipped(self) -> int:
        return self.total - self.computed

    @property
    def summary(self) -> str:
        return f"{self.skipped} of {self.total} evaluations skipped" if self.skipped else ""

    def work(self, steps: int) -> tuple[int, int]:
        """The forwards to compute in the first `steps` steps, and in all: what time goes with."""
        return sum(map(sum, self.runs[:steps])), self.computed

    def reused(self, step: int) -> tuple[int, ...]:
        """The branches whose next forward is skipped, so that it needs what the blocks add in this step."""
        following = self.runs[step + 1] if step + 1 < len(self.runs) else ()
        return tuple(branch for branch, runs in enumerate(following) if not runs)

    def to_json(self) -> dict[str, int]:
        return {"computed": self.computed, "skipped": self.skipped}


@dataclass(frozen=True, slots=True, kw_only=True)
class MagCache:
    """`ratios` has a table for each branch, of any number of steps. `high`: whether the high-noise expert may skip.

    The first `retention` of each expert's forwards are never skipped, nor more than `K` in a row. `end`: forwards that
    are kept beyond those of the low-noise expert, as in the authors' code for T2V.
    """

    ratios: tuple[tuple[float, ...], ...]
    threshold: float
    K: int
    retention: float
    high: bool
    end: int = 0

    def forwards(self, schedule: Schedule) -> Forwards:
        """The forwards of a run. What one expert, or one phase, has kept is no use to another."""
        rows: list[tuple[bool, ...]] = []
        for number, same in groupby(schedule.numbers):
            steps = range(len(rows), len(rows) + sum(1 for _ in same))
            branches = 1 + schedule.phases[number].guided
            columns = [
                self._branch(branch, schedule.phases[number].expert, steps, schedule.steps)
                for branch in range(branches)
            ]
            rows += zip(*columns, strict=True)
        return Forwards(tuple(rows))

    def _branch(self, branch: int, expert: Expert, phase: range, steps: int) -> list[bool]:
        """One branch in the steps of one expert. The authors count the forwards of both branches in their order."""
        held = int(2 * len(phase) * self.retention) + (self.end if expert == "low" else 0)
        ratios = self.ratios[branch % len(self.ratios)]
        runs, length, error, skips = [], 1.0, 0.0, 0
        for n, step in enumerate(phase):
            may = n > 0 and 2 * n + branch >= held and (expert == "low" or self.high)
            if may:
                length *= ratios[round(step * (len(ratios) - 1) / max(1, steps - 1))]
                error, skips = error + abs(1 - length), skips + 1
                may = error < self.threshold and skips <= self.K
            if not may:
                length, error, skips = 1.0, 0.0, 0
            runs.append(not may)
        return runs


def forwards_of(request: Request) -> Forwards:
    """The forwards of a request: all of them are computed unless `feature_caching` is "Mag"."""
    schedule = schedule_of(request)
    if request.feature_caching != "Mag":
        return Forwards(tuple((True,) * count for count in schedule.forwards))
    text_only = request.task == "t2v"
    threshold, K, retention = AUTHORS["t2v" if text_only else "i2v"]
    mag = MagCache(
        ratios=request.magcache_ratios or ((magcache_tables.T2V if text_only else magcache_tables.I2V),),
        threshold=threshold if request.magcache_thresh is None else request.magcache_thresh,
        K=K if request.magcache_K is None else request.magcache_K,
        retention=retention if request.magcache_retention_ratio is None else request.magcache_retention_ratio,
        high=text_only,
        end=1 if text_only else 0,
    )
    return mag.forwards(schedule) if request.speed_up is None else _fastest(mag, request.speed_up, schedule)


@lru_cache(maxsize=64)
def _fastest(mag: MagCache, speed_up: float, schedule: Schedule) -> Forwards:
    """With the mildest numbers that make it `speed_up` times faster, or else with those that skip most."""
    best = Forwards(())
    for K, retention in LIMITS:
        for threshold in THRESHOLDS:
            limited = replace(mag, threshold=threshold, K=K, retention=min(mag.retention, retention))
            forwards = limited.forwards(schedule)
            if forwards.computed * speed_up <= forwards.total:
                return forwards
            best = max(best, forwards, key=lambda each: each.skipped)
    return best
