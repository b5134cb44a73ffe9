from __future__ import annotations

import numpy as np
import pytest
import torch

from lightx2v.config import request as request_module
from lightx2v.config.request import draw_seed
from lightx2v.config.schedule import shifted_schedule, step_list_schedule
from lightx2v.errors import Cancelled, NumericsError, OutOfMemory
from lightx2v.progress import CancelToken
from lightx2v.sampling import LCM, SAMPLERS, Euler, Solver, UniPC, denoise, guided, initial_noise, still_warning

SHAPE = (16, 3, 4, 6)


def velocity(expert: str, latents: torch.Tensor, timestep: float, i: int) -> torch.Tensor:
    return torch.tanh(latents) * (2.0 if expert == "high" else 1.5) - timestep / 1000


SCHEDULES = {"shift": shifted_schedule(8, 5.0, 0.9), "list": step_list_schedule([1000, 750, 500, 250], 5.0, 2)}
NAMES = {UniPC: "unipc", Euler: "euler", LCM: "lcm"}


def fresh(solver: Solver) -> Solver:
    return SAMPLERS[NAMES[type(solver)]](solver.schedule, 7, 0)


@pytest.fixture(params=[(name, kind) for name in SAMPLERS for kind in SCHEDULES], ids="-".join)
def solver(request: pytest.FixtureRequest) -> Solver:
    """Every sampler, with either kind of schedule."""
    name, kind = request.param
    return SAMPLERS[name](SCHEDULES[kind], 7, 0)


def test_every_step_asks_the_scheduled_expert_at_the_scheduled_time(solver):
    asked = []

    def recording(expert, latents, timestep, i):
        asked.append((i, expert, timestep))
        return velocity(expert, latents, timestep, i)

    schedule = solver.schedule
    denoise(solver, recording, initial_noise(SHAPE, 0))
    assert asked == list(zip(range(schedule.steps), schedule.experts, schedule.timesteps, strict=True))
    assert {expert for _, expert, _ in asked} == {"high", "low"}


def test_the_table_and_the_names_are_the_same() -> None:
    assert tuple(SAMPLERS) == request_module.SAMPLERS


def test_equals_the_steps_taken_by_hand(solver):
    x, by_hand = initial_noise(SHAPE, 0), fresh(solver)
    for i, (expert, t) in enumerate(zip(solver.schedule.experts, solver.schedule.timesteps, strict=True)):
        x = by_hand.step(velocity(expert, x, t, i), i, x)
    out = denoise(solver, velocity, initial_noise(SHAPE, 0))
    assert torch.equal(out, x) and out.dtype is torch.float32


def test_the_noise_that_was_passed_is_not_written_to(solver):
    x = initial_noise(SHAPE, 0)
    denoise(solver, velocity, x)
    assert torch.equal(x, initial_noise(SHAPE, 0))


def test_on_step_sees_the_latents_and_the_clean_guess(solver):
    seen = []
    noise = initial_noise(SHAPE, 0)
    out = denoise(solver, velocity, noise, on_step=lambda i, latents, x0: seen.append((i, latents, x0())))
    schedule = solver.schedule
    assert [i for i, _, _ in seen] == list(range(schedule.steps))
    assert torch.equal(seen[-1][1], out)
    v = velocity(schedule.experts[0], noise, schedule.timesteps[0], 0)
    torch.testing.assert_close(seen[0][2], noise - schedule.sigmas[0] * v, rtol=0, atol=1e-6)
    torch.testing.assert_close(seen[-1][2], out, rtol=0, atol=1e-5)


