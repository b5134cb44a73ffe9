"""The denoising loop: noise in, latents out. It knows neither the model nor where its weights live.

`velocity(expert, latents, timestep, i)` answers for both, guidance included; a solver turns the answer into the next
latents; a schedule says which expert is asked when. Everything here is float32 and costs microseconds a step.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from ..config.request import Expert
from ..config.schedule import Schedule
from ..progress import CancelToken
from .checks import require_finite

Velocity = Callable[[Expert, Tensor, float, int], Tensor]
"""(expert, latents CTHW, timestep, step from 0) -> velocity CTHW, float32."""

OnStep = Callable[[int, Tensor, Callable[[], Tensor]], None]
"""(step from 0, latents after it, x0): `x0()` computes the clean latents as the model guessed them in this step."""


class Solver(Protocol):
    """Takes the steps 0, 1, ... of its schedule once, in order. A failed step leaves its state as it was."""

    schedule: Schedule

    def step(self, velocity: Tensor, i: int, latents: Tensor) -> Tensor: ...

    def state(self) -> Any:
        """What the steps so far left behind, besides the latents; stays valid while the solver goes on."""

    def restore(self, state: Any) -> None:
        """Go on from there: this solver, or another one of the same schedule, continues bit by bit alike."""


def initial_noise(shape: Sequence[int], seed: int) -> Tensor:
    """Standard normal float32 on the CPU: the same for a seed on every device and any number of them.

    Torch's CPU generator uses the lowest 32 bits of the seed, which is why a Request has no larger ones.
    """
    return torch.randn(tuple(shape), generator=torch.Generator("cpu").manual_seed(seed), dtype=torch.float32)


def draw_seed() -> int:
    """A seed for a request that leaves the choice to us: short enough to be read out and typed, 0 .. 2**32 - 1."""
    return secrets.randbits(32)


def guided(branches: Sequence[Tensor], expert: Expert, guidance: tuple[float, float]) -> Tensor:
    """Classifier-free guidance v_u + s (v_c - v_u), s = guidance (high, low) of the expert.

    `branches` are the conditional and the unconditional velocity, or the conditional one alone: no guidance.
    """
    if len(branches) == 1:
        return branches[0]
    conditional, unconditional = branches
    scale = guidance[0] if expert == "high" else guidance[1]
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

    To go on after an error at step k, pass the latents and restore the solver's state that `on_step` saw after step
    k - 1, and start at k. `backend` is the attention's name, for the error message.
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
