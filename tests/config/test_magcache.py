"""Which forwards MagCache skips, against the authors' rule written call by call."""

from __future__ import annotations

from typing import Any

import pytest

from lightx2v.config.magcache import forwards_of
from lightx2v.config.presets import resolve
from lightx2v.config.request import Request
from lightx2v.config.schedule import schedule_of
from lightx2v.errors import BadRequest, ConfigError


def ask(task: str = "t2v", **settings: Any) -> Request:
    picture = {} if task == "t2v" else {"image_path": "a.png"}
    base = {"feature_caching": "Mag", "steps": 40, "shift": 12.0 if task == "t2v" else 5.0}
    return Request(**{"task": task, "prompt": "a cat", **picture, **base, **settings})


def by_calls(
    ratios: list[float], experts: list[str], task: str, threshold: float, most: int, kept: float
) -> list[bool]:
    """Whether each call computes: the two prompts of each step in turn, as the authors' code for Wan2.2 counts them,
    started over where the expert changes."""
    calls, split = 2 * len(experts), 2 * experts.count("high")
    error, length, skips = [0.0, 0.0], [1.0, 1.0], [0, 0]
    computed = []
    for call in range(calls):
        branch, step = call % 2, call // 2
        if call in (split, split + 1):
            error[branch], length[branch], skips[branch] = 0.0, 1.0, 0
        low = split + (calls - split) * kept
        if task == "t2v":
            allowed = not (call < int(split * kept) or split <= call <= low)
        else:
            allowed = call >= int(low)
        skip = False
        if allowed and call not in (0, 1, split, split + 1):  # with few steps, theirs would reuse what is not there
            length[branch] *= ratios[round(step * (len(ratios) - 1) / (len(experts) - 1))]
            skips[branch] += 1
            error[branch] += abs(1 - length[branch])
            skip = error[branch] < threshold and skips[branch] <= most
            if not skip:
                error[branch], length[branch], skips[branch] = 0.0, 1.0, 0
        computed.append(not skip)
    return computed


SMOOTH = [1.0, *(1 - 0.004 - 0.15 * (k / 29) ** 6 for k in range(1, 30))]
"""A table of 30 steps."""


@pytest.mark.parametrize("task", ["t2v", "i2v"])
@pytest.mark.parametrize("steps", [10, 27, 30, 40, 50])
@pytest.mark.parametrize(("threshold", "most", "kept"), [(0.06, 2, 0.4), (0.12, 4, 0.2), (0.5, 6, 0.1), (0.0, 2, 0.2)])
def test_each_call_is_computed_or_skipped_as_the_authors_do(
    task: str, steps: int, threshold: float, most: int, kept: float
) -> None:
    request = ask(
        task, steps=steps, magcache_thresh=threshold, magcache_K=most, magcache_retention_ratio=kept,
        magcache_ratios=[SMOOTH],
    )  # fmt: skip
    expected = by_calls(SMOOTH, list(schedule_of(request).experts), task, threshold, most, kept)
    assert [runs for step in forwards_of(request).runs for runs in step] == expected


@pytest.mark.parametrize(
    ("task", "settings", "skipped"),
    [
        ("t2v", {}, 28),
        ("t2v", {"magcache_retention_ratio": 0.2}, 38),
        ("t2v", {"magcache_thresh": 0.12}, 30),
        ("i2v", {}, 21),
        ("i2v", {"magcache_thresh": 0.12}, 26),
        ("i2v", {"magcache_thresh": 0.24}, 29),
        ("t2v", {"magcache_thresh": 0.0}, 0),
        ("t2v", {"magcache_K": 0}, 0),
        ("t2v", {"magcache_retention_ratio": 1.0}, 0),
    ],
)
def test_the_published_tables_give_the_published_counts(task: str, settings: dict[str, Any], skipped: int) -> None:
    forwards = forwards_of(ask(task, **settings))
    assert (forwards.total, forwards.skipped, forwards.to_json()["computed"]) == (80, skipped, 80 - skipped)
    assert forwards.summary == (f"{skipped} of 80 evaluations skipped" if skipped else "")


def test_what_was_kept_is_of_the_same_expert_and_the_same_prompt() -> None:
    """At any threshold: the first forward of a prompt through an expert is computed, so nothing older is reused."""
    for task in ("t2v", "i2v"):
        request = ask(task, magcache_thresh=10.0, magcache_K=200, magcache_retention_ratio=0.0, guidance=(1.0, 3.0))
        forwards, experts = forwards_of(request), schedule_of(request).experts
        change = experts.index("low")
        assert forwards.runs[0] == (True,) and forwards.runs[change] == (True, True)
        assert forwards.skipped == 40 + 40 - change - (3 if task == "t2v" else 2 + change)
        assert len({len(step) for step in forwards.runs[:change]}) == 1


def test_the_image_models_high_noise_expert_skips_nothing() -> None:
    forwards = forwards_of(ask("i2v", magcache_thresh=10.0, magcache_K=200))
    assert all(all(step) for step in forwards.runs[:15]) and not all(all(step) for step in forwards.runs[15:])


