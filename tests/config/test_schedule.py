from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from lightx2v.config.schedule import shifted_schedule, step_list_schedule


def flow_grid(steps: int, shift: float) -> np.ndarray:
    """Sigmas in double precision from the definition, written apart from the code under test."""
    largest = float(torch.tensor(0.999, dtype=torch.float32))
    out = []
    for k in range(steps):
        s = largest * (steps - k) / steps
        out.append(shift * s / (1 + (shift - 1) * s))
    return np.array(out)


@pytest.mark.parametrize(
    ("shift", "boundary", "first", "last", "high"),
    [
        (12.0, 0.875, (999, 997, 995, 993, 990), (571, 492, 386, 235), 26),
        (5.0, 0.9, (999, 994, 989, 983), (288, 208, 113), 15),
        (3.0, 0.9, (999,), (), 10),
    ],
)
def test_forty_steps_give_the_published_timesteps_and_switch(shift, boundary, first, last, high):
    schedule = shifted_schedule(40, shift, boundary)
    assert schedule.steps == 40
    assert schedule.timesteps[: len(first)] == first
    assert schedule.timesteps[40 - len(last) :] == last
    assert schedule.experts == ("high",) * high + ("low",) * (40 - high)


@pytest.mark.parametrize("steps", [1, 2, 5, 20, 40, 50])
@pytest.mark.parametrize("shift", [1.0, 3.0, 5.0, 12.0, 16.0])
def test_base_sigmas_and_timesteps_follow_the_definition(steps, shift):
    schedule = shifted_schedule(steps, shift, 0.875)
    exact = flow_grid(steps, shift)
    assert schedule.sigmas == (*exact.astype(np.float32).tolist(), 0.0)
    assert all(type(t) is int for t in schedule.timesteps)
    # A timestep whose exact value is a whole number may fall on either side by rounding; there is none here.
    assert schedule.timesteps == tuple(math.trunc(1000 * s) for s in exact)
    assert list(schedule.timesteps) == sorted(schedule.timesteps, reverse=True)


def test_the_boundary_belongs_to_the_high_noise_expert():
    timesteps = shifted_schedule(40, 12.0, 0.875).timesteps
    at = shifted_schedule(40, 12.0, timesteps[7] / 1000)
    assert at.experts.index("low") == 8


def test_a_boundary_of_one_or_zero_uses_one_expert():
    assert set(shifted_schedule(10, 5.0, 1.0).experts) == {"low"}
    assert set(shifted_schedule(10, 5.0, 0.0).experts) == {"high"}


def test_the_distilled_schedule_is_the_published_one():
    schedule = step_list_schedule([1000, 750, 500, 250], 5.0, 2)
    f = np.float32
    assert schedule.sigmas == (1.0, 0.9375, float(f(2.5) / f(3)), 0.625, 0.0)
    assert schedule.timesteps == (1000.0, 937.5, float(f(1000) * (f(2.5) / f(3))), 625.0)
    assert schedule.timesteps[2] != int(schedule.timesteps[2])  # not cut off
    assert schedule.experts == ("high", "high", "low", "low")


def test_shift_seven_gives_the_published_distilled_sigmas():
    sigmas = step_list_schedule([1000, 750, 500, 250], 7.0, 2).sigmas
    assert sigmas == pytest.approx((1, 0.9545, 0.875, 0.7, 0), abs=5e-5)


@pytest.mark.parametrize("shift", [1.0, 5.0, 16.0])
def test_every_training_step_agrees_with_the_float32_grid(shift):
    steps = list(range(1000, 0, -1))
    grid = torch.linspace(1, 0, 1001)[:-1]
    grid = shift * grid / (1 + (shift - 1) * grid)
    schedule = step_list_schedule(steps, shift, 2)
    torch.testing.assert_close(torch.tensor(schedule.sigmas[:-1]), grid, rtol=0, atol=1.5e-7)
    torch.testing.assert_close(torch.tensor(schedule.timesteps), grid * 1000, rtol=0, atol=1.5e-4)


@pytest.mark.parametrize("index", [-1, 4, 5])
def test_a_boundary_index_outside_the_list_is_refused(index):
    with pytest.raises(ValueError, match="boundary_step_index"):
        step_list_schedule([1000, 750, 500, 250], 5.0, index)
