"""The element-wise steps: the paths that differ by device, gradients or shape give the same numbers."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from lightx2v.models import pointwise


def test_gelu_without_gradients_is_torchs_and_at_least_as_exact() -> None:
    x = torch.cat([torch.randn(200_000) * 3, torch.tensor([0.0, -0.0, 30.0, -30.0, 1e20, -1e20, float("inf")])])
    exact = F.gelu(x.double(), approximate="tanh")
    with torch.no_grad():
        got = pointwise.gelu(x.clone())
    torch.testing.assert_close(got.double(), exact, rtol=1e-6, atol=1e-7)


def test_gelu_passes_nan_on() -> None:
    with torch.no_grad():
        assert pointwise.gelu(torch.full((3,), float("nan"))).isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rms_norm_without_gradients_is_torchs(dtype: torch.dtype) -> None:
    x, weight = (torch.randn(2, 9, 48) * 5).to(dtype), torch.randn(48)
    expected = F.rms_norm(x.float(), (48,), weight, 1e-6)
    with torch.no_grad():
        got = pointwise.rms_norm(x, weight, 1e-6)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)
    assert torch.equal(pointwise.rms_norm(x, weight, 1e-6), expected)


@pytest.mark.parametrize("batch", [1, 2])
def test_long_videos_go_through_in_pieces_with_the_same_numbers(monkeypatch: pytest.MonkeyPatch, batch: int) -> None:
    x, weight, rotations = (
        torch.randn(batch, 23, 48).bfloat16(),
        torch.randn(48),
        torch.randn(23, 1, 8).to(torch.cfloat),
    )
    wide, shift, scale = torch.randn(batch, 23, 48), torch.randn(batch, 48), torch.randn(batch, 48)

    def results() -> list[torch.Tensor]:
        with torch.no_grad():
            turned = pointwise.norm_rotate(x.clone(), weight, 1e-6, rotations)
            return [
                turned,
                pointwise.normed(x.clone(), weight, 1e-6),
                pointwise.norm_modulate(wide, shift, scale, 1e-6, torch.bfloat16),
                pointwise.layer_norm(wide, weight, shift[0], 1e-6, torch.bfloat16),
            ]

    whole = results()
    monkeypatch.setattr(pointwise, "ROWS", 5)
    assert all(torch.equal(got, expected) for got, expected in zip(results(), whole, strict=True))
    x.requires_grad_()
    again = pointwise.norm_rotate(x, weight, 1e-6, rotations)  # with gradients x stays as it is
    assert again.requires_grad and torch.equal(again, whole[0])


def test_rms_norm_of_zeros_is_zero() -> None:
    with torch.no_grad():
        assert torch.equal(pointwise.rms_norm(torch.zeros(1, 2, 8), torch.ones(8), 1e-6), torch.zeros(1, 2, 8))


def test_one_modulation_for_all_rows_equals_one_each() -> None:
    x, shift, scale = torch.randn(3, 5, 16), torch.randn(1, 16), torch.randn(1, 16)
    one = pointwise.norm_modulate(x, shift, scale, 1e-6, torch.float32)
    each = pointwise.norm_modulate(x, shift.expand(3, -1), scale.expand(3, -1), 1e-6, torch.float32)
    torch.testing.assert_close(one, each, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(one, F.layer_norm(x, (16,), eps=1e-6) * (1 + scale) + shift, rtol=1e-5, atol=1e-5)


def test_sums_are_written_into_x_only_without_gradients() -> None:
    x, y, gate = torch.randn(2, 3, 4), torch.randn(2, 3, 4).bfloat16(), torch.randn(2, 4)
    kept, expected = x.clone(), x + y.float() * gate.unsqueeze(1)
    torch.testing.assert_close(pointwise.add_gated(x, y, gate), expected)
    assert torch.equal(x, kept)
    with torch.no_grad():
        assert pointwise.add_gated(x, y, gate) is x
        torch.testing.assert_close(x, expected)
        assert pointwise.add(x, y) is x
