"""Euler's method: LightX2V's solver for the distilled models."""

from collections.abc import Mapping

import torch
from torch import Tensor

from ..config.schedule import Schedule


class Euler:
    """x' = x + (sigma' - sigma) v. Deterministic: adds no noise between steps. The last step returns x0."""

    def __init__(self, schedule: Schedule) -> None:
        self.schedule = schedule

    def step(self, velocity: Tensor, i: int, latents: Tensor) -> Tensor:
        sigmas = self.schedule.sigmas
        return torch.add(latents, velocity, alpha=sigmas[i + 1] - sigmas[i])

    def state(self) -> Mapping[str, Tensor]:
        """Nothing: a step depends on its latents only."""
        return {}

    def restore(self, state: Mapping[str, Tensor], step: int) -> None:
        pass
