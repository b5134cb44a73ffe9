"""Offloaded weights give the same latents bit by bit, in order, and leave the device when memory runs out."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from offload_toys import CPU, LAYERS, PLANS, RESIDENT, SWAP, Exhausted, forward, toy
from tiny import DiTSizes, build_tiny
from torch import nn

from lightx2v.config.presets import resolve
from lightx2v.config.request import Request
from lightx2v.cost.memory_ladder import MemoryLadder
from lightx2v.cost.memory_plan import MemoryPlan
from lightx2v.errors import Cancelled, OutOfMemory
from lightx2v.offload.device_copies import HostCopies, Slot
from lightx2v.offload.host_slabs import HostSlabs
from lightx2v.offload.offloaded import Offloaded
from lightx2v.offload.packed_weights import PackedWeights
from lightx2v.offload.resident import Resident
from lightx2v.offload.weight_streamer import WeightStreamer
from lightx2v.pipeline import LightX2VPipeline
from lightx2v.progress import CancelToken, Progress
from lightx2v.step_file import StepFile


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny(tmp_path_factory.mktemp("offload") / "t2v", dit=DiTSizes(num_layers=LAYERS))


@pytest.fixture(scope="module")
def settings(folder: Path) -> Any:
    small = {"height": 32, "width": 48, "frames": 5, "steps": 4, "boundary": 0.9, "shift": 5.0}
    return resolve({"model_path": str(folder), "device": "cpu"}, small)


@pytest.fixture
def pipe(settings: Any) -> Iterator[LightX2VPipeline]:
    with LightX2VPipeline.from_config(settings.engine) as pipe:
        yield pipe


@pytest.fixture(scope="module")
def request_(settings: Any) -> Request:
    return Request(**settings.request | {"prompt": "a red ball", "seed": 3})


@pytest.fixture(scope="module")
def expected(settings: Any, request_: Request) -> torch.Tensor:
    with LightX2VPipeline.from_config(settings.engine) as pipe:
        result = pipe.run(request_, return_latents=True)
        assert {step.expert for step in result.timings.steps} == {"high", "low"}
        assert result.latents is not None
        return result.latents


def offload(pipe: LightX2VPipeline, plan: MemoryPlan, copies: HostCopies | None = None) -> Offloaded:
    """Put the pipeline's model into another placement."""
    engine = pipe._engine
    assert engine is not None
    assert isinstance(engine.placement, Resident)
    placement = Offloaded(
        engine.placement, ladder=MemoryLadder(plan), device=CPU, copies=copies or HostCopies(poison=True)
    )
    pipe._engine = replace(engine, placement=placement)
    return placement


def run(pipe: LightX2VPipeline, request: Request, **more: Any) -> Any:
    return pipe.run(request, return_latents=True, **more)


@pytest.mark.slow
@pytest.mark.parametrize("name", PLANS)
def test_every_plan_gives_the_same_latents(
    pipe: LightX2VPipeline, request_: Request, expected: torch.Tensor, name: str
) -> None:
    offload(pipe, PLANS[name])
    assert torch.equal(run(pipe, request_).latents, expected)
    other = replace(request_, prompt="something else", steps=3)
    assert not torch.equal(run(pipe, other).latents, expected)
    assert torch.equal(run(pipe, request_).latents, expected), "the second run starts from the low expert's weights"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["swap", "prefix", "streamed", "two slots", "one slot"])
def test_sequential_cfg_changes_no_latents(pipe: LightX2VPipeline, request_: Request, name: str) -> None:
    placement = offload(pipe, replace(PLANS[name], sequential_cfg=True))
    for which in ("high", "low"):
        with placement.expert(which) as dit:  # type: ignore[arg-type]
            dit.stack_tokens = 0  # as in a long video: the prompts of short ones share a batch under every plan
    visits: list[int] = []
    dit.blocks[0].register_forward_pre_hook(lambda *_: visits.append(1))
    apart = run(pipe, request_).latents
    turns, placement._ladder.plan = len(visits), replace(placement._ladder.plan, sequential_cfg=False)
    assert torch.equal(run(pipe, request_).latents, apart) and turns == 2 * (len(visits) - turns)


class Recorder(HostCopies):
    """Counts the copies."""

    def __init__(self) -> None:
        super().__init__(poison=True)
        self.log: list[str] = []

    def load(self, slot: Slot, source: torch.Tensor) -> object:
        self.log.append("copy")
        return super().load(slot, source)


def test_a_resident_expert_is_copied_once_and_swapped_while_it_runs() -> None:
    copies = Recorder()
    streamer = WeightStreamer(toy("hl", 5), copies, CPU, resident=5)
    forward(streamer, "h")
    assert len(copies.log) == 6
    forward(streamer, "h")
    assert len(copies.log) == 6
    forward(streamer, "h", then="l")
    assert len(copies.log) == 12, "all of the other expert is on its way before it is asked for"
    forward(streamer, "l")
    assert len(copies.log) == 12