@pytest.mark.parametrize("failing", [0, 1, 2, 3])
def test_a_run_goes_on_from_the_step_that_ran_out_of_memory_bit_by_bit(solver, failing):
    whole = denoise(fresh(solver), velocity, initial_noise(SHAPE, 3))
    latents, state, start = initial_noise(SHAPE, 3), solver.state(), 0

    def keep(i, new_latents, x0):
        nonlocal latents, state, start
        latents, state, start = new_latents, solver.state(), i + 1

    def exhausted(expert, x, timestep, i):
        if i == failing:
            raise OutOfMemory("no memory")
        return velocity(expert, x, timestep, i)

    with pytest.raises(OutOfMemory):
        denoise(solver, exhausted, latents, on_step=keep)
    assert start == failing
    again = fresh(solver)
    again.restore(state, start)
    assert torch.equal(denoise(again, velocity, latents, start=start), whole)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_number_that_is_none_names_its_step_expert_and_backend(solver, value):
    def broken(expert, latents, timestep, i):
        v = velocity(expert, latents, timestep, i)
        if i == 2:
            v[3, 1, 2, 4] = value
        return v

    total, expert = solver.schedule.steps, solver.schedule.experts[2]
    with pytest.raises(NumericsError, match=rf"step 3 of {total} \({expert}-noise expert, attention sage_attn2\)"):
        denoise(solver, broken, initial_noise(SHAPE, 0), backend="sage_attn2")


def test_broken_noise_is_found_in_the_first_step(solver):
    with pytest.raises(NumericsError, match="step 1 of"):
        denoise(solver, velocity, initial_noise(SHAPE, 0) * torch.nan)


def test_cancel_stops_between_two_steps(solver):
    token, done = CancelToken(), []

    def stop_after_two(i, latents, x0):
        done.append(i)
        if i == 1:
            token.cancel()

    with pytest.raises(Cancelled):
        denoise(solver, velocity, initial_noise(SHAPE, 0), on_step=stop_after_two, cancel=token)
    assert done == [0, 1]


def test_the_loop_records_no_gradients(solver):
    weight = torch.ones((), requires_grad=True)
    out = denoise(solver, lambda e, x, t, i: weight * x, initial_noise(SHAPE, 0))
    assert not out.requires_grad


@pytest.mark.parametrize("scale", [4.0, 3.0, -0.5])
def test_guidance_extrapolates_with_the_scale(scale):
    conditional, unconditional = torch.randn(SHAPE), torch.randn(SHAPE)
    expected = unconditional + scale * (conditional - unconditional)
    torch.testing.assert_close(guided([conditional, unconditional], scale), expected, rtol=0, atol=2e-6)


def test_guidance_one_is_the_conditional_and_zero_the_unconditional_velocity():
    conditional, unconditional = torch.randn(SHAPE), torch.randn(SHAPE)
    torch.testing.assert_close(guided([conditional, unconditional], 1.0), conditional)
    assert torch.equal(guided([conditional, unconditional], 0.0), unconditional)


def test_one_branch_is_passed_through():
    conditional = torch.randn(SHAPE)
    assert guided([conditional], 4.0) is conditional


def test_noise_depends_on_the_seed_and_on_nothing_else():
    first = initial_noise(SHAPE, 42)
    torch.manual_seed(7)
    assert torch.equal(initial_noise(SHAPE, 42), first)
    assert not torch.equal(initial_noise(SHAPE, 43), first)
    assert first.dtype is torch.float32 and first.device.type == "cpu" and first.shape == SHAPE


def test_noise_is_the_documented_stream():
    expected = torch.randn(SHAPE, generator=torch.Generator("cpu").manual_seed(2**32 - 1))
    assert torch.equal(initial_noise(SHAPE, 2**32 - 1), expected)


def test_drawn_seeds_differ_and_have_32_bits():
    seeds = {draw_seed() for _ in range(50)}
    assert len(seeds) > 45
    assert all(0 <= seed < 2**32 for seed in seeds)


def test_identical_frames_are_reported():
    frames = np.full((5, 8, 8, 3), 17, np.uint8)
    assert "All frames are identical" in (still_warning(frames) or "")
    assert "All frames are identical" in (still_warning(torch.from_numpy(frames)) or "")


def test_one_changed_value_in_one_frame_is_motion():
    frames = np.full((5, 8, 8, 3), 17, np.uint8)
    frames[4, 7, 7, 2] = 18
    assert still_warning(frames) is None
    assert still_warning(iter(frames)) is None


def test_a_single_picture_may_stand_still():
    assert still_warning(np.zeros((1, 8, 8, 3), np.uint8)) is None
    assert still_warning([]) is None