def test_without_guidance_there_is_one_branch() -> None:
    forwards = forwards_of(ask(enable_cfg=False))
    assert (forwards.total, forwards.skipped) == (40, 14)


def test_each_branch_may_have_a_table_of_its_own() -> None:
    steady, wild = [1.0] * 40, [0.5] * 40
    forwards = forwards_of(ask(magcache_ratios=[steady, wild]))
    assert sum(not step[0] for step in forwards.runs) > 10 and all(step[1] for step in forwards.runs)


@pytest.mark.parametrize(
    ("task", "speed_up", "least"), [("t2v", 1.3, 1.3), ("t2v", 1.5, 1.5), ("t2v", 2.0, 2.0), ("i2v", 1.5, 1.5)]
)
def test_a_speed_up_is_reached_with_the_smallest_threshold(task: str, speed_up: float, least: float) -> None:
    forwards = forwards_of(ask(task, speed_up=speed_up))
    assert least <= forwards.total / forwards.computed < least + 0.1
    mild = forwards_of(ask(task, speed_up=1.1))
    assert mild.skipped < forwards.skipped


def test_an_unreachable_speed_up_skips_what_may_be_skipped() -> None:
    forwards = forwards_of(ask("i2v", speed_up=2.0))
    assert forwards.to_json() == {"computed": 41, "skipped": 39}


def test_exact_is_the_default_and_a_speed_up_of_one() -> None:
    plain = Request(prompt="a cat", steps=40)
    assert forwards_of(plain).skipped == 0 and plain.feature_caching == "NoCaching"
    assert ask(speed_up=1, magcache_thresh=0.5) == ask(feature_caching="NoCaching")
    faster = ask(feature_caching="NoCaching", speed_up=1.5)
    assert faster.feature_caching == "Mag" and Request.from_json(faster.to_json()) == faster


def test_a_speed_up_takes_the_place_of_a_presets_own_numbers() -> None:
    preset = {"task": "t2v", "infer_steps": 40, "feature_caching": "Mag", "magcache_thresh": 0.12, "magcache_K": 4}
    own = resolve(preset).request
    assert (own["magcache_thresh"], own["magcache_K"], own["speed_up"]) == (0.12, 4, None)
    faster = resolve(preset, {"speed_up": 1.5}).request
    assert (faster["magcache_thresh"], faster["magcache_K"], faster["speed_up"]) == (None, None, 1.5)
    assert resolve(preset, {"speed_up": 1}).request["feature_caching"] == "NoCaching"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": 9}, r'feature_caching is "Mag", but the video has 9 steps'),
        ({"feature_caching": "NoCaching", "speed_up": 2, "steps": 4}, "speed_up is 2, but the video has 4 steps"),
        (
            {"denoising_step_list": [1000, 750, 500, 250], "boundary_step_index": 2},
            "a distilled model makes 4 steps, which differ too much",
        ),
        ({"feature_caching": "Tea"}, "feature_caching is 'Tea'; expected NoCaching or Mag"),
        ({"speed_up": 0.5}, "speed_up is 0.5; expected a number from 1 to 3. Nearest valid value: 1"),
        ({"speed_up": 9}, "Nearest valid value: 3"),
        ({"magcache_thresh": -1}, "magcache_thresh is -1"),
        ({"magcache_K": 1.5}, "magcache_K is 1.5; expected a whole number"),
        ({"magcache_retention_ratio": 2}, "magcache_retention_ratio is 2"),
        ({"magcache_ratios": [1.0] * 40}, "magcache_ratios is .*expected one or two lists of 10 to 200 numbers"),
        ({"magcache_ratios": [[1.0] * 9]}, "a list of 9"),
        ({"magcache_ratios": [[1.0] * 9 + ["x"]]}, "magcache_ratios is 'x'"),
        ({"magcache_ratios": [[1.0] * 10] * 3}, "expected one or two lists"),
        ({"magcache_ratios": "x"}, "expected one or two lists"),
    ],
)
def test_what_cannot_be_is_refused_by_its_name(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(BadRequest, match=message):
        ask(**settings)


def test_a_file_of_lightx2v_with_mag_loads_unchanged_and_one_with_calibration_is_told_the_command() -> None:
    file = {"infer_steps": 40, "feature_caching": "Mag", "magcache_calibration": False, "magcache_K": 6}
    file |= {"magcache_thresh": 0.24, "magcache_retention_ratio": 0.2, "magcache_ratios": []}
    found = resolve(file)
    assert found.warnings == () and found.request["magcache_K"] == 6 and found.request["magcache_ratios"] is None
    with pytest.raises(ConfigError, match="python -m lightx2v.calibrate makes the table"):
        resolve(file | {"magcache_calibration": True})
    with pytest.raises(BadRequest, match='^feature_caching is "Mag", but a distilled model makes 4 steps'):
        resolve("t2v_distill_merged", {"feature_caching": "Mag"})
