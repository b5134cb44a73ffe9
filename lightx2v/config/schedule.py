"""Schedule: the noise level and the phase of each step. A pure function of a Request, in numbers, without torch.

sigma is the share of noise: latents at sigma are (1 - sigma) x0 + sigma noise. The model's timestep is 1000 sigma.
`shift` spends more steps where sigma is large: sigma = shift s / (1 + (shift - 1) s) for evenly spaced s.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np

from .phases import TRAIN_STEPS, Expert, Phase
from .request import Request


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """N steps from sigmas[i] to sigmas[i + 1]; sigmas[N] is 0. Step i runs at timesteps[i] in the phase of this number.

    Sigmas are float32 values, as in the reference, held as Python floats. A LoRA with a strength for each phase takes
    that of numbers[i].
    """

    sigmas: tuple[float, ...]
    timesteps: tuple[float, ...]
    phases: tuple[Phase, ...]
    numbers: tuple[int, ...]
    """Of each step: its phase, counted from 0."""

    @classmethod
    def of(cls, sigmas: Sequence[float], timesteps: Sequence[float], phases: Sequence[Phase]) -> Self:
        """Each step is of the last phase that has begun, if the ones before it have."""
        number, numbers = 0, []
        for step, timestep in enumerate(timesteps):
            while number + 1 < len(phases) and phases[number + 1].begins(step, timestep):
                number += 1
            numbers.append(number)
        return cls(sigmas=tuple(sigmas), timesteps=tuple(timesteps), phases=tuple(phases), numbers=tuple(numbers))

    @property
    def steps(self) -> int:
        return len(self.timesteps)

    def phase(self, step: int) -> Phase:
        return self.phases[self.numbers[step]]

    @property
    def experts(self) -> tuple[Expert, ...]:
        """The expert of each step."""
        return tuple(self.phases[number].expert for number in self.numbers)

    @property
    def forwards(self) -> tuple[int, ...]:
        """How often each step runs its expert: once, or twice with guidance."""
        return tuple(1 + self.phases[number].guided for number in self.numbers)

    @property
    def high_noise_steps(self) -> int:
        """The number of steps that the high-noise expert makes."""
        return self.experts.count("high")

    @property
    def first_numbers(self) -> dict[Expert, int]:
        """Of each expert that makes a step: the number of its first phase."""
        return {self.phases[number].expert: number for number in reversed(self.numbers)}

    def to_json(self) -> list[dict[str, Any]]:
        """The phases with their numbers of steps, for reports. One without a step is left out."""
        return [
            {
                "expert": phase.expert,
                "steps": steps,
                "guidance": phase.scale,
                "forwards_per_step": 1 + phase.guided,
                "sampler": phase.sampler,
            }
            for number, phase in enumerate(self.phases)
            if (steps := self.numbers.count(number))
        ]


def schedule_of(request: Request) -> Schedule:
    """The schedule of a request: from its step list if it has one, else from its steps and shift."""
    if request.denoising_step_list is not None:
        levels = step_list_levels(request.denoising_step_list, request.shift)
    else:
        levels = shifted_levels(request.steps, request.shift)
    return Schedule.of(*levels, request.timeline)


def shifted_schedule(steps: int, shift: float, boundary: float) -> Schedule:
    """The base model's schedule: the high-noise expert while the timestep is at least 1000 `boundary`."""
    low = Phase(expert="low", below_timestep=boundary * TRAIN_STEPS)
    return Schedule.of(*shifted_levels(steps, shift), (Phase(expert="high"), low))


def step_list_schedule(step_list: Sequence[int], shift: float, boundary_step_index: int) -> Schedule:
    """The distilled models' schedule: the first steps by the high-noise expert."""
    if not 0 <= boundary_step_index < len(step_list):
        raise ValueError(f"boundary_step_index {boundary_step_index} is outside 0..{len(step_list) - 1}")
    low = Phase(expert="low", from_step=boundary_step_index)
    return Schedule.of(*step_list_levels(step_list, shift), (Phase(expert="high"), low))


def shifted_levels(steps: int, shift: float) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """The base model's (sigmas, timesteps).

    Timesteps are truncated to whole numbers, as in the reference. Phases begin by them, so keep them whole.
    """
    largest = float(np.float32(1 - 1 / TRAIN_STEPS))  # the largest sigma of training; the reference stores a float32
    exact = _shifted(np.linspace(largest, 0, steps + 1)[:-1], shift)
    return _float32([*exact, 0.0]), tuple((exact * TRAIN_STEPS).astype(np.int64).tolist())


def step_list_levels(step_list: Sequence[int], shift: float) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """The distilled models' (sigmas, timesteps): the listed training steps, 1..1000, falling.

    Timesteps are not truncated: the distillation was trained on 833.33.
    """
    sigmas = _float32(_shifted(np.asarray(step_list, np.float64) / TRAIN_STEPS, shift))
    return (*sigmas, 0.0), _float32(np.asarray(sigmas) * TRAIN_STEPS)


def _shifted(s: np.ndarray, shift: float) -> np.ndarray:
    return shift * s / (1 + (shift - 1) * s)


def _float32(values: np.ndarray | Sequence[float]) -> tuple[float, ...]:
    return tuple(np.asarray(values, np.float32).tolist())
