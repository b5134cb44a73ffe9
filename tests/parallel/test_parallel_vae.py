"""The VAE in spatial shards on several processes gives the result of one process, with the attention in its middle."""

from __future__ import annotations

import parallel_parts
import pytest
from parallel_ranks import group

pytestmark = pytest.mark.multi


@pytest.mark.parametrize(("size", "shapes"), [(2, [[6, 7, 4], [1, 4, 3]]), (4, [[4, 11, 3]])])
def test_shards_equal_one_process(size: int, shapes: list[list[int]]) -> None:
    """Latent frames, height and width; heights that do not divide among them."""
    results = group(size).call(parallel_parts.vae, size, shapes)
    assert max(results[0]["decoded"]) <= 1e-4
    assert len(results[0]["decoded"]) == sum(frames for frames, _, _ in shapes)
    for result in results:
        assert max(result["encoded"]) <= 1e-4
