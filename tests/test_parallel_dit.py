"""The DiT on a mesh of processes gives what it gives alone."""

from __future__ import annotations

import pytest
from parallel_ranks import ranks

from lightx2v.parallel.wire import shares

SHAPES = [[1, 4, 6], [3, 6, 10], [2, 2, 2]]
"""6, 45 and 2 tokens: fewer than processes, odd, and not divisible by 4."""


@pytest.mark.parametrize(("cfg", "seq", "heads"), [(1, 2, 5), (2, 1, 4), (2, 2, 4), (1, 4, 5)])
def test_every_layout_equals_one_process(cfg: int, seq: int, heads: int) -> None:
    for result in ranks(cfg * seq, "parallel_cases:dit", cfg, seq, heads, SHAPES):
        assert max(result["differences"]) <= 1e-5


def test_shares_differ_by_one_at_most() -> None:
    assert shares(45, 4) == [12, 11, 11, 11]
    assert shares(2, 4) == [1, 1, 0, 0]
    assert sum(shares(75_601, 8)) == 75_601
