"""Phases: who denoises when, against hand-counted steps, and the boundaries that are special cases of them."""

from __future__ import annotations

import math
from typing import Any

import pytest

from lightx2v.config.phases import MAX_PHASES, Phase
from lightx2v.config.presets import resolve
from lightx2v.config.request import Request
from lightx2v.config.schedule import schedule_of
from lightx2v.cost.run_time import estimate_cost
from lightx2v.errors import BadRequest, ConfigError

THREE = [
    {"expert": "high", "guidance": 3.5},
    {"expert": "high", "below_timestep": 965, "guidance": 1},
    {"expert": "low", "below_timestep": 800, "guidance": 1},
]
LIST = {"denoising_step_list": [1000, 750, 500, 250], "enable_cfg": True}


def video(**settings: Any) -> Request:
    return Request(prompt="a cat", **settings)


def refused(**settings: Any) -> str:
    with pytest.raises(BadRequest) as caught:
        video(**settings)
    return str(caught.value)


def test_three_phases_of_eight_steps_are_those_counted_by_hand() -> None:
    schedule = schedule_of(video(phases=THREE, steps=8, shift=3.0, sampler="euler"))
    # s = 1 - k/8 of .999, t = 3s / (1 + 2s): 999, 954, 899, 833, 749, 642, 499, 299
    assert schedule.timesteps == (999, 954, 899, 832, 749, 642, 499, 299)
    assert schedule.numbers == (0, 1, 1, 1, 2, 2, 2, 2)
    assert schedule.experts == ("high",) * 4 + ("low",) * 4
    assert schedule.forwards == (2, 1, 1, 1, 1, 1, 1, 1)
    assert schedule.to_json() == [
        {"expert": "high", "steps": 1, "guidance": 3.5, "forwards_per_step": 2, "sampler": "euler"},
        {"expert": "high", "steps": 3, "guidance": 1.0, "forwards_per_step": 1, "sampler": "euler"},
        {"expert": "low", "steps": 4, "guidance": 1.0, "forwards_per_step": 1, "sampler": "euler"},
    ]


@pytest.mark.parametrize("boundary", [0.0, 0.875, 0.9, 1.0])
def test_a_boundary_is_two_phases(boundary: float) -> None:
    short = video(steps=40, shift=12.0, boundary=boundary, guidance=(4.0, 1.0))
    long = video(
        steps=40, shift=12.0, guidance=(4.0, 1.0),
        phases=[{"expert": "high"}, {"expert": "low", "below_timestep": 1000 * boundary}],
    )  # fmt: skip
    assert schedule_of(short) == schedule_of(long)
    assert short.guided == long.guided == (True, False)


@pytest.mark.parametrize("index", [0, 2, 3])
def test_a_boundary_step_index_is_two_phases(index: int) -> None:
    short = video(**LIST, boundary_step_index=index)
    long = video(**LIST, phases=[{"expert": "high"}, {"expert": "low", "from_step": index}])
    assert schedule_of(short) == schedule_of(long)


def test_one_phase_may_make_the_whole_video() -> None:
    schedule = schedule_of(video(phases=[{"expert": "low_noise_model", "guidance": 1}], steps=5))
    assert schedule.experts == ("low",) * 5 and sum(schedule.forwards) == 5


def test_a_phase_without_a_step_is_passed_over() -> None:
    # At shift 1 the timesteps of four steps are 999, 749, 499, 249: none is in the second phase.
    phases = [{"expert": "high"}, {"expert": "high", "below_timestep": 990}, {"expert": "low", "below_timestep": 980}]
    schedule = schedule_of(video(phases=phases, steps=4, shift=1.0))
    assert schedule.numbers == (0, 2, 2, 2)
    assert [phase["steps"] for phase in schedule.to_json()] == [1, 3]


def test_without_guidance_no_phase_has_any() -> None:
    request = video(phases=THREE, steps=8, enable_cfg=False)
    assert set(schedule_of(request).forwards) == {1} and request.negative_text is None


def test_a_phase_without_guidance_of_its_own_takes_that_of_its_expert() -> None:
    phases = [{"expert": "high"}, {"expert": "high", "from_step": 1, "guidance": 1}, {"expert": "low", "from_step": 2}]
    request = video(phases=phases, guidance=(4.0, 3.0), sampler="lcm")
    assert [(phase.guidance, phase.sampler) for phase in request.timeline] == [(4.0, "lcm"), (1.0, "lcm"), (3.0, "lcm")]
    assert request.guided == (True, True)


def test_the_estimate_counts_the_forwards_of_every_phase() -> None:
    many, few = video(phases=THREE, steps=8, shift=3.0), video(steps=8, shift=3.0, enable_cfg=False)
    ratio = estimate_cost(many).size["denoise"] / estimate_cost(few).size["denoise"]
    assert ratio == pytest.approx(9 / 8)


