"""ExpertOrder: finds out whether the two experts are exchanged, from what they do with pure noise.

At sigma 1 the latents z are noise and tell nothing of the clean ones, so the best prediction of those, x0 = z - v,
holds no part of z. The high-noise expert has learned that. The low-noise expert never saw more noise than sigma s, at
the boundary, where v = z / s is right; at sigma 1 it takes too much away, and x0 holds the part 1 - 1 / s < 0 of z.

Both experts see the same corner of the first step's latents, which costs less than a hundredth of that step. In all
variants of the demo models the high-noise expert leaves more than the low-noise one: by 0.027 to 0.20 at their own
size, and by 0.007 or more in 147 runs of all sizes.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from ..config.phases import Expert
from ..models.dit import WanDiT
from ..offload.placement import Placement
from ..offload.resident import Resident
from ..progress import CancelToken

PURE_NOISE = 0.99
"""The sigma from which on latents count as noise."""
CORNER = (5, 16, 16)
"""Frames, rows and columns of the latents that the experts see."""
SMALLER = 0.013
"""By how much the part of an exchanged high-noise expert is smaller at least: half of the smallest difference."""
NONE_LEFT = 0.1
"""The part that an expert for high noise leaves at most, of either sign: twice the largest measured."""


class ExpertOrder:
    """Remembers its answer for the LoRAs in use."""

    def __init__(self) -> None:
        self._answers: dict[object, str] = {}

    def warning(
        self,
        placement: Placement,
        latents_CTHW: Tensor,
        sigma: float,
        timestep: float,
        context_LD: Tensor,
        condition_CTHW: Tensor | None,
        phases: Mapping[Expert, int],
        cancel: CancelToken | None = None,
    ) -> str:
        """A warning if the experts seem to be exchanged, else "". `latents_CTHW` is the noise of the first step.

        `phases` has the first phase of each expert, whose LoRA strengths it has here.

        Experts that do not both stay on the device are not asked: to fetch one would take too long.
        """
        if sigma < PURE_NOISE or not isinstance(placement, Resident):
            return ""
        loras = (
            *sorted(phases.items()),
            *((applied.expert, applied.report.path, applied.report.strength) for applied in placement.loras),
        )
        if loras not in self._answers:
            noise = _corner(latents_CTHW)
            condition = None if condition_CTHW is None else _corner(condition_CTHW)
            left: dict[Expert, float] = {}
            for expert in ("high", "low"):
                with placement.expert(expert, phase=phases.get(expert, 0)) as dit:
                    left[expert] = _noise_left(dit, noise, sigma, timestep, context_LD, condition, cancel)
            self._answers[loras] = _judged(left)
        return self._answers[loras]


def _judged(left: Mapping[Expert, float]) -> str:
    high, low = left["high"], left["low"]
    if not (high < 0 and high < low - SMALLER and abs(low) <= NONE_LEFT):
        return ""
    return (
        "The two experts seem to be exchanged: given pure noise, the one that is loaded for high noise leaves "
        f"{high:.1%} of it in the video that it predicts, the one for low noise {low:.1%}; a high-noise expert leaves "
        "none. If the video is bad, exchange the two files."
    )


def _noise_left(
    dit: WanDiT,
    noise: Tensor,
    sigma: float,
    timestep: float,
    context_LD: Tensor,
    condition: Tensor | None,
    cancel: CancelToken | None,
) -> float:
    """The part of `noise` in the clean latents that the expert predicts. The prediction is smooth apart from it, so
    neighbours are subtracted first."""
    split, dit.split = dit.split, None  # each process looks by itself
    try:
        (velocity,) = dit(noise, timestep, [dit.encode_text(context_LD)], condition, cancel)
    finally:
        dit.split = split
    clean, noise = (_differences(part) for part in (noise - sigma * velocity, noise))
    return float((clean * noise).sum() / noise.square().sum())


def _corner(latents_CTHW: Tensor) -> Tensor:
    frames, rows, columns = CORNER
    return latents_CTHW[:, :frames, :rows, :columns]


def _differences(values_CTHW: Tensor) -> Tensor:
    return torch.diff(torch.diff(values_CTHW, dim=2), dim=3)
