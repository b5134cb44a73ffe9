"""From noise to latents: solvers, the denoising loop, checks on the outcome. The schedules are in config/schedule.py.

A solver is one file here, one row of SAMPLERS, and its name in SAMPLERS of config/request.py.
"""

from collections.abc import Callable

from ..config.request import Request
from ..config.schedule import Schedule, schedule_of, shifted_schedule, step_list_schedule
from .checks import still_warning
from .denoise import Solver, SolverState, denoise, guided, initial_noise
from .euler import Euler
from .lcm import LCM
from .unipc import UniPC

__all__ = [
    "LCM",
    "SAMPLERS",
    "Euler",
    "Schedule",
    "Solver",
    "SolverState",
    "UniPC",
    "denoise",
    "guided",
    "initial_noise",
    "shifted_schedule",
    "solver_for",
    "step_list_schedule",
    "still_warning",
]

SAMPLERS: dict[str, Callable[[Schedule, int], Solver]] = {
    "unipc": lambda schedule, seed: UniPC(schedule),
    "euler": lambda schedule, seed: Euler(schedule),
    "lcm": LCM,
}
"""Name -> solver of a schedule and a seed. Every solver takes either kind of schedule."""


def solver_for(request: Request) -> Solver:
    """A new solver with the request's schedule. Each run takes its own."""
    return SAMPLERS[request.solver](schedule_of(request), request.seed)