def test_json_keeps_phases() -> None:
    request = video(phases=THREE, steps=8)
    assert request.to_json()["phases"] == THREE
    assert Request.from_json(request.to_json()) == request


@pytest.mark.parametrize(
    ("phases", "said"),
    [
        ([], "phases is []"),
        ("high", "phases is 'high'"),
        ([{"expert": "high"}] * (MAX_PHASES + 1), f"1 to {MAX_PHASES}"),
        (["high"], "list of objects"),
        ([{}], "phases: expert is None; expected high or low"),
        ([{"expert": ["high"]}], "expected high or low"),
        ([{"expert": "middle"}], "'middle'"),
        ([{"expert": "high", "cfg": 3}], "Did you mean"),
        ([{"expert": "high", "guidance": float("nan")}], "phases: guidance"),
        ([{"expert": "high", "sampler": "heun"}], "phases: sampler"),
        ([{"expert": "high", "from_step": 0}], "phase 1 begins with the video; expected neither"),
        ([{"expert": "high"}, {"expert": "low"}], "phase 2 has none of below_timestep and from_step; expected one"),
        ([{"expert": "high"}, {"expert": "low", "from_step": 1, "below_timestep": 9}], "phase 2 has both of"),
        ([{"expert": "low"}, {"expert": "high", "from_step": 2}], "Noise only falls"),
        ([{"expert": "high"}, {"expert": "low", "from_step": 40}], "begins at step 40"),
        ([{"expert": "high"}, {"expert": "low", "from_step": -1}], "phases: from_step is -1"),
        ([{"expert": "high"}, {"expert": "low", "below_timestep": 1001}], "Nearest valid value: 1000"),
        (
            [{"expert": "high"}, {"expert": "high", "below_timestep": 800}, {"expert": "low", "below_timestep": 900}],
            "below_timestep is 800, 900; expected numbers that fall",
        ),
        (
            [{"expert": "high"}, {"expert": "high", "from_step": 5}, {"expert": "low", "from_step": 5}],
            "from_step is 5, 5; expected numbers that rise",
        ),
    ],
)
def test_phases_that_cannot_be_are_refused(phases: Any, said: str) -> None:
    assert said in refused(phases=phases, steps=40)


def test_phases_and_a_boundary_exclude_each_other() -> None:
    assert "boundary is 0.9; expected null beside phases" in refused(phases=THREE, boundary=0.9)
    assert "boundary_step_index is 2" in refused(**LIST, phases=THREE, boundary_step_index=2)


def test_an_override_replaces_the_other_way_to_say_it() -> None:
    over = resolve("t2v_base", {"phases": THREE})
    assert (over.request["boundary"], len(over.request["phases"])) == (None, 3)
    distilled = resolve("t2v_distill_lora", {"phases": [{"expert": "high"}, {"expert": "low", "from_step": 3}]})
    assert schedule_of(video(**distilled.request)).experts == ("high",) * 3 + ("low",)
    back = resolve({"task": "t2v", "phases": THREE}, {"boundary": 0.5})
    assert (back.request["boundary"], back.request["phases"]) == (0.5, None)
    with pytest.raises(BadRequest, match=r"boundary_ratio is 0\.5; expected null beside phases"):
        resolve("t2v_base", {"phases": THREE, "boundary_ratio": 0.5})


def test_a_guidance_of_one_needs_one_forward_and_any_other_two() -> None:
    assert [Phase(expert="high", guidance=scale).guided for scale in (None, 1.0, 0.0, 3.5)] == [
        False,
        False,
        True,
        True,
    ]


def test_a_lora_has_one_strength_or_one_for_each_phase() -> None:
    lora = {"name": "high_noise_model", "path": "a.safetensors", "strength": [0, 1, 0.5]}
    request = video(phases=THREE, steps=8, loras=[lora])
    assert request.loras is not None and request.loras[0].strength == (0.0, 1.0, 0.5) and request.loras[0].varies
    assert Request.from_json(request.to_json()) == request
    assert "expected one number, or one for each of the 2 phases" in refused(loras=[lora])
    for wrong in ([], [1] * (MAX_PHASES + 1), [0, "1", 1], [math.nan] * 3):
        assert "LoRA strength is" in refused(phases=THREE, steps=8, loras=[lora | {"strength": wrong}])
    with pytest.raises(ConfigError, match="one for each of the 2 phases"):
        resolve("t2v_distill_lora", {"lora_configs": [lora]})
    with pytest.raises(ConfigError, match="each has one strength"):
        resolve("demo_t2v_merged", {"lora_configs": [lora | {"strength": [0, 1]}]})
