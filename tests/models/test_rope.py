"""Rotary positions: the split of a head, the angles, and what inference leaves for training."""

from __future__ import annotations

import math

import pytest
import torch
from diffusers.models.transformers.transformer_wan import WanRotaryPosEmbed

from lightx2v.models.rope import RotaryTable, axis_dims, rotate, rotations


@pytest.mark.parametrize(
    ("head_dim", "split"), [(128, (44, 42, 42)), (64, (24, 20, 20)), (24, (8, 8, 8)), (2, (2, 0, 0))]
)
def test_height_and_width_get_a_third_each_rounded_down_and_time_the_rest(head_dim: int, split: tuple) -> None:
    assert axis_dims(head_dim) == split and sum(split) == head_dim


def test_each_token_turns_by_its_own_position_times_the_frequency() -> None:
    grid, head_dim = (3, 4, 5), 24
    table = rotations(grid, head_dim)
    assert table.shape == (60, 1, 12) and table.dtype == torch.complex64
    for t, h, w in ((0, 0, 0), (2, 3, 4), (1, 0, 3)):
        angles = [pos * 10000.0 ** (-2 * j / 8) for pos in (t, h, w) for j in range(4)]
        got = table[(t * 4 + h) * 5 + w, 0]
        torch.testing.assert_close(
            got, torch.tensor([complex(math.cos(a), math.sin(a)) for a in angles]), rtol=0, atol=6e-8
        )


def test_far_positions_are_exact_to_float32() -> None:
    table = rotations((1, 1, 1000), 128)
    angle = 999 * 10000.0 ** (-2 * 1 / 42)
    assert abs(complex(table[999, 0, 22 + 21 + 1]) - complex(math.cos(angle), math.sin(angle))) < 1e-7


@pytest.mark.parametrize("head_dim", [24, 40, 64, 128])
def test_rotation_equals_diffusers(head_dim: int) -> None:
    grid = (3, 4, 6)
    cos, sin = WanRotaryPosEmbed(head_dim, (1, 2, 2), 1024)(torch.empty(1, 16, 3, 8, 12))
    x = torch.randn(2, 72, 3, head_dim)
    x1, x2 = x.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = cos[..., 0::2], sin[..., 1::2]
    expected = torch.stack([x1 * cos - x2 * sin, x1 * sin + x2 * cos], dim=-1).flatten(-2)
    torch.testing.assert_close(rotate(x, rotations(grid, head_dim)), expected, rtol=0, atol=2e-6)


def test_without_gradients_the_tensor_itself_is_turned_and_with_them_it_is_not() -> None:
    table, x = rotations((1, 2, 2), 12), torch.randn(1, 4, 2, 12)
    kept = x.clone()
    turned = rotate(x, table)
    assert torch.equal(x, kept) and not torch.equal(turned, kept)
    with torch.no_grad():
        assert rotate(x, table).data_ptr() == x.data_ptr()
    assert torch.equal(x, turned)


def test_a_table_made_under_inference_mode_serves_training() -> None:
    table = RotaryTable(12)
    with torch.inference_mode():
        table((1, 2, 2), torch.device("cpu"))
    x = torch.randn(1, 4, 2, 12, requires_grad=True)
    rotate(x, table((1, 2, 2), torch.device("cpu"))).square().sum().backward()
    torch.testing.assert_close(x.grad, 2 * x.detach())  # a rotation keeps lengths


def test_the_table_is_made_once_a_grid() -> None:
    table, cpu = RotaryTable(12), torch.device("cpu")
    first = table((1, 2, 2), cpu)
    assert table((1, 2, 2), cpu) is first
    assert table((2, 2, 2), cpu).shape[0] == 8
    assert torch.equal(table((1, 2, 2), cpu), first)
