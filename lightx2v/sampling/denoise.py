"""The denoising loop: noise in, latents out. It knows neither the model nor the place of its weights.

`velocity(expert, latents, timestep, i)` runs the model, guidance included. The solver computes the next latents from
the velocity, and the schedule selects the expert of each step. All of it is float32 and costs microseconds a step.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from ..config.phases import Expert
from ..config.schedule import Schedule
from ..progress import CancelToken
from .checks import require_finite

Velocity = Callable[[Expert, Tensor, float, int], Tensor]
"""(expert, latents CTHW, timestep, step from 0) -> velocity CTHW, float32."""

OnStep = Callable[[int, Tensor, Callable[[], Tensor]], None]
"""(step from 0, latents after it, x0): `x0()` computes the clean latents that the model predicts in this step."""


SolverState = Mapping[str, Tensor]
"""Tensors by name. They are never written to, so it is safe to keep them."""


class Solver(Protocol):
    """Takes the steps 0, 1, ... of its schedule once, in order. A failed step does not change its state."""

    schedule: Schedule

    def step(self, velocity: Tensor, i: int, latents: Tensor) -> Tensor: ...

    def state(self) -> SolverState:
        """The history that the next step needs besides the latents. It stays valid while the solver continues."""
        ...

    def restore(self, state: SolverState, step: int) -> None:
        """Continue at `step` from the `state` before it, which may come from another solver of the same schedule and
        seed, or from a file. Bit-exact."""


def initial_noise(shape: Sequence[int], seed: int) -> Tensor:
    """Standard normal float32 from the CPU: a seed means the same noise on every device and any number of them.

    Torch's CPU generator uses the lowest 32 bits of the seed, so a Request has no larger seeds.
    """
    return torch.randn(tuple(shape), generator=torch.Generator("cpu").manual_seed(seed), dtype=torch.float32)


def guided(branches: Sequence[Tensor], scale: float) -> Tensor:
    """Classifier-free guidance v_u + s (v_c - v_u), with s = `scale`.

    `branches` are the conditional and the unconditional velocity; the conditional one alone means no guidance.
    """
    if len(branches) == 1:
        return branches[0]
    conditional, unconditional = branches
    return torch.add(unconditional, conditional - unconditional, alpha=scale)


@torch.no_grad()
def denoise(
    solver: Solver,
    velocity: Velocity,
    latents: Tensor,
    *,
    start: int = 0,
    on_step: OnStep | None = None,
    cancel: CancelToken | None = None,
    backend: str = "",
) -> Tensor:
    """Latents at sigma 0. Raises NumericsError at the first step that is not finite, Cancelled between two steps.

    To continue after an error at step k, restore the solver's state that `on_step` saw after step k - 1, pass the
    latents of that step, and start at k. `backend` is the attention's name, for the error message.
    """
    schedule = solver.schedule
    for i in range(start, schedule.steps):
        if cancel is not None:
            cancel.check()
        expert = schedule.experts[i]
        v = velocity(expert, latents, schedule.timesteps[i], i)
        before, latents = latents, solver.step(v, i, latents)
        require_finite(latents, step=i + 1, total=schedule.steps, expert=expert, backend=backend)
        if on_step is not None:
            on_step(i, latents, partial(torch.sub, before, v, alpha=schedule.sigmas[i]))
    return latents
