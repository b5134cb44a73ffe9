"""Which backend that is not exact runs: its self-test, its fallback, `auto_fast`. The packages are fakes."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest
import torch
from test_attention import BF16, install, nhd_attention, pose_as
from torch import Tensor

from lightx2v.attention import resolve_attention, self_test, sol, table
from lightx2v.attention.flash3_fp8 import Flash3Fp8
from lightx2v.attention.sdpa import sdpa
from lightx2v.config.sol_attn_setting import SolAttnSetting
from lightx2v.errors import ConfigError


@pytest.fixture(autouse=True)
def _short_long_test(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(self_test, "LONG", 1024)


def widened(x_BLNH: Tensor, scale_BN: Tensor) -> Tensor:
    assert x_BLNH.dtype == torch.float8_e4m3fn and scale_BN.shape == x_BLNH.shape[::2]
    return x_BLNH.float() * scale_BN[:, None, :, None]


def flash3(q: Tensor, k: Tensor, v: Tensor, **scales: Tensor) -> Tensor:
    """What FlashAttention 3 does with FP8 inputs and their scales."""
    if not scales:
        return sdpa(q, k, v)
    q, k, v = (widened(x, scales[f"{name}_descale"]) for name, x in (("q", q), ("k", k), ("v", v)))
    return sdpa(q, k, v).bfloat16()


def shrinking(q: Tensor, k: Tensor, v: Tensor, **scales: Tensor) -> Tensor:
    """Loses a fifth of what it adds up, as Hopper's FP8 sums do with values that have a mean."""
    return flash3(q, k, v, **scales) * (0.8 if scales else 1)


def kitchen(monkeypatch: pytest.MonkeyPatch, **functions: object) -> None:
    """Install a package comfy-kitchen; without functions, one that is right."""

    def int8_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.nn.functional.scaled_dot_product_attention(q, k, v)

    def sol_attn(q: Tensor, k: Tensor, v: Tensor, tau: float) -> Tensor:
        assert all(x.is_contiguous() for x in (q, k, v)) and q.shape == k.shape == v.shape
        return sdpa(q, k, v)

    right = {"int8_attention": int8_attention, "sol_attn": sol_attn, "sol_attn_is_available": lambda: True}
    install(monkeypatch, "comfy_kitchen", **right | functions)


def test_fp8_attention_is_used_where_flash3_takes_fp8(monkeypatch: pytest.MonkeyPatch) -> None:
    pose_as(monkeypatch, (9, 0))
    install(monkeypatch, "flash_attn_interface", flash_attn_func=flash3)
    choice = resolve_attention("flash_attn3_fp8", "cpu", BF16, strict=True)
    assert choice.name == "flash_attn3_fp8" and isinstance(choice.fn, Flash3Fp8)
    assert choice.in_step(0, 4) is choice.fn


