"""From noise to latents: solvers, the denoising loop, checks on the outcome. The schedules are in config/schedule.py.

A solver is one file here, one row of SAMPLERS, and its name in SAMPLERS of config/request.py.
"""

from ..config.phases import Sampler
from ..config.request import Request
from ..config.schedule import Schedule, schedule_of, shifted_schedule, step_list_schedule
from .checks import still_warning
from .denoise import Solver, SolverState, denoise, guided, initial_noise
from .euler import Euler
from .lcm import LCM
from .solver_turns import MakeSolver, SolverTurns
from .unipc import UniPC

__all__ = [
    "LCM",
    "SAMPLERS",
    "Euler",
    "Schedule",
    "Solver",
    "SolverState",
    "SolverTurns",
    "UniPC",
    "denoise",
    "guided",
    "initial_noise",
    "shifted_schedule",
    "solver_for",
    "step_list_schedule",
    "still_warning",
]

SAMPLERS: dict[Sampler, MakeSolver] = {
    "unipc": lambda schedule, seed, first: UniPC(schedule, first),
    "euler": lambda schedule, seed, first: Euler(schedule),
    "lcm": lambda schedule, seed, first: LCM(schedule, seed),
}
"""Name -> solver of a schedule and a seed, from a first step on. Every solver takes either kind of schedule."""


def solver_for(request: Request) -> Solver:
    """A new solver with the request's schedule. Each run takes its own.

    Where phases name different samplers, each begins its part of the steps without history.
    """
    schedule = schedule_of(request)
    names: set[Sampler] = {schedule.phase(step).sampler or request.solver for step in range(schedule.steps)}
    if len(names) > 1:
        return SolverTurns(schedule, request.seed, SAMPLERS)
    return SAMPLERS[names.pop()](schedule, request.seed, 0)
