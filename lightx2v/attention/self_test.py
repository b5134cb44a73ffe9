"""Tests of attention backends on the device: relative errors against torch's float32 attention."""

import torch
from torch import Tensor

from .sdpa import Attention, sdpa

LONG = 16384
"""Tokens of the long test: FP8 sums lose more of values with a mean the longer they are."""


def self_test(fn: Attention, device: torch.device, dtype: torch.dtype, head_dim: int) -> float:
    """The largest error for self- and cross-attention with uneven lengths, on random values."""
    generator = torch.Generator("cpu").manual_seed(0)
    worst = 0.0
    for batch, queries, keys in ((1, 640, 640), (1, 391, 77), (2, 129, 513)):
        q_BLNH, k_BLNH, v_BLNH = (
            torch.randn(batch, length, 4, head_dim, generator=generator).to(device, dtype)
            for length in (queries, keys, keys)
        )
        error = relative_error(fn(q_BLNH, k_BLNH, v_BLNH), sdpa(q_BLNH.float(), k_BLNH.float(), v_BLNH.float()))
        if error != error:
            return error
        worst = max(worst, error)
    return worst


def structured_test(fn: Attention, device: torch.device, dtype: torch.dtype, head_dim: int) -> float:
    """The largest error of `self_test`, and of values such as a network has, for backends that round to 8 bits.

    Some channels of queries and keys are large, others in queries than in keys, keys have an offset, and the values of
    a long sequence have a mean. On random values alone a backend passes that loses half of such a mean.
    """
    error = self_test(fn, device, dtype, head_dim)
    if error != error:
        return error
    generator = torch.Generator("cpu").manual_seed(1)
    q_BLNH, k_BLNH, v_BLNH = (torch.randn(1, LONG, 2, head_dim, generator=generator).to(device) for _ in range(3))
    channels = torch.randperm(head_dim, generator=generator)[:8].to(device)
    offset_NH = torch.randn(2, head_dim, generator=generator).to(device)
    q_BLNH[..., channels[:4]] *= 8
    k_BLNH[..., channels[4:]] *= 8
    q_BLNH, k_BLNH = q_BLNH.to(dtype), (k_BLNH + 4 * offset_NH).to(dtype)
    some = slice(None, None, LONG // 64)  # float32 scores of all queries would take gigabytes
    for mean in (0, 1):
        v = (v_BLNH + mean * offset_NH).to(dtype)
        expected = sdpa(q_BLNH[:, some].float(), k_BLNH.float(), v.float())
        last = relative_error(fn(q_BLNH, k_BLNH, v)[:, some], expected)
        if last != last:
            return last
        error = max(error, last)
    return error


def relative_error(got: Tensor, expected: Tensor) -> float:
    """NaN where either has one. Raises ValueError for another shape."""
    if got.shape != expected.shape:
        raise ValueError(f"shape {tuple(got.shape)} instead of {tuple(expected.shape)}")
    return ((got.float() - expected).norm() / expected.norm()).item()