@pytest.mark.parametrize(
    ("kernel", "why"),
    [(shrinking, "self-test is off by"), (lambda q, k, v: sdpa(q, k, v), "self-test failed.*descale")],
)
def test_a_kernel_that_loses_the_values_mean_or_knows_no_fp8_is_not_used(
    kernel: object, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pose_as(monkeypatch, (9, 0))
    install(monkeypatch, "flash_attn_interface", flash_attn_func=kernel)
    with pytest.raises(ConfigError, match=why):
        resolve_attention("flash_attn3_fp8", "cpu", BF16, strict=True)
    choice = resolve_attention("flash_attn3_fp8", "cpu", BF16)
    assert choice.name == "flash_attn3" and "flash_attn3_fp8 cannot run here" in choice.reason


def naive_fp8(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """FP8 with a scale for each head and nothing else."""
    scales = [x.float().abs().amax((1, 3)) / 448 for x in (q, k, v)]
    small = [(x.float() / s[:, None, :, None]).to(torch.float8_e4m3fn) for x, s in zip((q, k, v), scales, strict=True)]
    return sdpa(*(widened(x, s) for x, s in zip(small, scales, strict=True)))


def no_mean(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Right but for the mean of long values."""
    return sdpa(q, k, v) - (0.3 * v.mean(1, keepdim=True) if q.shape[1] > 1000 else 0)


@pytest.mark.parametrize("wrong", [naive_fp8, no_mean])
def test_random_values_pass_what_structured_ones_refuse(wrong: table.Attention) -> None:
    arguments = (torch.device("cpu"), BF16, 128)
    tolerance = table.TABLE["flash_attn3_fp8"].tolerance
    assert self_test.self_test(wrong, *arguments) < tolerance < self_test.structured_test(wrong, *arguments)
    assert self_test.structured_test(sdpa, *arguments) < 5e-3


def test_int8_attention_takes_heads_before_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    pose_as(monkeypatch, (7, 5))
    kitchen(monkeypatch)
    choice = resolve_attention("int8_kitchen", "cpu", torch.float16, strict=True)
    q, k, v = torch.randn(2, 33, 3, 16), torch.randn(2, 17, 3, 16), torch.randn(2, 17, 3, 16)
    torch.testing.assert_close(choice.fn(q, k, v), sdpa(q, k, v), rtol=0, atol=1e-5)


@pytest.mark.parametrize(("architecture", "share"), [((8, 6), 0.6), ((12, 0), 0.94), ((7, 5), 0.96), ((8, 9), 3.0)])
def test_auto_fast_takes_8_bits_only_where_they_are_faster_here(
    architecture: tuple[int, int], share: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    pose_as(monkeypatch, architecture)
    kitchen(monkeypatch)
    monkeypatch.setattr(table, "_seconds", lambda fn, *_: 1.0 if fn is sdpa else share)
    choice = resolve_attention("auto_fast", "cpu", BF16)
    assert choice.name == ("int8_kitchen" if share < 0.95 else "torch_sdpa")
    assert f"takes {share:.0%} of" in choice.reason
    assert resolve_attention("auto", "cpu", BF16).fn is sdpa


def test_auto_fast_on_hopper_times_fp8_and_never_int8(monkeypatch: pytest.MonkeyPatch) -> None:
    pose_as(monkeypatch, (9, 0))
    kitchen(monkeypatch)
    install(monkeypatch, "flash_attn_interface", flash_attn_func=flash3)
    monkeypatch.setattr(table, "_seconds", lambda fn, *_: 0.7 if isinstance(fn, Flash3Fp8) else 1.0)
    choice = resolve_attention("auto_fast", "cpu", BF16)
    assert choice.name == "flash_attn3_fp8" and "takes 70% of the time of flash_attn3 here, not exact" in choice.reason
    assert "int8_kitchen" not in {name for major, names in table.FAST.items() if major == 9 for name in names}


def test_auto_fast_without_a_faster_package_is_auto_and_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    pose_as(monkeypatch, (8, 6))
    monkeypatch.setitem(sys.modules, "comfy_kitchen", None)
    choice = resolve_attention("auto_fast", "cpu", BF16)
    assert choice.name == "torch_sdpa" and "not int8_kitchen: its package does not import" in choice.reason


def test_a_backend_that_fails_while_it_is_timed_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    pose_as(monkeypatch, (8, 6))
    kitchen(monkeypatch)

    def out_of_memory(*_: object) -> float:
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(table, "_seconds", out_of_memory)
    choice = resolve_attention("auto_fast", "cpu", BF16)
    assert choice.name == "torch_sdpa" and "failed while it was timed (no room)" in choice.reason


def test_sparse_attention_brings_the_exact_one_for_what_must_be_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    pose_as(monkeypatch, (9, 0))
    kitchen(monkeypatch)
    install(monkeypatch, "flash_attn_interface", flash_attn_func=flash3)
    install(monkeypatch, "sageattention", sageattn=nhd_attention)
    choice = resolve_attention("sol_attn", "cpu", BF16, strict=True, sol_setting=SolAttnSetting(tau=0.5))
    assert isinstance(choice.fn, sol.SolAttention) and choice.name == "sol_attn"
    assert "tau 0.5; flash_attn3 in the first fifth of the steps and in these blocks: 0" in choice.reason
    assert choice.kernels == "sol_attn and flash_attn3"
    other = resolve_attention("sol_attn", "cpu", BF16, sol_setting=SolAttnSetting(dense_backend="sage_attn2"))
    assert other.kernels == "sol_attn and sage_attn2"


BROKEN: dict[str, tuple[dict[str, object], str]] = {
    "without CUDA": ({"sol_attn_is_available": lambda: False}, "needs a torch with CUDA 13"),
    "wrong": ({"sol_attn": lambda q, k, v, tau: 0.9 * sdpa(q, k, v)}, "off by 1.0e-01"),
    "wrong where it is sparse": (
        {"sol_attn": lambda q, k, v, tau: sdpa(q, k, v) if tau < 0 else v.mean(1, keepdim=True).expand_as(v)},
        "off by",
    ),
    "nan": ({"sol_attn": lambda q, k, v, tau: sdpa(q, k, v) * float("nan")}, "off by nan"),
    "of another age": ({"sol_attn": lambda q, k, v: sdpa(q, k, v)}, "tau"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_sparse_attention_that_is_installed_but_wrong_is_not_used(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    functions, why = BROKEN[kind]
    pose_as(monkeypatch, (9, 0))
    kitchen(monkeypatch, **functions)
    for package in ("flash_attn_interface", "fa3_fwd_interface"):
        monkeypatch.setitem(sys.modules, package, None)
    choice = resolve_attention("sol_attn", "cpu", BF16)
    assert choice.name == "torch_sdpa" and why in choice.reason


def test_the_module_is_not_imported_before_it_is_chosen() -> None:
    assert not isinstance(sys.modules.get("comfy_kitchen"), ModuleType)
