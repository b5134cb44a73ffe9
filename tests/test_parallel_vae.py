"""The VAE in bands of rows on several processes gives what it gives alone, attention in its middle included."""

from __future__ import annotations

import pytest
from parallel_ranks import ranks


@pytest.mark.parametrize("size", [2, 4])
def test_bands_equal_one_process(size: int) -> None:
    results = ranks(size, "parallel_cases:vae", size, [[4, 6, 4], [3, 11, 5], [1, 4, 3], [6, 4, 6]])
    assert max(results[0]["decoded"]) <= 1e-4
    assert len(results[0]["decoded"]) == 14
    for result in results:
        assert max(result["encoded"]) <= 1e-4
