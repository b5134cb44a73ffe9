"""From noise to latents: schedules (when), solvers (how), the loop (denoise), checks on the outcome."""

from __future__ import annotations

from ..config.request import Request
from .checks import still_warning
from .denoise import Solver, denoise, draw_seed, guided, initial_noise
from .euler import Euler
from .schedule import Schedule, distill_schedule, unipc_schedule
from .unipc import UniPC

__all__ = [
    "Euler",
    "Schedule",
    "Solver",
    "UniPC",
    "denoise",
    "distill_schedule",
    "draw_seed",
    "guided",
    "initial_noise",
    "solver_for",
    "still_warning",
    "unipc_schedule",
]


def solver_for(request: Request) -> Solver:
    """A fresh solver with the schedule that a request asks for; one run takes one solver."""
    if request.denoising_step_list is not None and request.boundary_step_index is not None:
        return Euler(distill_schedule(request.denoising_step_list, request.shift, request.boundary_step_index))
    if request.boundary is None:
        raise ValueError("a request needs a boundary, or a step list with its boundary_step_index")
    return UniPC(unipc_schedule(request.steps, request.shift, request.boundary))
