"""Another thread reads weights from disk while blocks run; its errors are raised where the weights are needed."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from offload_toys import CPU, forward, toy
from patience import PATIENCE

from lightx2v.errors import CheckpointError
from lightx2v.offload.device_copies import HostCopies
from lightx2v.offload.weight_streamer import WeightStreamer

BLOCKS = 6
Read = Callable[[frozenset[str]], list[tuple[str, torch.Tensor]]]


def on_disk(before: Callable[[str, frozenset[str]], None], **more: Any) -> WeightStreamer:
    """Two modules that are read from "disk"; every read calls `before` first."""
    streamed = {}
    for name, each in toy("hl", BLOCKS).items():
        state = {key: value.clone() for key, value in each.module.state_dict().items()}

        def read(names: frozenset[str], into: Any, name: str = name, state: dict[str, torch.Tensor] = state) -> Any:
            before(name, names)
            return [(key, state[key]) for key in names]

        each.module.to("meta")
        streamed[name] = replace(each, reader=read)
    return WeightStreamer(streamed, HostCopies(poison=True), CPU, **more)


@pytest.fixture(scope="module")
def expected() -> dict[str, torch.Tensor]:
    return {name: forward(WeightStreamer(toy("hl", BLOCKS), HostCopies(), CPU, resident=BLOCKS), name) for name in "hl"}


@pytest.fixture
def threads() -> Iterator[set[threading.Thread]]:
    """The threads that read."""
    yield (seen := set())
    assert all(thread.name.startswith("lightx2v-read") for thread in seen)


@pytest.mark.parametrize(("resident", "prefetch_slots"), [(0, 3), (0, 2), (2, 3), (3, 1), (BLOCKS, 3)])
def test_another_thread_reads_and_the_result_is_the_same(
    expected: dict[str, torch.Tensor], threads: set[threading.Thread], resident: int, prefetch_slots: int
) -> None:
    streamer = on_disk(
        lambda *_: threads.add(threading.current_thread()), resident=resident, prefetch_slots=prefetch_slots
    )
    for name, then in ("hh", "hl", "ll", "lh", "hl", "lh"):
        assert torch.equal(forward(streamer, name, then), expected[name])
    streamer.close()
    assert threads and not [thread for thread in threads if thread.is_alive()], "closing ends the thread"


def test_the_next_blocks_are_read_while_one_runs(expected: dict[str, torch.Tensor]) -> None:
    begun = {index: threading.Event() for index in range(BLOCKS)}

    def note(_: str, names: frozenset[str]) -> None:
        for index in {int(name.split(".")[0]) for name in names} & begun.keys():
            begun[index].set()

    streamer = on_disk(note, resident=0, prefetch_slots=3)
    waited: list[bool] = []
    # Block 0 runs until block 2 is being read: in the thread that runs blocks that would never be.
    streamer.modules["h"][0].register_forward_hook(lambda *_: waited.append(begun[2].wait(PATIENCE)))
    begun[2].clear()
    assert torch.equal(forward(streamer, "h"), expected["h"])
    assert waited == [True]
    streamer.close()


def test_a_failed_read_is_raised_and_tried_again(expected: dict[str, torch.Tensor]) -> None:
    broken = True

    def fail(name: str, names: frozenset[str]) -> None:
        if broken and any(key.startswith("3.") for key in names):
            raise CheckpointError("it became shorter")

    streamer = on_disk(fail, resident=1, prefetch_slots=2)
    with pytest.raises(CheckpointError, match="shorter"):
        forward(streamer, "h")
    broken = False
    for name in "hlh":
        assert torch.equal(forward(streamer, name), expected[name])
    streamer.close()


def test_giving_the_memory_back_waits_for_a_read_that_has_begun(expected: dict[str, torch.Tensor]) -> None:
    go, reading = threading.Event(), threading.Event()

    def slow(_: str, names: frozenset[str]) -> None:
        if any(key.startswith("0.") for key in names):
            reading.set()
            assert go.wait(PATIENCE)

    go.set()
    streamer = on_disk(slow, resident=0, prefetch_slots=2)

    def hold(*_: object) -> None:  # from here on block 0 is read for the next forward only
        go.clear()
        reading.clear()

    hook = streamer.modules["h"][4].register_forward_pre_hook(hold)
    assert torch.equal(forward(streamer, "h"), expected["h"]) and reading.wait(PATIENCE) and not go.is_set()
    hook.remove()
    threading.Timer(0.05, go.set).start()
    streamer.free()
    assert go.is_set(), "the read was waited for"
    assert torch.equal(forward(streamer, "h"), expected["h"])
    streamer.close()


def test_without_read_ahead_the_callers_thread_reads(expected: dict[str, torch.Tensor]) -> None:
    seen: set[str] = set()
    streamer = on_disk(lambda *_: seen.add(threading.current_thread().name), resident=0, read_ahead=False)
    assert torch.equal(forward(streamer, "h"), expected["h"]) and seen == {threading.current_thread().name}
    streamer.close()
