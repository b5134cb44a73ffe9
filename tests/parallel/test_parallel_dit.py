"""The DiT on a mesh of processes gives the result of one process."""

from __future__ import annotations

import parallel_parts
import pytest
from parallel_ranks import group

from lightx2v.parallel.collectives import shard_sizes

SHAPES = [[1, 4, 6], [3, 6, 10], [2, 2, 2]]
"""6, 45 and 2 tokens: fewer than processes, odd, and not divisible by 4."""


@pytest.mark.multi
@pytest.mark.parametrize("prompts", [2, 1])
@pytest.mark.parametrize(
    ("cfg", "seq", "heads"), [(1, 2, 5), (2, 1, 4), (2, 2, 4), (1, 4, 5), (1, 3, 4), (2, 2, 3), (1, 4, 2)]
)
def test_every_layout_equals_one_process(cfg: int, seq: int, heads: int, prompts: int) -> None:
    for result in group(cfg * seq).call(parallel_parts.dit, cfg, seq, heads, SHAPES, prompts):
        assert max(result["differences"]) <= 1e-5
        assert any("swap" in kinds for kinds in result["sent"].values()) == (seq > 1 or prompts == 1)


def test_shard_sizes_differ_by_at_most_one() -> None:
    assert shard_sizes(45, 4) == [12, 11, 11, 11]
    assert shard_sizes(2, 4) == [1, 1, 0, 0]
    assert sum(shard_sizes(75_601, 8)) == 75_601
