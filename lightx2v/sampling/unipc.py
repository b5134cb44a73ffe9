"""UniPC of order 2 (B2(h), data prediction, corrector on every step): the base model's solver.

Zhao et al. 2023, "UniPC: A Unified Predictor-Corrector Framework", algorithms 5 and 6; as in Wan2.2's
FlowUniPCMultistepScheduler. With alpha = 1 - sigma, lambda = ln(alpha / sigma) and m = x0 as predicted at each step,
every update is a weighted sum:

    corrector   x_k      of  x_{k-1}, m_{k-1}, m_{k-2} and the new m_k
    predictor   x_{k+1}  of  x_k, m_k, m_{k-1}

So the weights are computed once, in double precision, and a step is a handful of multiply-adds in the latents' own
precision (float32). The history continues when the expert or the guidance changes: all predict the same quantity.
"""

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from ..config.schedule import Schedule

LARGEST = 1 - 1e-6
"""Pure noise, sigma 1, where a step list may begin, has lambda = -infinity. The weights use this sigma instead, as
diffusers' UniPCMultistepScheduler does."""


class Weights(NamedTuple):
    """Factors of one update from step s to the next: its sample, x0 at s, x0 before s, x0 after s (corrector only)."""

    sample: float
    x0: float
    older: float = 0.0
    newer: float = 0.0


class UniPC:
    """Its state: `sample` and `x0` of the step before, and `older`, the x0 before that."""

    def __init__(self, schedule: Schedule, first: int = 0) -> None:
        """Takes the steps from `first` on."""
        self.schedule = schedule
        self._predict, self._correct = solver_weights((min(schedule.sigmas[0], LARGEST), *schedule.sigmas[1:]), first)
        self._next, self._state = first, dict[str, Tensor]()

    def step(self, velocity: Tensor, i: int, latents: Tensor) -> Tensor:
        """Latents at sigmas[i + 1] from the model's velocity at `latents` and sigmas[i]. A failure changes no state."""
        past = self._state
        if i != self._next:
            raise ValueError(f"step {i} is out of order: the history leads to step {self._next}")
        x0 = torch.sub(latents, velocity, alpha=self.schedule.sigmas[i])
        sample = latents
        if past:
            sample = _weighted(self._correct[i - 1], past["sample"], past["x0"], past.get("older"), x0)
        next_latents = _weighted(self._predict[i], sample, x0, past.get("x0"))
        older = {"older": past["x0"]} if past else {}
        self._next, self._state = i + 1, {"sample": sample, "x0": x0, **older}
        return next_latents

    def state(self) -> Mapping[str, Tensor]:
        return self._state

    def restore(self, state: Mapping[str, Tensor], step: int) -> None:
        self._next, self._state = step, dict(state)


def solver_weights(sigmas: tuple[float, ...], first: int = 0) -> tuple[list[Weights], list[Weights]]:
    """Predictor and corrector weights of every update sigmas[k] -> sigmas[k + 1]; the last one is never corrected.

    First order where there is no history (k = `first`) and at the end, where lambda is infinite and x = x0.
    """
    last = len(sigmas) - 2
    predict, correct = [], []
    for k in range(last + 1):
        here, there = sigmas[k], sigmas[k + 1]
        h = _log_snr(there) - _log_snr(here)
        e = math.expm1(-h)  # B2(h); -1 at the end
        scale = (1 - there) * e
        second_order = first < k < last
        r = (_log_snr(sigmas[k - 1]) - _log_snr(here)) / h if second_order else math.nan

        slope = 0.5 / r if second_order else 0.0
        predict.append(_update(there / here, scale, slope, 0.0))
        if k == last:
            break
        newer, slope = 0.5, 0.0
        if second_order:
            # Solve  rho0 + rho1 = b0,  r rho0 + rho1 = b1.
            phi = e / -h - 1
            b0, b1 = phi / e, 2 * (phi / -h - 0.5) / e
            rho0 = (b1 - b0) / (r - 1)
            newer, slope = b0 - rho0, rho0 / r
        correct.append(_update(there / here, scale, slope, newer))
    return predict, correct


def _update(ratio: float, scale: float, slope: float, newer: float) -> Weights:
    """ratio x - scale (m0 + slope (m_older - m0) + newer (m_newer - m0)), with its terms collected."""
    return Weights(ratio, -scale * (1 - slope - newer), -scale * slope, -scale * newer)


def _log_snr(sigma: float) -> float:
    return math.inf if sigma == 0 else math.log1p(-sigma) - math.log(sigma)


def _weighted(
    weights: Weights, sample: Tensor, x0: Tensor, older: Tensor | None, newer: Tensor | None = None
) -> Tensor:
    total = (weights.sample * sample).add_(x0, alpha=weights.x0)
    if older is not None:
        total.add_(older, alpha=weights.older)
    if newer is not None:
        total.add_(newer, alpha=weights.newer)
    return total
