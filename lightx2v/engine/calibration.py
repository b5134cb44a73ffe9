"""Calibration: the table of a model for MagCache, measured in one run that skips nothing."""

from collections import defaultdict

import torch
from torch import Tensor

from ..config.request import Request
from ..errors import ConfigError
from ..progress import CancelToken, OnProgress
from .engine import LoadedEngine
from .memory_retry import within_memory
from .run import Run

DIGITS = 5
"""Of the published tables."""


class RatioTable:
    """R[k], the mean over the tokens of |r(k)| / |r(k - 1)|, for each branch of guidance. It is 1 in the first step,
    and where the branch did not run in the step before."""

    def __init__(self) -> None:
        self._ratios: dict[int, dict[int, float]] = defaultdict(dict)
        self._last: dict[int, tuple[int, Tensor]] = {}

    def see(self, step: int, branch: int, residual_BLD: Tensor) -> None:
        """What all blocks added in this step."""
        lengths_BL = torch.linalg.vector_norm(residual_BLD, dim=-1, dtype=torch.float32)
        before, last_BL = self._last.get(branch, (step, lengths_BL))
        if before == step - 1:
            self._ratios[branch][step] = round(float((lengths_BL / last_BL).mean()), DIGITS)
        self._last[branch] = step, lengths_BL

    def to_json(self, steps: int) -> list[list[float]]:
        return [[self._ratios[branch].get(step, 1.0) for step in range(steps)] for branch in sorted(self._last)]


def calibrate(
    engine: LoadedEngine, request: Request, on_progress: OnProgress | None = None, cancel: CancelToken | None = None
) -> list[list[float]]:
    """The `magcache_ratios` of the engine's model at this request's number of steps, shift and size."""
    if engine.mesh.group.size > 1:
        raise ConfigError("Several processes share the tokens here. Calibrate in one process, without torchrun.")
    run, table = Run(engine, request, on_progress, cancel), RatioTable()
    run.use_loras(engine.config.lora_configs)
    with torch.inference_mode():
        within_memory(lambda: run.make_latents(table.see), run.size)
    return table.to_json(request.steps)
