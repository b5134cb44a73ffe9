"""Phases with samplers of their own: each begins its part of the steps without history."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from lightx2v.config.request import Request
from lightx2v.config.schedule import shifted_schedule
from lightx2v.sampling import Solver, SolverTurns, UniPC, denoise, initial_noise, solver_for

SHAPE = (4, 2, 4, 4)
STEPS, SWITCH = 8, 3


def request(first: str, then: str) -> Request:
    phases = [{"expert": "high", "sampler": first}, {"expert": "low", "from_step": SWITCH, "sampler": then}]
    return Request(prompt="x", steps=STEPS, phases=phases, seed=5)


def velocity(expert: str, latents: torch.Tensor, timestep: float, i: int) -> torch.Tensor:
    return torch.tanh(latents) * (2.0 if expert == "high" else 1.5) - timestep / 1000


def run(solver: Solver) -> torch.Tensor:
    return denoise(solver, velocity, initial_noise(SHAPE, 5))


def test_one_sampler_for_all_phases_keeps_its_history() -> None:
    solver = solver_for(request("unipc", "unipc"))
    assert isinstance(solver, UniPC)
    schedule = solver.schedule
    plain = UniPC(shifted_schedule(STEPS, 5.0, (schedule.timesteps[SWITCH] + 0.5) / 1000))
    assert torch.equal(run(solver), run(plain))


def test_unipc_after_euler_begins_as_if_it_were_the_first_step() -> None:
    """Euler by hand down to the switch, then UniPC on the remaining noise levels alone."""
    solver = solver_for(request("euler", "unipc"))
    assert isinstance(solver, SolverTurns)
    sigmas, x = solver.schedule.sigmas, initial_noise(SHAPE, 5).double()
    for i, (here, there) in enumerate(list(pairwise(sigmas))[:SWITCH]):
        x = x + (there - here) * velocity("high", x, solver.schedule.timesteps[i], i)
    rest = Request(prompt="x", phases=[{"expert": "low"}])
    tail = UniPC(type(solver.schedule).of(sigmas[SWITCH:], solver.schedule.timesteps[SWITCH:], rest.timeline))
    for i, timestep in enumerate(tail.schedule.timesteps):
        x = tail.step(velocity("low", x, timestep, i), i, x)
    torch.testing.assert_close(run(solver).double(), x, rtol=0, atol=2e-6)


@pytest.mark.parametrize("names", [("unipc", "euler"), ("euler", "unipc"), ("lcm", "unipc"), ("unipc", "lcm")])
@pytest.mark.parametrize("at", range(1, STEPS + 1))
def test_a_new_solver_goes_on_from_any_step_with_the_same_bits(names: tuple[str, str], at: int) -> None:
    whole, first = solver_for(request(*names)), solver_for(request(*names))
    x = initial_noise(SHAPE, 5)
    for i in range(at):
        x = first.step(velocity(first.schedule.experts[i], x, first.schedule.timesteps[i], i), i, x)
    second = solver_for(request(*names))
    second.restore(first.state(), at)
    assert torch.equal(denoise(second, velocity, x, start=at), run(whole))


def test_where_the_sampler_changes_nothing_is_kept() -> None:
    solver, x = solver_for(request("unipc", "euler")), initial_noise(SHAPE, 5)
    kept = []
    for i in range(STEPS):
        x = solver.step(velocity("high", x, 500.0, i), i, x)
        kept.append(bool(solver.state()))
    assert kept == [True] * (SWITCH - 1) + [False] * (STEPS - SWITCH + 1)
