"""Where replicas can be, and how many the waiting jobs need."""

from __future__ import annotations

import math

from lightx2v.farm.places import Node, free_places
from lightx2v.farm.scaling import IDLE_SECONDS, MORE_SECONDS, Scaling

BIG, SMALL = Node(id="b", name="big", gpus=8), Node(id="a", name="small", gpus=2)
PLAIN, HEAD = Node(id="c", name="plain", slots=2), Node(id="h", name="head")


def keys(*nodes: Node, taken: tuple[tuple[str, int], ...] = (), gpus: int = 1) -> list[tuple[str, int]]:
    return [place.key for place in free_places(nodes, taken, gpus)]


def test_a_replica_for_each_gpu_and_for_each_slot_of_a_machine_without_gpus() -> None:
    assert len(keys(BIG, SMALL)) == 10
    assert keys(PLAIN) == [("c", 0), ("c", 1)] and keys(HEAD) == []
    (first, *_) = free_places([BIG], (), 1)
    assert first.has_gpus and first.share == 8
    (first, *_) = free_places([PLAIN], (), 2)
    assert not first.has_gpus and first.share == 1


def test_a_group_is_on_one_machine() -> None:
    assert keys(BIG, SMALL, gpus=4) == [("b", 0), ("b", 1)]
    assert keys(BIG, SMALL, gpus=3) == [("b", 0), ("b", 1)]


def test_machines_fill_up_one_after_the_other() -> None:
    assert keys(BIG, SMALL)[:3] == [("b", 0), ("b", 1), ("b", 2)]
    assert keys(BIG, SMALL, taken=(("a", 1),))[0] == ("a", 0)


def test_the_number_of_replicas_follows_the_backlog() -> None:
    scaling = Scaling(2, 16)
    assert scaling.update(MORE_SECONDS, working=2, longest_idle=0.0) == 2
    assert scaling.update(3 * MORE_SECONDS, working=2, longest_idle=0.0) == 6
    assert scaling.update(3 * MORE_SECONDS, working=2, longest_idle=0.0) == 6, "the new ones are still starting"
    assert scaling.update(100 * MORE_SECONDS, working=6, longest_idle=0.0) == 16
    assert scaling.update(math.inf, working=0, longest_idle=0.0) == 16
    assert scaling.update(1.0, working=16, longest_idle=2 * IDLE_SECONDS) == 16, "jobs wait"
    assert [scaling.update(0.0, working=16, longest_idle=2 * IDLE_SECONDS) for _ in range(20)][-1] == 2


def test_a_backlog_that_cannot_be_predicted_asks_for_nothing() -> None:
    assert Scaling(1, 4).update(math.inf, working=1, longest_idle=0.0) == 1
