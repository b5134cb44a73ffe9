"""Runs that skip forwards: the right numbers, no work of the blocks, the same bits wherever and however they run."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from conftest import TinyModels
from offload_toys import CPU, PLANS, Exhausted
from stopped_runs import Shelf, go_on, stop_after
from tiny_runs import experts, latents

from lightx2v.config.magcache import forwards_of
from lightx2v.config.presets import resolve
from lightx2v.config.request import Request
from lightx2v.config.schedule import schedule_of
from lightx2v.cost.memory_ladder import MemoryLadder
from lightx2v.cost.memory_plan import workload_of
from lightx2v.engine.denoising import Denoising
from lightx2v.models.dit import WanDiT
from lightx2v.offload.device_copies import HostCopies, Slot
from lightx2v.offload.offloaded import Offloaded
from lightx2v.offload.resident import Resident
from lightx2v.pipeline import LightX2VPipeline
from lightx2v.progress import Progress

STEPS = 14
TABLES = [[0.99] * STEPS, [1.0] * 9 + [0.9] * (STEPS - 9)]
"""The unconditional branch changes more in the end, so that some steps compute only that one."""


@pytest.fixture(scope="module")
def engine(tiny: TinyModels) -> Any:
    return resolve({"model_path": str(tiny.t2v)}, {"device": "cpu"}).engine


@pytest.fixture
def pipe(engine: Any) -> Iterator[LightX2VPipeline]:
    with LightX2VPipeline.from_config(engine) as pipe:
        yield pipe


@pytest.fixture(scope="module")
def request_() -> Request:
    request = Request(
        prompt="a red ball", seed=3, height=32, width=48, frames=5, steps=STEPS, shift=5.0, boundary=0.8,
        sampler="euler", feature_caching="Mag", magcache_ratios=TABLES, magcache_thresh=0.05, magcache_K=2,
        magcache_retention_ratio=0.2,
    )  # type: ignore[arg-type]  # fmt: skip
    assert set(forwards_of(request).runs) >= {(True, True), (False, False), (False, True)}
    return request


def by_hand(pipe: LightX2VPipeline, request: Request) -> torch.Tensor:
    """Euler's method in float64, each branch with its own forward; a skipped one adds to its tokens what the blocks
    added the last time, as hooks on the first and the last block saw it."""
    schedule, runs = schedule_of(request), forwards_of(request).runs
    plain = latents(pipe, replace(request, feature_caching="NoCaching", steps=1, boundary=0.0))  # encodes the prompts
    prompts = [pipe._loaded().prompts[text].states_LD for text in (request.prompt, request.negative_text)]
    x = torch.randn(plain.shape, generator=torch.Generator().manual_seed(request.seed)).double()
    start, added = torch.empty(0), dict[tuple[str, int], torch.Tensor]()

    def first(module: Any, inputs: Any) -> None:
        nonlocal start
        start = inputs[0][0].clone()

    for step, expert in enumerate(schedule.experts):
        dit = experts(pipe)[expert == "low"]
        velocities = []
        for branch, prompt in enumerate(prompts):
            if runs[step][branch]:
                hooks = [dit.blocks[0].register_forward_pre_hook(first)]
                end: list[torch.Tensor] = []
                hooks.append(dit.blocks[-1].register_forward_hook(lambda m, i, o, end=end: end.append(o[0].clone())))
                (velocity,) = dit(x.float(), schedule.timesteps[step], [dit.encode_text(prompt)])
                added[expert, branch] = end[0] - start
                for hook in hooks:
                    hook.remove()
            else:
                tokens, _ = dit.embed(x.float()[None])
                time, _ = dit.embed_time(torch.tensor([schedule.timesteps[step]], dtype=torch.float64))
                velocity = dit.finish(tokens + added[expert, branch], time, x[None].shape)[0]
            velocities.append(velocity.double())
        scale = request.guidance[expert == "low"]
        v = velocities[1] + scale * (velocities[0] - velocities[1])
        x = x + (schedule.sigmas[step + 1] - schedule.sigmas[step]) * v
    return x


@torch.inference_mode()
def test_a_skipped_forward_adds_what_the_blocks_added_last_time(pipe: LightX2VPipeline, request_: Request) -> None:
    expected, got = by_hand(pipe, request_), latents(pipe, request_)
    assert (got - expected).abs().max() < 2e-5 * expected.abs().max()
    exact = latents(pipe, replace(request_, feature_caching="NoCaching"))
    assert (got - exact).abs().max() > 1e-3 * expected.abs().max()


def test_blocks_run_only_for_the_forwards_that_are_computed_and_the_report_counts_them(
    pipe: LightX2VPipeline, request_: Request
) -> None:
    rows, events = list[int](), list[Progress]()
    hooks = [
        dit.blocks[-1].register_forward_hook(lambda m, i, out: rows.append(sum(len(x) for x in out)))
        for dit in experts(pipe)
    ]
    pipe.run(request_)
    rows.clear()  # the first run of an engine also looks at the experts' order
    result = pipe.run(request_, on_progress=events.append)
    for hook in hooks:
        hook.remove()
    forwards = forwards_of(request_)
    assert rows == [sum(runs) for runs in forwards.runs if any(runs)]
    assert result.report()["forwards"] == {"computed": sum(rows), "skipped": 2 * STEPS - sum(rows)}
    denoise = [event for event in events if event.stage == "denoise"]
    assert denoise[0].message == f"{forwards.skipped} of 28 evaluations skipped"
    done = [event for event in denoise if event.step and not forwards.work(event.step)[0] < forwards.computed]
    assert all(event.eta == 0 for event in done), "no time is left once all that is computed is done"


@pytest.mark.slow
@pytest.mark.parametrize("sampler", ["euler", "unipc", "lcm"])
def test_a_run_goes_on_after_every_step_with_the_same_bits(
    pipe: LightX2VPipeline, request_: Request, sampler: Any
) -> None:
    request = replace(request_, sampler=sampler)
    whole, forwards = latents(pipe, request), forwards_of(request)
    went_on = set()
    for at in range(1, STEPS + 1):
        shelf = Shelf()
        stop_after(pipe, request, at, shelf)
        assert len(shelf.data or b"") < 200_000, "the saved step holds no residuals"
        result = go_on(pipe, request, shelf)
        assert result.latents is not None and torch.equal(result.latents, whole)
        newest = max((step for step in range(1, at + 1) if not forwards.reused(step - 1)), default=0)
        assert result.resumed_after == newest and result.report()["forwards"] == forwards.to_json()
        went_on.add(newest)
    assert 4 < len(went_on) < STEPS


class Log(HostCopies):
    """Notes the bytes of each copy."""

    def __init__(self) -> None:
        super().__init__(poison=True)
        self.sizes: list[int] = []

    def load(self, slot: Slot, source: torch.Tensor) -> object:
        self.sizes.append(source.nbytes)
        return super().load(slot, source)


def offload(pipe: LightX2VPipeline, name: str) -> Log:
    loaded, copies = pipe._loaded(), Log()
    assert isinstance(loaded.placement, Resident)
    placement = Offloaded(loaded.placement, ladder=MemoryLadder(PLANS[name]), device=CPU, copies=copies)
    pipe._engine = replace(loaded, placement=placement)
    return copies


@pytest.mark.slow
@pytest.mark.parametrize("name", PLANS)
def test_every_plan_gives_the_same_latents_and_a_skipped_step_copies_nothing(
    pipe: LightX2VPipeline, request_: Request, name: str
) -> None:
    expected = latents(pipe, request_)
    copies = offload(pipe, name)
    assert torch.equal(latents(pipe, request_), expected)
    runs, order = forwards_of(request_).runs, schedule_of(request_).experts
    with_blocks = [step for step in range(STEPS) if any(runs[step])]
    moved = list[int]()
    pipe.run(
        request_, on_progress=lambda e: moved.append(len(copies.sizes)) if e.stage == "denoise" and e.step else None
    )
    for step in range(1, STEPS):
        if step not in with_blocks:
            same = step + 1 == STEPS or order[step + 1] == order[step]
            assert moved[step] - moved[step - 1] == (0 if same else 1), "only the other expert's outer weights"


@pytest.mark.slow
@pytest.mark.parametrize("step", range(1, STEPS + 1))
def test_a_run_continues_after_out_of_memory_with_the_same_bits(
    pipe: LightX2VPipeline, request_: Request, step: int
) -> None:
    expected = latents(pipe, request_)
    offload(pipe, "swap")
    fault = Exhausted(1, step - 1)
    finish = WanDiT.finish

    def failing(dit: WanDiT, *args: Any) -> torch.Tensor:
        fault()
        return finish(dit, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(WanDiT, "finish", failing)
        result = pipe.run(request_, return_latents=True)
    assert fault.times == 0 and torch.equal(result.latents, expected)  # type: ignore[arg-type]


def test_the_plan_counts_what_is_kept_for_later_forwards(request_: Request) -> None:
    exact, unguided = replace(request_, feature_caching="NoCaching"), replace(request_, enable_cfg=False)
    assert [workload_of(each).residuals for each in (request_, exact, unguided)] == [2, 0, 1]


@pytest.mark.parametrize("sequential", [False, True])
def test_no_more_is_kept_than_the_plan_counts(pipe: LightX2VPipeline, request_: Request, sequential: bool) -> None:
    """Each kept tensor has the tokens of one prompt in the dtype of products, and none outlives its last use."""
    for dit in experts(pipe):
        dit.stack_tokens, dit.sequential_cfg, dit.chunk = 0, sequential, 7
    kept = list[int]()
    after = Denoising.after_step

    def watched(self: Any, step: int, *args: Any) -> None:
        after(self, step, *args)
        kept.append(len(self.residuals))
        assert all(r.shape == (1, 12, 24) and r.dtype == torch.float32 for r in self.residuals.values())
        assert set(self.residuals) == set(self.forwards.reused(step))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Denoising, "after_step", watched)
        pipe.run(request_)
    assert max(kept) == 2 and kept[-1] == 0