def test_streaming_copies_each_streamed_block_once_per_forward() -> None:
    copies = Recorder()
    streamer = WeightStreamer(toy("hl", 8), copies, CPU, resident=2, prefetch_slots=3)
    forward(streamer, "h")
    first = len(copies.log)
    assert first == 1 + 2 + 6 + 3, "outside, prefix, streamed, and the first three for the next forward"
    for _ in range(3):
        forward(streamer, "h")
    assert len(copies.log) == first + 3 * 6


def test_a_block_outside_of_its_use_is_an_error_not_a_wrong_result() -> None:
    streamer = WeightStreamer(toy("hl", 3), HostCopies(poison=True), CPU, resident=3)
    with streamer.use("h"), pytest.raises(RuntimeError, match="outside of its use"):
        streamer.modules["l"](torch.ones(1, 4))
    with pytest.raises(RuntimeError, match="outside of its use"):
        streamer.modules["h"](torch.ones(1, 4))


def test_using_a_slot_before_its_copy_shows() -> None:
    copies = HostCopies(poison=True)
    slot = Slot(torch.zeros(64, dtype=torch.uint8))
    with pytest.raises(RuntimeError, match="wait for"):
        copies.load(slot, torch.zeros(64, dtype=torch.uint8))
    copies.release(slot)
    copies.load(slot, torch.zeros(64, dtype=torch.uint8))
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2):
        assert slot.buffer.view(dtype).float().isnan().all()
    copies.acquire(slot)
    assert not slot.buffer.any()
    with pytest.raises(RuntimeError, match="in use"):
        copies.load(slot, torch.zeros(64, dtype=torch.uint8))


def test_packed_weights_keep_values_dtypes_and_memory_order() -> None:
    conv: Any = nn.Conv3d(3, 5, 3)
    conv = conv.to(memory_format=torch.channels_last_3d)
    module = nn.Sequential(conv, nn.Linear(7, 3).bfloat16())
    module.register_buffer("count", torch.arange(3))
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    strides = {name: tensor.stride() for name, tensor in module.state_dict().items()}
    weights = PackedWeights(module)
    weights.pack(HostSlabs(pin=False).take([weights.nbytes])[0])
    assert all(tensor.is_meta for tensor in module.state_dict().values())
    assert weights.host is not None and weights.host.data_ptr() % 4096 == 0
    weights.bind(weights.host)
    after = module.state_dict()
    assert list(after) == list(before)
    for name, tensor in after.items():
        assert torch.equal(tensor, before[name]) and tensor.stride() == strides[name]


@pytest.mark.slow
@pytest.mark.parametrize(("before", "after"), [(None, "streamed"), ("swap", "two slots"), ("one slot", None)])
def test_a_stopped_run_goes_on_with_the_same_bits_wherever_the_weights_are(
    settings: Any, request_: Request, expected: torch.Tensor, before: str | None, after: str | None, tmp_path: Path
) -> None:
    file, token = StepFile(tmp_path / "a.mp4", every=1e-6), CancelToken()
    for plan in (before, after):
        with LightX2VPipeline.from_config(settings.engine) as pipe:
            if plan is not None:
                offload(pipe, PLANS[plan])
            if plan is before:
                with pytest.raises(Cancelled):
                    stop = lambda event: event.preview and event.step == 2 and token.suspend()  # noqa: E731
                    pipe.run(request_, cancel=token, on_progress=stop, steps=file)
            else:
                result = run(pipe, request_, steps=file)
                assert torch.equal(result.latents, expected) and result.resumed_after == 2


@pytest.mark.slow
def test_cancel_and_errors_leave_a_usable_placement(
    pipe: LightX2VPipeline, request_: Request, expected: torch.Tensor
) -> None:
    offload(pipe, PLANS["prefix"])
    token = CancelToken()

    def stop(event: Progress) -> None:
        if event.stage == "denoise" and event.step == 2:
            token.cancel()

    with pytest.raises(Cancelled):
        pipe.run(request_, cancel=token, on_progress=stop)
    assert torch.equal(run(pipe, request_).latents, expected)


