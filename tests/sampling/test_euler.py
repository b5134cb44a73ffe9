from __future__ import annotations

import torch

from lightx2v.config.schedule import step_list_schedule
from lightx2v.sampling import Euler

SCHEDULE = step_list_schedule([1000, 750, 500, 250], 5.0, 2)
SHAPE = (16, 3, 4, 6)


def model(x: torch.Tensor, sigma: float) -> torch.Tensor:
    return torch.tanh(x) * (1 + sigma) - 0.2


def noise() -> torch.Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(1))


def run(solver: Euler, x: torch.Tensor, start: int = 0) -> torch.Tensor:
    for i in range(start, 4):
        x = solver.step(model(x, SCHEDULE.sigmas[i]), i, x)
    return x


def test_equals_the_formula_in_double_precision():
    x = noise().double()
    for sigma, following in zip((1.0, 0.9375, 2.5 / 3, 0.625), (0.9375, 2.5 / 3, 0.625, 0.0), strict=True):
        x = x + (following - sigma) * model(x, sigma)
    torch.testing.assert_close(run(Euler(SCHEDULE), noise()).double(), x, rtol=0, atol=2e-6)


def test_the_last_step_returns_the_clean_prediction():
    x = noise()
    v = model(x, 0.625)
    assert torch.equal(Euler(SCHEDULE).step(v, 3, x), torch.sub(x, v, alpha=0.625))


def test_no_noise_is_added_between_steps():
    before = torch.get_rng_state()
    assert torch.equal(run(Euler(SCHEDULE), noise()), run(Euler(SCHEDULE), noise()))
    assert torch.equal(torch.get_rng_state(), before)


def test_a_constant_velocity_lands_on_its_clean_latents():
    x, x0 = noise(), torch.full(SHAPE, 0.25)
    v = x - x0  # noise - data: the straight path
    out = x
    for i in range(4):
        out = Euler(SCHEDULE).step(v, i, out)
    torch.testing.assert_close(out, x0, rtol=0, atol=1e-6)


def test_a_restored_run_is_bit_equal():
    first, x = Euler(SCHEDULE), noise()
    x = first.step(model(x, SCHEDULE.sigmas[0]), 0, x)
    second = Euler(SCHEDULE)
    second.restore(first.state(), 1)
    assert torch.equal(run(second, x, start=1), run(Euler(SCHEDULE), noise()))
