"""The inputs of FP8 attention against float64, and its kernels in triton's interpreter."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import Tensor

from lightx2v.attention import fp8
from lightx2v.attention.flash3_fp8 import Flash3Fp8
from lightx2v.attention.fp8_inputs import SAMPLED, rows_to_fp8, values_to_fp8
from lightx2v.models.block import QKVO
from lightx2v.models.fp8_attention import rotary_fp8
from lightx2v.models.rope import rotations


def exact_attention(q: Tensor, k: Tensor, v: Tensor) -> np.ndarray:
    """Softmax attention (B, L, N, H) in float64, in numpy."""
    q, k, v = (x.double().numpy() for x in (q, k, v))
    scores = np.einsum("blnh,bmnh->bnlm", q, k) / np.sqrt(q.shape[-1])
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return np.einsum("bnlm,bmnh->blnh", weights / weights.sum(-1, keepdims=True), v)


def kernel(q: Tensor, k: Tensor, v: Tensor, *, q_descale: Tensor, k_descale: Tensor, v_descale: Tensor) -> Tensor:
    """FP8 products without rounding."""
    q, k, v = (
        x.double() * scale.double()[:, None, :, None] for x, scale in ((q, q_descale), (k, k_descale), (v, v_descale))
    )
    return torch.from_numpy(exact_attention(q, k, v)).float()


def off(got: Tensor | np.ndarray, expected: Tensor | np.ndarray) -> float:
    got, expected = np.asarray(got, dtype=np.float64), np.asarray(expected, dtype=np.float64)
    return float(np.linalg.norm(got - expected) / np.linalg.norm(expected))


@pytest.mark.parametrize("head_dim", [16, 64, 128])
def test_the_rotation_is_a_hadamard_matrix_with_signs_and_always_the_same(head_dim: int) -> None:
    matrix = fp8.rotation(head_dim, torch.device("cpu")).double().numpy()
    assert set(np.unique(matrix)) == {-1.0, 1.0}
    assert np.array_equal(matrix @ matrix.T, head_dim * np.eye(head_dim))
    assert 0 < (matrix[:, 0] < 0).sum() < head_dim  # the first column is constant without signs
    again = fp8.rotation.__wrapped__(head_dim, torch.device("cpu"))
    assert np.array_equal(again.double().numpy(), matrix)


def test_heads_without_a_hadamard_matrix_are_named() -> None:
    with pytest.raises(ValueError, match="heads of 96"):
        fp8.rotation(96, torch.device("cpu"))


def test_a_large_channel_costs_the_others_nothing() -> None:
    torch.manual_seed(0)
    x = torch.randn(1, 500, 2, 128)
    x[..., 7] *= 100
    small = rows_to_fp8(x)
    back = small.values.double() * small.scale_BN.double()[:, None, :, None]
    matrix = fp8.rotation(128, torch.device("cpu")).double() / 128**0.5
    lost = (back @ matrix.T - x.double()).numpy()
    plain = (x / 10).to(torch.float8_e4m3fn).double().numpy() * 10 - x.double().numpy()
    assert np.linalg.norm(plain) / np.linalg.norm(x) > 0.02
    # e4m3 keeps 4 significant bits: 2.6 % of each rotated value, in which the large channel is everywhere.
    assert np.linalg.norm(lost) / np.linalg.norm(x) < 0.03


@pytest.mark.parametrize(("mean", "scale"), [(0.0, 1.0), (50.0, 1.0), (-3.0, 1e-4), (1e4, 1e3)])
def test_values_come_back_with_their_mean(mean: float, scale: float) -> None:
    torch.manual_seed(0)
    v = torch.randn(2, 333, 3, 16) * scale + mean * scale * torch.randn(3, 16)
    small = values_to_fp8(v)
    assert small.values.float().abs().max() == 448
    back = small.values.double() * small.scale_BN.double()[:, None, :, None]
    total = (back.mean(1) + small.lacking_BNH.double()).numpy()
    assert off(total, v.double().mean(1).numpy()) < 1e-6
    spread = v.double() - v.double().mean(1, keepdim=True)
    assert off((back + small.lacking_BNH.double().unsqueeze(1)).numpy(), v.double().numpy()) < 0.05 * float(
        spread.norm() / v.double().norm()
    )


@pytest.mark.parametrize(
    ("kind", "allowed"),
    [
        ("plain", 0.05),
        ("large channels", 0.12),
        ("keys with an offset", 0.06),
        ("values with a mean", 5e-3),
        ("zeros", 1e-6),
    ],
)
def test_attention_in_fp8_is_close_to_float64(kind: str, allowed: float) -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 300, 3, 128) for _ in range(3))
    if kind == "large channels":
        q[..., 3] *= 12
        k[..., 90] *= 12
    if kind == "keys with an offset":
        k += 20 * torch.randn(3, 128)
    if kind == "values with a mean":
        v += 5 * torch.randn(3, 128)
    if kind == "zeros":
        q, k, v = torch.zeros_like(q), torch.zeros_like(k), torch.ones_like(v)
    got = Flash3Fp8(kernel)(q, k, v)
    assert off(got, exact_attention(q, k, v)) < allowed


def test_flat_attention_gives_exactly_the_mean_of_the_values() -> None:
    torch.manual_seed(0)
    v = torch.randn(1, 400, 2, 64).bfloat16().float() + 0.3
    got = Flash3Fp8(kernel)(torch.zeros_like(v), torch.zeros_like(v), v)
    assert off(got, v.double().mean(1, keepdim=True).expand_as(v).numpy()) < 1e-5


@pytest.mark.parametrize("spread", [1e-3, 1.0, 30.0])
def test_queries_and_keys_from_a_projection_fit_for_norm_weights_of_any_size(spread: float) -> None:
    """One token has all of its energy in one channel, where its head's weight is largest: nothing is cut off."""
    torch.manual_seed(0)
    grid, heads, head_dim = (3, 4, 5), 4, 16
    width = heads * head_dim
    attn = QKVO(width, heads, 1e-6).requires_grad_(False)
    attn.norm_q.weight.copy_(torch.randn(width) * spread)
    attn.norm_k.weight.copy_(torch.randn(width) * spread)
    h = torch.randn(1, 60, width)
    h[0, 11] = 0
    h[0, 11, int(attn.norm_q.weight.abs().argmax())] = 1000
    for layer in (attn.q, attn.k):
        layer.weight.copy_(torch.eye(width))
        layer.bias.zero_()
    turns = rotations(grid, head_dim)
    with torch.no_grad():
        q, k, v = attn.rotated_fp8(h.clone(), turns)
        q_BLNH, k_BLNH, v_BLNH = attn.rotated(h.clone(), turns)
    matrix = fp8.rotation(head_dim, torch.device("cpu")).double() / head_dim**0.5
    back = q.values.double() * q.scale_BN.double()[:, None, :, None] @ matrix.T
    assert off(back.numpy(), q_BLNH.double().numpy()) < 0.04
    keys = k.values.double() * k.scale_BN.double()[:, None, :, None] @ matrix.T
    differences = (keys - k_BLNH.double()).numpy()
    differences -= differences.mean(1, keepdims=True)  # all keys lost the same vector
    assert np.linalg.norm(differences) / float(k_BLNH.norm()) < 0.04
    assert v.values.shape == v_BLNH.shape