def test_weights_on_disk_give_the_same_result() -> None:
    expected = [forward(WeightStreamer(toy("hl", 4), HostCopies(), CPU, resident=4), name) for name in "hl"]
    lazy = {}
    for name, streamed in toy("hl", 4).items():
        state = {key: value.double() for key, value in streamed.module.state_dict().items()}

        def read(names: frozenset[str], into: Any, state: dict[str, torch.Tensor] = state) -> Any:
            return [(key, state[key]) for key in names]

        streamed.module.to("meta")
        lazy[name] = replace(streamed, reader=read)
    streamer = WeightStreamer(lazy, HostCopies(poison=True), CPU, resident=1, prefetch_slots=2)
    for _ in range(2):
        assert torch.equal(forward(streamer, "h", then="l"), expected[0])
        assert torch.equal(forward(streamer, "l"), expected[1])
    streamer.close()


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["text", "step 1", "step 2", "step 3", "step 4", "decode"])
@pytest.mark.parametrize(("start", "times"), [("resident", 1), ("resident", 2), ("swap", 1), ("prefix", 1)])
def test_a_run_continues_after_out_of_memory_with_less_on_the_device(
    pipe: LightX2VPipeline,
    request_: Request,
    expected: torch.Tensor,
    tmp_path: Path,
    stage: str,
    start: str,
    times: int,
) -> None:
    placement = offload(pipe, RESIDENT if start == "resident" else PLANS[start])
    with placement.text() as text, placement.vae() as vae:
        victims = {"text": [text.stack], "decode": [vae.conv2]}.get(stage, [])
    for which in ("high", "low") if stage.startswith("step") else ():
        with placement.expert(which) as dit:
            victims.append(dit.blocks[4])  # run once a step: short videos' prompts share a batch
    fault = Exhausted(times, int(stage[-1]) - 1 if stage.startswith("step") else 0)
    hooks = [victim.register_forward_pre_hook(fault) for victim in victims]
    before, steps = placement.plan, list[tuple[int, str | None]]()
    result = run(
        pipe,
        request_,
        save_result_path=tmp_path / "video.mp4",
        on_progress=lambda e: steps.append((e.step, e.expert)) if e.stage == "denoise" and e.step else None,
    )
    assert fault.times == 0 and torch.equal(result.latents, expected)
    assert steps == [(1, "high"), (2, "high"), (3, "low"), (4, "low")], "no step was repeated"
    assert len(result.warnings) == times
    name = "denoise" if stage.startswith("step") else stage
    assert all(f"ran out of memory in the stage {name}; the run went on with" in text for text in result.warnings)
    assert result.report()["plan"] == placement.plan != before
    for hook in hooks:
        hook.remove()
    level = placement.plan
    again = run(pipe, request_)
    assert again.warnings == () and again.report()["plan"] == level and torch.equal(again.latents, expected)


@pytest.mark.slow
@pytest.mark.parametrize("start", [0, 3, 10])
def test_a_run_continues_when_the_device_has_no_room_for_the_block_slots(
    pipe: LightX2VPipeline, request_: Request, expected: torch.Tensor, monkeypatch: pytest.MonkeyPatch, start: int
) -> None:
    placement = offload(pipe, PLANS["swap"])
    fault, slot = Exhausted(2, start), WeightStreamer._slot
    monkeypatch.setattr(WeightStreamer, "_slot", lambda streamer, nbytes: fault() or slot(streamer, nbytes))
    result = run(pipe, request_)
    assert fault.times == 0 and torch.equal(result.latents, expected) and len(result.warnings) == 2
    level = placement.plan
    again = run(pipe, request_)
    assert again.warnings == () and placement.plan == level and torch.equal(again.latents, expected)


@pytest.mark.slow
def test_out_of_memory_at_the_end_of_the_ladder_gives_advice(pipe: LightX2VPipeline, request_: Request) -> None:
    placement = offload(pipe, RESIDENT)
    with placement.expert("low") as low:
        hook = low.blocks[4].register_forward_pre_hook(Exhausted(10**6))
    with pytest.raises(OutOfMemory, match="smaller") as caught:
        pipe.run(request_)
    assert caught.value.__context__ is None
    assert placement.plan["mode"] == "stream" and placement.plan["resident_blocks"] == 0
    hook.remove()
    assert pipe.run(request_).seed == 3


@pytest.mark.slow
def test_the_same_prompt_is_encoded_once(pipe: LightX2VPipeline, request_: Request, expected: torch.Tensor) -> None:
    placement = offload(pipe, SWAP)
    calls: list[int] = []
    with placement.text() as text:
        text.stack.register_forward_pre_hook(lambda *_: calls.append(1))
    assert torch.equal(run(pipe, request_).latents, expected)
    assert len(calls) == 2
    first = run(pipe, replace(request_, prompt="another"))
    assert len(calls) == 3, "the negative prompt is the same"
    again = run(pipe, request_)
    assert len(calls) == 3 and torch.equal(again.latents, expected)
    assert again.text_tokens.keys() == first.text_tokens.keys() and "text" in again.timings.seconds


@pytest.mark.slow
def test_closing_frees_the_weights(pipe: LightX2VPipeline, request_: Request) -> None:
    placement = offload(pipe, PLANS["prefix"])
    pipe.run(request_)
    streamer = placement._streamers["experts"]
    placement.close()
    assert not streamer.packed and not streamer.own and not streamer.shared
