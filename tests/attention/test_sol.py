"""Sparse attention: which steps, blocks and lengths are exact, and the order of a video's tokens."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from dit_reference import COND, LATENTS, UNCOND, draw, make, relative
from torch import Tensor

from lightx2v.attention import sol
from lightx2v.attention.morton import TokenOrder, morton_order
from lightx2v.attention.sdpa import sdpa
from lightx2v.attention.sol import SolAttention
from lightx2v.config.sol_attn_setting import SolAttnSetting


class Calls(Counter[str]):
    """Counts what runs; both kernels are exact."""

    def attention(self, **setting: Any) -> SolAttention:
        return SolAttention(self.sparse, self.dense, "dense", SolAttnSetting(**setting))

    def sparse(self, q: Tensor, k: Tensor, v: Tensor, tau: float) -> Tensor:
        self[f"sparse {tau:g}"] += 1
        return sdpa(q, k, v)

    def dense(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        self["dense"] += 1
        return sdpa(q, k, v)


@pytest.fixture
def any_length(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sol, "LEAST_TOKENS", 1)


@pytest.mark.parametrize("grid", [(1, 1, 1), (3, 4, 5), (21, 2, 3), (1, 7, 1), (4, 8, 4)])
def test_morton_order_sorts_by_the_bits_of_the_places_in_turn(grid: tuple[int, int, int]) -> None:
    def code(token: int) -> int:
        time, row = divmod(token, grid[1] * grid[2])
        height, width = divmod(row, grid[2])
        digits = [f"{place:012b}" for place in (time, height, width)]
        return int("".join(t + h + w for t, h, w in zip(*digits, strict=True)), 2)

    tokens = grid[0] * grid[1] * grid[2]
    assert morton_order(grid).tolist() == sorted(range(tokens), key=code)


def test_a_block_of_64_tokens_is_a_cube() -> None:
    for block in morton_order((8, 8, 8)).split(64):
        for place in (block // 64, block // 8 % 8, block % 8):
            assert int(place.max() - place.min()) == 3


def test_the_order_is_kept_for_the_grid_in_use() -> None:
    order, cpu = TokenOrder(), torch.device("cpu")
    assert order((2, 3, 4), cpu) is order((2, 3, 4), cpu)
    assert len(order((2, 3, 5), cpu)) == 30 and len(order((2, 3, 4), cpu)) == 24


@pytest.mark.parametrize(("steps", "exact"), [(50, 10), (40, 8), (20, 4), (8, 1), (5, 1), (4, 0), (1, 0)])
def test_a_fifth_of_the_steps_is_exact_unless_a_number_is_given(steps: int, exact: int) -> None:
    found = [Calls().attention().in_step(step, steps).exact for step in range(steps)]
    assert found == [True] * exact + [False] * (steps - exact)
    assert [Calls().attention(dense_steps=2).in_step(step, 4).exact for step in range(4)] == [True, True, False, False]


@pytest.mark.usefixtures("any_length")
def test_the_blocks_that_are_named_are_exact() -> None:
    calls = Calls()
    dit = make(self_attention=calls.attention(tau=0.5, dense_layers="0-1"))
    blocks = len(dit.blocks)
    with torch.no_grad():
        dit(LATENTS, 500.0, [dit.encode_text(COND)])
    assert calls == {"dense": 2, "sparse 0.5": blocks - 2}
    calls.clear()
    dit.self_attention = calls.attention().in_step(0, 40)
    with torch.no_grad():
        dit(LATENTS, 500.0, [dit.encode_text(COND)])
    assert calls == {"dense": blocks}


def test_short_videos_and_prompts_are_exact() -> None:
    calls = Calls()
    attention = calls.attention()
    q, k = torch.randn(1, 128, 2, 8), torch.randn(1, 64, 2, 8)
    attention(q, q, q)
    assert calls == {"dense": 1}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sol, "LEAST_TOKENS", 100)
        attention(q, q, q)
        attention(q, k, k)
    assert calls == {"dense": 2, "sparse 1": 1}


@pytest.mark.usefixtures("any_length")
@pytest.mark.parametrize("size", [(3, 8, 12), (1, 2, 2), (5, 6, 14)])
@pytest.mark.parametrize("reorder", ["morton3d", "none"])
@pytest.mark.parametrize("stack_tokens", [0, 4096])
def test_the_order_of_tokens_changes_nothing_but_their_order(
    size: tuple[int, int, int], reorder: str, stack_tokens: int
) -> None:
    dit, latents, condition = make(stack_tokens=stack_tokens), draw(16, *size), None
    with torch.no_grad():
        text = [dit.encode_text(COND), dit.encode_text(UNCOND)]
        expected = dit(latents, 700.0, text, condition)
        seen: list[Tensor] = []
        calls = Calls()

        def spy(q: Tensor, k: Tensor, v: Tensor, tau: float) -> Tensor:
            seen.append(v)
            return sdpa(q, k, v)

        dit.self_attention = SolAttention(spy, calls.dense, "", SolAttnSetting(reorder=reorder, dense_layers=()))  # type: ignore[arg-type]
        got = dit(latents, 700.0, text, condition)
        plain: list[Tensor] = []
        dit.self_attention = lambda q, k, v: (plain.append(v), sdpa(q, k, v))[1]
        dit(latents, 700.0, text, condition)
    for one, other in zip(got, expected, strict=True):
        assert relative(one, other) < 1e-5
    order = (
        morton_order((size[0], size[1] // 2, size[2] // 2)) if reorder == "morton3d" else torch.arange(len(seen[0][0]))
    )
    assert relative(seen[0], plain[0][:, order]) < 1e-5


@pytest.mark.usefixtures("any_length")
def test_several_processes_attend_in_the_same_way() -> None:
    calls = Calls()
    seen: list[str] = []

    class Alone:
        """A split into one part."""

        def shard(self, x: Tensor, dim: int) -> Tensor:
            return x

        def all_gather(self, x_BlD: Tensor, tokens: int) -> Tensor:
            return x_BlD

        def attend(self, attention: Any, tokens: int, *qkv: Tensor) -> Tensor:
            seen.append("dense" if attention == calls.dense else "sparse")
            return attention(*qkv)

    dit = make()
    with torch.no_grad():
        text = [dit.encode_text(COND)]
        (expected,) = dit(LATENTS, 300.0, text)
        dit.self_attention, dit.split = calls.attention(), Alone()
        (got,) = dit(LATENTS, 300.0, text)
    assert relative(got, expected) < 1e-5
    assert seen == ["dense"] + ["sparse"] * (len(dit.blocks) - 1)


@pytest.mark.usefixtures("any_length")
def test_what_the_blocks_added_in_an_exact_step_fits_a_sparse_one() -> None:
    """Feature caching reuses it: the tokens' order is the same in both."""
    attention = Calls().attention()
    dit = make(self_attention=attention.in_step(0, 5))
    residuals: list[Tensor] = []
    with torch.no_grad():
        (velocity,) = dit(LATENTS, 300.0, [dit.encode_text(COND)], None, None, residuals)
        dit.self_attention = attention.in_step(4, 5)
        (again,) = dit.without_blocks(LATENTS, 300.0, residuals)
    assert relative(again, velocity) < 1e-5
