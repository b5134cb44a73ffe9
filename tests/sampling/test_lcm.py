from __future__ import annotations

import pytest
import torch
from diffusers import FlowMatchLCMScheduler

from lightx2v.config.phases import Phase
from lightx2v.config.request import Request
from lightx2v.config.schedule import Schedule, shifted_schedule, step_list_schedule
from lightx2v.sampling import LCM, initial_noise, solver_for

SHAPE = (16, 3, 4, 6)
SCHEDULES = [step_list_schedule([1000, 750, 500, 250], 5.0, 2), shifted_schedule(6, 5.0, 0.9)]


def model(x: torch.Tensor, sigma: float) -> torch.Tensor:
    return torch.tanh(x) * (1 + sigma) - 0.2


def run(solver: LCM, x: torch.Tensor, start: int = 0) -> torch.Tensor:
    for i in range(start, solver.schedule.steps):
        x = solver.step(model(x, solver.schedule.sigmas[i]), i, x)
    return x


def drawn(seed: int, i: int) -> torch.Tensor:
    """The noise of step i: what is left of an update whose clean prediction is zero, at half the noise level."""
    halves = Schedule.of((0.5,) * 9, (500,) * 8, [Phase(expert="high")])
    return LCM(halves, seed).step(torch.zeros(SHAPE), i, torch.zeros(SHAPE)) / 0.5


@pytest.mark.parametrize("schedule", SCHEDULES, ids=["list", "shift"])
def test_equals_the_formula_in_double_precision(schedule: Schedule) -> None:
    x = initial_noise(SHAPE, 1).double()
    for i in range(schedule.steps):
        here, there = schedule.sigmas[i], schedule.sigmas[i + 1]
        x0 = x - here * model(x, here)
        x = (1 - there) * x0 + there * drawn(7, i).double()
    torch.testing.assert_close(run(LCM(schedule, 7), initial_noise(SHAPE, 1)).double(), x, rtol=0, atol=2e-6)


def test_equals_diffusers_for_the_same_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    schedule = SCHEDULES[0]
    theirs = FlowMatchLCMScheduler(shift=5.0)
    theirs.set_timesteps(sigmas=[1.0, 0.75, 0.5, 0.25])
    assert theirs.sigmas.tolist() == pytest.approx(schedule.sigmas, abs=1e-6)
    module = "diffusers.schedulers.scheduling_flow_match_lcm.randn_tensor"
    x = initial_noise(SHAPE, 1)
    for i, t in enumerate(theirs.timesteps):
        monkeypatch.setattr(module, lambda *_, i=i, **__: drawn(7, i))
        x = theirs.step(model(x, schedule.sigmas[i]), t, x, return_dict=False)[0]
    torch.testing.assert_close(run(LCM(schedule, 7), initial_noise(SHAPE, 1)), x, rtol=0, atol=2e-6)


def test_every_seed_and_step_has_standard_noise_of_its_own() -> None:
    noises = [initial_noise(SHAPE, 7), *(drawn(seed, i) for seed in (7, 8) for i in range(4))]
    for a, first in enumerate(noises):
        assert abs(float(first.mean())) < 0.1 and abs(float(first.std()) - 1) < 0.1
        for second in noises[:a]:
            assert abs(float(torch.corrcoef(torch.stack([first.ravel(), second.ravel()]))[0, 1])) < 0.15


def test_the_last_step_returns_the_clean_prediction() -> None:
    x = initial_noise(SHAPE, 1)
    v = model(x, 0.625)
    assert torch.equal(LCM(SCHEDULES[0], 7).step(v, 3, x), torch.sub(x, v, alpha=0.625))


def test_the_global_generator_is_not_used() -> None:
    before = torch.get_rng_state()
    run(LCM(SCHEDULES[0], 7), initial_noise(SHAPE, 1))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("at", [1, 3])
def test_a_restored_run_is_bit_equal(at: int) -> None:
    first, x = LCM(SCHEDULES[0], 7), initial_noise(SHAPE, 1)
    for i in range(at):
        x = first.step(model(x, SCHEDULES[0].sigmas[i]), i, x)
    second = LCM(SCHEDULES[0], 7)
    second.restore(first.state(), at)
    assert torch.equal(run(second, x, start=at), run(LCM(SCHEDULES[0], 7), initial_noise(SHAPE, 1)))


def test_the_seed_of_the_request_draws_the_noise() -> None:
    made = [Request(prompt="a cat", sampler="lcm", steps=2, seed=seed) for seed in (1, 1, 2)]
    same, again, other = (solver_for(request).step(torch.zeros(SHAPE), 0, torch.zeros(SHAPE)) for request in made)
    assert torch.equal(same, again) and not torch.equal(same, other)
