from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from diffusers import UniPCMultistepScheduler

from lightx2v.config.schedule import shifted_schedule, step_list_schedule
from lightx2v.sampling import Euler, UniPC

SHAPE = (16, 3, 4, 6)


def model(x: torch.Tensor, sigma: float) -> torch.Tensor:
    """Some smooth non-linear velocity; precise enough in any dtype to compare solvers on it."""
    return torch.sin(1.3 * x) * (0.5 + sigma) - 0.3 * x + 0.1 * math.cos(3 * sigma)


def run(solver, x: torch.Tensor, velocity=model) -> torch.Tensor:
    for i in range(solver.schedule.steps):
        x = solver.step(velocity(x, solver.schedule.sigmas[i]), i, x)
    return x


def noise(dtype=torch.float32) -> torch.Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(0)).to(dtype)


def reference_run(sigmas: tuple[float, ...], x: np.ndarray, velocity) -> np.ndarray:
    """UniPC-2, B2(h), data prediction, straight from the paper's formulas with a linear solve, in float64."""
    steps = len(sigmas) - 1
    alpha = [1 - s for s in sigmas]
    lam = [math.inf if s == 0 else math.log(1 - s) - math.log(s) for s in sigmas]
    m: list[np.ndarray] = []  # data predictions so far
    corrected = previous = x
    order = 0
    for k in range(steps):
        data = x - sigmas[k] * velocity(x, sigmas[k])
        if k == 0:
            corrected = x
        else:
            h = lam[k] - lam[k - 1]
            phi1 = np.expm1(-h)
            differences, ratios = [], []
            if order == 2:
                r = (lam[k - 2] - lam[k - 1]) / h
                ratios.append(r)
                differences.append((m[k - 2] - m[k - 1]) / r)
            ratios.append(1.0)
            differences.append(data - m[k - 1])
            g, b, factorial = phi1 / -h - 1, [], 1
            for j in range(1, order + 1):
                factorial *= j
                b.append(g * factorial / phi1)
                g = g / -h - 1 / (factorial * (j + 1))
            if order == 1:
                rho = np.array([0.5])
            else:
                rho = np.linalg.solve(np.array([[q**j for q in ratios] for j in range(order)]), np.array(b))
            bracket = sum(p * d for p, d in zip(rho, differences, strict=True))
            corrected = sigmas[k] / sigmas[k - 1] * previous - alpha[k] * phi1 * (m[k - 1] + bracket)
        m.append(data)
        order = min(2, steps - k, k + 1)
        h = lam[k + 1] - lam[k]
        phi1 = np.expm1(-h)
        x = sigmas[k + 1] / sigmas[k] * corrected - alpha[k + 1] * phi1 * data
        if order == 2:
            d1 = (m[k - 1] - data) / ((lam[k - 1] - lam[k]) / h)
            x = x - alpha[k + 1] * phi1 * 0.5 * d1
        previous = corrected
    return x


def numpy_model(x: np.ndarray, sigma: float) -> np.ndarray:
    return np.sin(1.3 * x) * (0.5 + sigma) - 0.3 * x + 0.1 * math.cos(3 * sigma)


@pytest.mark.parametrize(("steps", "shift"), [(1, 5.0), (2, 5.0), (3, 12.0), (10, 1.0), (10, 5.0), (40, 12.0)])
def test_equals_the_formulas_in_double_precision(steps, shift):
    schedule = shifted_schedule(steps, shift, 0.875)
    expected = reference_run(schedule.sigmas, noise(torch.float64).numpy(), numpy_model)
    torch.testing.assert_close(run(UniPC(schedule), noise(torch.float64)).numpy(), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("steps", "shift"), [(10, 5.0), (40, 12.0)])
def test_float32_stays_close_to_double_precision(steps, shift):
    schedule = shifted_schedule(steps, shift, 0.875)
    exact = run(UniPC(schedule), noise(torch.float64))
    single = run(UniPC(schedule), noise())
    assert single.dtype is torch.float32
    torch.testing.assert_close(single, exact.float(), rtol=0, atol=1e-5)


@pytest.mark.parametrize(("steps", "shift"), [(5, 5.0), (10, 3.0), (40, 12.0)])
def test_equals_diffusers(steps, shift):
    schedule = shifted_schedule(steps, shift, 0.875)
    theirs = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift)
    theirs.set_timesteps(sigmas=np.linspace(float(np.float32(0.999)), 0, steps + 1)[:-1])
    assert theirs.timesteps.tolist() == list(schedule.timesteps)
    assert theirs.sigmas.tolist() == list(schedule.sigmas)
    x = noise()
    for i, t in enumerate(theirs.timesteps):
        x = theirs.step(model(x, schedule.sigmas[i]), t, x, return_dict=False)[0]
    torch.testing.assert_close(run(UniPC(schedule), noise()), x, rtol=0, atol=2e-5)


