"""The noise level and the expert of each step: a schedule is a pure function of a Request, in numbers, without torch.

sigma is the share of noise: latents at sigma are (1 - sigma) x0 + sigma noise. The model's timestep is 1000 sigma.
`shift` spends more steps where sigma is large: sigma = shift s / (1 + (shift - 1) s) for evenly spaced s.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .request import Expert, Request

TRAIN_STEPS = 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """N steps from sigmas[i] to sigmas[i + 1]; sigmas[N] is 0. Step i runs experts[i] at timesteps[i].

    Sigmas are float32 values, as in the reference, held as Python floats.
    """

    sigmas: tuple[float, ...]
    timesteps: tuple[float, ...]
    experts: tuple[Expert, ...]

    @property
    def steps(self) -> int:
        return len(self.timesteps)

    @property
    def high_noise_steps(self) -> int:
        """The number of steps that the high-noise expert makes."""
        return self.experts.count("high")


def schedule_of(request: Request) -> Schedule:
    """The schedule of a request: from its step list if it has one, else from its steps, shift and boundary."""
    if request.denoising_step_list is not None and request.boundary_step_index is not None:
        return step_list_schedule(request.denoising_step_list, request.shift, request.boundary_step_index)
    if request.boundary is None:
        raise ValueError("a request needs a boundary, or a step list with its boundary_step_index")
    return shifted_schedule(request.steps, request.shift, request.boundary)


def shifted_schedule(steps: int, shift: float, boundary: float) -> Schedule:
    """The base model's schedule: the high-noise expert while the timestep is at least 1000 `boundary`.

    Timesteps are truncated to whole numbers, as in the reference. The boundary test reads them, so keep them whole.
    """
    largest = float(np.float32(1 - 1 / TRAIN_STEPS))  # the largest sigma of training; the reference stores a float32
    exact = _shifted(np.linspace(largest, 0, steps + 1)[:-1], shift)
    timesteps = (exact * TRAIN_STEPS).astype(np.int64).tolist()
    experts: tuple[Expert, ...] = tuple("high" if t >= boundary * TRAIN_STEPS else "low" for t in timesteps)
    return Schedule(sigmas=_float32([*exact, 0.0]), timesteps=tuple(timesteps), experts=experts)


def step_list_schedule(step_list: Sequence[int], shift: float, boundary_step_index: int) -> Schedule:
    """The distilled models' schedule: the listed training steps (1..1000, falling), the first few by the high expert.

    Timesteps are not truncated: the distillation was trained on 833.33.
    """
    if not 0 <= boundary_step_index < len(step_list):
        raise ValueError(f"boundary_step_index {boundary_step_index} is outside 0..{len(step_list) - 1}")
    sigmas = _float32(_shifted(np.asarray(step_list, np.float64) / TRAIN_STEPS, shift))
    timesteps = _float32(np.asarray(sigmas) * TRAIN_STEPS)
    experts: tuple[Expert, ...] = tuple("high" if i < boundary_step_index else "low" for i in range(len(step_list)))
    return Schedule(sigmas=(*sigmas, 0.0), timesteps=timesteps, experts=experts)


def _shifted(s: np.ndarray, shift: float) -> np.ndarray:
    return shift * s / (1 + (shift - 1) * s)


def _float32(values: np.ndarray | Sequence[float]) -> tuple[float, ...]:
    return tuple(np.asarray(values, np.float32).tolist())
