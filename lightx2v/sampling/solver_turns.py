"""SolverTurns: the solvers of a run whose phases name different samplers, one after the other.

Each takes the consecutive steps that name it and begins without history: what UniPC remembers is no state of Euler.
"""

from collections.abc import Callable, Mapping
from itertools import groupby

from torch import Tensor

from ..config.phases import Sampler
from ..config.schedule import Schedule
from .denoise import Solver, SolverState

MakeSolver = Callable[[Schedule, int, int], Solver]
"""(schedule, seed, first step) -> solver that takes the steps from there on."""


class SolverTurns:
    def __init__(self, schedule: Schedule, seed: int, samplers: Mapping[Sampler, MakeSolver]) -> None:
        self.schedule = schedule
        self._turns: dict[int, Solver] = {}
        """First step -> the solver that takes over there."""

        def sampler(step: int) -> Sampler:
            return schedule.phase(step).sampler or "euler"

        for name, steps in groupby(range(schedule.steps), sampler):
            first = next(steps)
            self._turns[first] = samplers[name](schedule, seed, first)
        self._done = 0

    def step(self, velocity: Tensor, i: int, latents: Tensor) -> Tensor:
        result = self._at(i).step(velocity, i, latents)
        self._done = i + 1
        return result

    def state(self) -> SolverState:
        """That of the solver whose turn it is. Nothing where its turn begins or no step is left."""
        ended = self._done in self._turns or self._done == self.schedule.steps
        return {} if ended else self._at(self._done).state()

    def restore(self, state: SolverState, step: int) -> None:
        self._done = step
        if step < self.schedule.steps:
            self._at(step).restore({} if step in self._turns else state, step)

    def _at(self, step: int) -> Solver:
        return self._turns[max(first for first in self._turns if first <= step)]
