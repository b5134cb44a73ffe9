"""Euler's method: the solver of the distilled models, which were trained to take exactly these few steps."""

from __future__ import annotations

import torch
from torch import Tensor

from ..config.schedule import Schedule


class Euler:
    """x' = x + (sigma' - sigma) v. Deterministic: no noise is added between steps. The last step returns x0."""

    def __init__(self, schedule: Schedule) -> None:
        self.schedule = schedule

    def step(self, velocity: Tensor, i: int, latents: Tensor) -> Tensor:
        sigmas = self.schedule.sigmas
        return torch.add(latents, velocity, alpha=sigmas[i + 1] - sigmas[i])

    def state(self) -> None:
        """Nothing: each step depends on its latents only."""

    def restore(self, state: None) -> None:
        pass