def test_keys_lose_the_mean_of_a_sample_of_them() -> None:
    grid, width = (2, 8, 16), 32
    x = torch.randn(1, 256, width)
    weight = torch.rand(width) + 0.5
    with torch.no_grad():
        with_mean = rotary_fp8(x.clone(), weight, 1e-6, rotations(grid, 16))
        without = rotary_fp8(x.clone(), weight, 1e-6, rotations(grid, 16), centre=True)
    assert torch.equal(without.scale_BN, 2 * with_mean.scale_BN)
    sample = (without.values.float() * without.scale_BN[:, None, :, None])[:, ::SAMPLED].mean(1)
    assert float(sample.abs().max()) < 0.05


INTERPRETED = """
import torch
from lightx2v.attention import fp8_inputs, triton_fp8
from lightx2v.models import fp8_attention
cpu = torch.device("cpu")
print(repr(fp8_inputs.why_not(triton_fp8, cpu)), repr(fp8_attention.why_not(triton_fp8, cpu)))
triton_fp8.TILE, triton_fp8.CHUNK = 64, 32
wrong = triton_fp8.rotated
triton_fp8.rotated = lambda x, scale, shift=None: wrong(x, scale, None)
print(repr(fp8_inputs.why_not(triton_fp8, cpu))[:19])
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="triton is for Linux")
def test_the_kernels_equal_the_plain_functions_in_tritons_interpreter() -> None:
    """In a process of its own: triton decides on import whether it interprets."""
    env = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", INTERPRETED], env=env, capture_output=True, text=True, check=False)
    assert done.stdout.split("\n")[0] == "'' ''", done.stdout + done.stderr[-2000:]
    assert done.stdout.split("\n")[1] == "'rotated is off by "