@pytest.mark.parametrize("step_list", [[1000, 750, 500, 250], [1000], [900, 600, 300]])
def test_equals_diffusers_on_a_step_list_that_begins_at_pure_noise(step_list):
    schedule = step_list_schedule(step_list, 5.0, 0)
    theirs = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=5.0)
    theirs.set_timesteps(sigmas=np.array(step_list) / 1000)
    assert theirs.sigmas.tolist() == pytest.approx(schedule.sigmas, abs=2e-6)
    x = noise()
    for i, t in enumerate(theirs.timesteps):
        x = theirs.step(model(x, schedule.sigmas[i]), t, x, return_dict=False)[0]
    torch.testing.assert_close(run(UniPC(schedule), noise()), x, rtol=0, atol=2e-5)


def gaussian_error(solver_class, steps: int) -> float:
    """Distance from the exact solution when the data are normal with mean 0.7 and deviation 0.5.

    There the marginals are normal, so the velocity and the flow from sigma to 0 are known in closed form.
    """
    mean, deviation = 0.7, 0.5

    def spread(sigma: float) -> float:
        return math.sqrt(((1 - sigma) * deviation) ** 2 + sigma**2)

    def velocity(x: torch.Tensor, sigma: float) -> torch.Tensor:
        gain = (1 - sigma) * deviation**2 / spread(sigma) ** 2
        x0 = mean + gain * (x - (1 - sigma) * mean)
        return (x - x0) / sigma

    schedule = shifted_schedule(steps, 3.0, 0.875)
    x, start = noise(torch.float64), schedule.sigmas[0]
    exact = mean + deviation / spread(start) * (x - (1 - start) * mean)
    return float((run(solver_class(schedule), x, velocity) - exact).abs().max())


def order(solver_class, coarse: int, fine: int) -> float:
    return math.log(gaussian_error(solver_class, coarse) / gaussian_error(solver_class, fine)) / math.log(fine / coarse)


def test_converges_with_second_order_where_euler_has_first():
    # The first steps cross so much of lambda that the asymptotic rate shows only from about 200 steps on.
    assert 1.9 < order(UniPC, 240, 960) < 2.2
    assert 0.9 < order(Euler, 240, 960) < 1.1
    assert gaussian_error(UniPC, 40) < gaussian_error(Euler, 320)


@pytest.mark.parametrize("steps", [1, 2, 200])
@pytest.mark.parametrize("shift", [0.01, 1.0, 100.0])
def test_the_limits_of_a_request_stay_finite(steps, shift):
    assert bool(run(UniPC(shifted_schedule(steps, shift, 0.875)), noise()).isfinite().all())


def test_the_last_step_returns_the_clean_prediction():
    schedule = shifted_schedule(6, 5.0, 0.9)
    solver, x = UniPC(schedule), noise()
    for i in range(5):
        x = solver.step(model(x, schedule.sigmas[i]), i, x)
    v = model(x, schedule.sigmas[5])
    torch.testing.assert_close(solver.step(v, 5, x), x - schedule.sigmas[5] * v, rtol=0, atol=1e-6)


def test_the_history_goes_on_when_the_expert_changes():
    early, late = shifted_schedule(10, 12.0, 0.99), shifted_schedule(10, 12.0, 0.5)
    assert early.experts != late.experts
    assert torch.equal(run(UniPC(early), noise()), run(UniPC(late), noise()))


@pytest.mark.parametrize("at", [0, 1, 2, 5, 9])
def test_a_restored_run_is_bit_equal(at):
    schedule = shifted_schedule(10, 5.0, 0.9)
    first, x = UniPC(schedule), noise()
    for i in range(at):
        x = first.step(model(x, schedule.sigmas[i]), i, x)
    state, reached = first.state(), x.clone()
    for i in range(at, 10):
        x = first.step(model(x, schedule.sigmas[i]), i, x)

    second = UniPC(schedule)
    second.restore(state, at)
    for i in range(at, 10):
        reached = second.step(model(reached, schedule.sigmas[i]), i, reached)
    assert torch.equal(reached, x)


def test_a_failed_step_leaves_the_solver_as_it_was():
    schedule = shifted_schedule(4, 5.0, 0.9)
    solver, x = UniPC(schedule), noise()
    x = solver.step(model(x, schedule.sigmas[0]), 0, x)
    before = solver.state()
    with pytest.raises(RuntimeError):
        solver.step(torch.zeros(3, 5), 1, x)
    assert solver.state() is before


def test_a_step_out_of_order_is_refused():
    solver = UniPC(shifted_schedule(4, 5.0, 0.9))
    with pytest.raises(ValueError, match="step 2"):
        solver.step(noise(), 2, noise())


def test_bf16_velocities_are_combined_in_float32():
    schedule = shifted_schedule(4, 5.0, 0.9)
    v = model(noise(), 1.0).bfloat16()
    assert torch.equal(UniPC(schedule).step(v, 0, noise()), UniPC(schedule).step(v.float(), 0, noise()))


def test_inputs_are_not_written_to():
    schedule = shifted_schedule(3, 5.0, 0.9)
    solver, x = UniPC(schedule), noise()
    for i in range(3):
        v = model(x, schedule.sigmas[i])
        x_before, v_before = x.clone(), v.clone()
        following = solver.step(v, i, x)
        assert torch.equal(x, x_before) and torch.equal(v, v_before)
        x = following
