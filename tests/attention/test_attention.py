"""Which attention backend runs: names, fallbacks, self-tests. The packages are fakes; the CPU poses as a GPU."""

from __future__ import annotations

import logging
import subprocess
import sys
from types import ModuleType

import pytest
import torch
from torch import Tensor

from lightx2v.attention import resolve_attention, table
from lightx2v.attention.sdpa import sdpa, sdpa_repeated_last
from lightx2v.config.attention_names import FOR_VIDEO_ONLY, NOT_SUPPORTED, SUPPORTED, check_attention_name
from lightx2v.errors import ConfigError

BF16 = torch.bfloat16


def pose_as(monkeypatch: pytest.MonkeyPatch, architecture: tuple[int, int]) -> None:
    monkeypatch.setattr(table, "_architecture", lambda device: architecture)

    def no_cudnn(*_: Tensor) -> Tensor:
        raise RuntimeError("cuDNN is not there")

    monkeypatch.setitem(table.TABLE, "cudnn", table.Backend(load=lambda: no_cudnn, majors=frozenset({8, 9, 10, 12})))


def install(monkeypatch: pytest.MonkeyPatch, module: str, **functions: object) -> None:
    for parent in (module.rpartition(".")[0], module):
        if parent:
            monkeypatch.setitem(sys.modules, parent, ModuleType(parent))
    for name, fn in functions.items():
        setattr(sys.modules[module], name, fn)


def hnd_attention(q: Tensor, k: Tensor, v: Tensor, is_causal: bool = False) -> Tensor:
    """What sageattn3 takes: (B, N, L, H)."""
    assert not is_causal and q.is_contiguous()
    return torch.nn.functional.scaled_dot_product_attention(q, k, v)


def nhd_attention(q: Tensor, k: Tensor, v: Tensor, tensor_layout: str = "HND", is_causal: bool = False) -> Tensor:
    assert tensor_layout == "NHD" and not is_causal
    return sdpa(q, k, v)


FAKES = {
    "flash_attn2": ("flash_attn", {"flash_attn_func": sdpa}, (8, 0)),
    "flash_attn3": ("flash_attn_interface", {"flash_attn_func": sdpa}, (9, 0)),
    "flash_attn4": ("flash_attn.cute", {"flash_attn_func": lambda q, k, v: (sdpa(q, k, v), None)}, (10, 0)),
    "sage_attn2": ("sageattention", {"sageattn": nhd_attention}, (8, 9)),
    "sage_attn3": ("sageattn3", {"sageattn3_blackwell": hnd_attention}, (12, 0)),
}


@pytest.mark.parametrize("name", FAKES)
def test_every_adapter_takes_and_returns_blnh_and_equals_sdpa(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module, functions, architecture = FAKES[name]
    pose_as(monkeypatch, architecture)
    install(monkeypatch, module, **functions)
    choice = resolve_attention(name, "cpu", BF16, strict=True)
    assert choice.name == name and "self-test off by" in choice.reason
    q, k, v = torch.randn(2, 33, 3, 16), torch.randn(2, 17, 3, 16), torch.randn(2, 17, 3, 16)
    torch.testing.assert_close(choice.fn(q, k, v), sdpa(q, k, v), rtol=0, atol=1e-5)


@pytest.mark.parametrize("package", ["flash_attn_interface", "fa3_fwd_interface"])
def test_flash3_of_either_age_and_package_works(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pose_as(monkeypatch, (9, 0))
    monkeypatch.setitem(sys.modules, "flash_attn_interface", None)
    install(monkeypatch, package, flash_attn_func=lambda q, k, v: (sdpa(q, k, v), torch.zeros(1)))
    assert resolve_attention("flash_attn3", "cpu", BF16, strict=True).name == "flash_attn3"
    assert resolve_attention("auto", "cpu", BF16).name == "flash_attn3"


@pytest.mark.parametrize(
    ("rest", "direct"),
    [
        ("Tensor? k_new = None, float? softmax_scale = None, int num_splits = 0", True),
        ("Tensor? k_new = None, float? softmax_scale = None, int num_splits = 0, *, int needed", False),
        ("Tensor? k_new = None, float? scale = None, int num_splits = 0", False),
    ],
)
def test_flash3s_operator_is_called_itself_if_its_arguments_are_known(
    rest: str, direct: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    pose_as(monkeypatch, (9, 0))
    monkeypatch.setitem(sys.modules, "flash_attn_interface", None)
    library = torch.library.Library("flash3_of_a_test", "FRAGMENT")
    library.define(f"fwd(Tensor q, Tensor k, Tensor v, {rest}) -> (Tensor, Tensor)")
    calls: list[dict[str, object]] = []

    def fwd(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *more: object, **named: object) -> object:
        calls.append(named)
        return sdpa(q, k, v), torch.zeros(1)

    library.impl("fwd", fwd, "CPU")
    install(
        monkeypatch,
        "fa3_fwd_interface",
        fa3_fwd_cuda=torch.ops.flash3_of_a_test,
        flash_attn_func=lambda *qkv: sdpa(*qkv),
    )
    try:
        choice = resolve_attention("flash_attn3", "cpu", BF16, strict=True)
        q = torch.randn(1, 16, 2, 16).transpose(1, 3).contiguous().transpose(1, 3)
        assert choice.name == "flash_attn3"
        torch.testing.assert_close(choice.fn(q, q, q), sdpa(q, q, q), rtol=0, atol=1e-6)
        assert bool(calls) is direct
    finally:
        library._destroy()


def test_a_broken_flash3_is_not_taken_for_a_missing_one(monkeypatch: pytest.MonkeyPatch) -> None:
    pose_as(monkeypatch, (9, 0))
    install(monkeypatch, "flash_attn_interface")  # without the function, as after another release of it
    install(monkeypatch, "fa3_fwd_interface", flash_attn_func=sdpa)
    with pytest.raises(ConfigError, match="cannot import name 'flash_attn_func'"):
        resolve_attention("flash_attn3", "cpu", BF16, strict=True)


def test_every_supported_name_resolves_on_a_cpu() -> None:
    q = torch.randn(1, 5, 2, 8)
    for name in SUPPORTED:
        choice = resolve_attention(name, "cpu", torch.float32)
        assert choice.name == "torch_sdpa"
        assert choice.fn(q, q, q).shape == q.shape


def test_auto_on_hopper_is_flash3_when_it_works(monkeypatch: pytest.MonkeyPatch) -> None:
    pose_as(monkeypatch, (9, 0))
    install(monkeypatch, "flash_attn_interface", flash_attn_func=sdpa)
    choice = resolve_attention("auto", "cpu", BF16)
    assert choice.name == "flash_attn3" and "sm90" in choice.reason


def test_auto_on_hopper_is_cudnn_without_flash3_and_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    pose_as(monkeypatch, (9, 0))
    for package in ("flash_attn_interface", "fa3_fwd_interface"):
        monkeypatch.setitem(sys.modules, package, None)  # importing it raises ImportError
    monkeypatch.setitem(table.TABLE, "cudnn", table.Backend(load=lambda: sdpa, majors=frozenset({9})))
    choice = resolve_attention("auto", "cpu", BF16)
    assert choice.name == "cudnn" and "not flash_attn3: its package does not import" in choice.reason


@pytest.mark.parametrize("architecture", [(8, 0), (12, 0), (7, 5)])
def test_auto_leaves_other_architectures_to_torch(
    architecture: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    pose_as(monkeypatch, architecture)
    install(monkeypatch, "sageattention", sageattn=nhd_attention)
    assert resolve_attention("auto", "cpu", BF16).fn is sdpa


def test_auto_never_takes_a_backend_that_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not {name for names in table.AUTO.values() for name in names} & {"sage_attn2", "sage_attn3"}


def raising(*_: Tensor) -> Tensor:
    raise RuntimeError("no kernel image is available\n for execution on the device")


BROKEN = {
    "raises": (raising, "no kernel image is available for execution"),
    "wrong numbers": (lambda q, k, v: 1.05 * sdpa(q, k, v), "off by 5.0e-02"),
    "nan": (lambda q, k, v: sdpa(q, k, v) * float("nan"), "off by nan"),
    "nan now and then": (lambda q, k, v: sdpa(q, k, v) * (float("nan") if q.shape[1] == 640 else 1), "off by nan"),
    "wrong layout": (lambda q, k, v: sdpa(q, k, v).transpose(1, 2), "shape"),
    "causal": (
        lambda q, k, v: torch.nn.functional.scaled_dot_product_attention(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=True
        ).transpose(1, 2),
        "self-test",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", BROKEN)
def test_a_kernel_that_is_installed_but_wrong_is_not_used(
    kind: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pose_as(monkeypatch, (9, 0))
    fn, why = BROKEN[kind]
    install(monkeypatch, "flash_attn_interface", flash_attn_func=fn)
    assert resolve_attention("auto", "cpu", BF16).name == "torch_sdpa"
    assert not caplog.records  # auto chooses; there is nothing to warn about

    choice = resolve_attention("flash_attn3", "cpu", BF16)
    assert choice.name == "torch_sdpa" and why in choice.reason
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "flash_attn3" in record.getMessage() and why in record.getMessage()
    assert "using torch_sdpa instead" in record.getMessage()

    with pytest.raises(ConfigError, match="flash_attn3.*cannot run here"):
        resolve_attention("flash_attn3", "cpu", BF16, strict=True)


@pytest.mark.parametrize(
    ("name", "architecture", "dtype", "why"),
    [
        ("flash_attn2", None, BF16, "needs a CUDA device, but this is cpu"),
        ("flash_attn3", (8, 9), BF16, "built for sm9x, but this is sm89"),
        ("flash_attn2", (9, 0), torch.float32, "bf16 or fp16, not float32"),
        ("sage_attn2", (9, 0), BF16, "does not import"),
        ("cudnn", (9, 0), BF16, "cuDNN is not there"),
    ],
)
def test_strict_says_what_is_missing(
    name: str, architecture: tuple[int, int] | None, dtype: torch.dtype, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if architecture:
        pose_as(monkeypatch, architecture)
    monkeypatch.setitem(sys.modules, "sageattention", None)
    with pytest.raises(ConfigError, match=why):
        resolve_attention(name, "cpu", dtype, strict=True)


def test_eight_bit_attention_may_be_off_by_more_than_an_exact_one(monkeypatch: pytest.MonkeyPatch) -> None:
    pose_as(monkeypatch, (9, 0))
    install(monkeypatch, "sageattention", sageattn=lambda q, k, v, **_: 1.05 * sdpa(q, k, v))
    assert resolve_attention("sage_attn2", "cpu", BF16, strict=True).name == "sage_attn2"


@pytest.mark.parametrize("name", sorted(NOT_SUPPORTED))
def test_lightx2v_names_without_a_backend_are_named_as_such(name: str) -> None:
    with pytest.raises(ConfigError, match=r"not supported here.*torch_sdpa") as caught:
        check_attention_name(name, "self_attn_1_type")
    assert "self_attn_1_type" in str(caught.value)


def test_a_misspelt_name_is_answered_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match="Did you mean 'flash_attn3'"):
        resolve_attention("flash_attn_3", "cpu", BF16)


def test_the_table_and_the_names_are_the_same() -> None:
    assert set(SUPPORTED) == {"auto", "auto_fast", "torch_sdpa", *table.TABLE}
    assert set(SUPPORTED) >= FOR_VIDEO_ONLY
    assert not set(SUPPORTED) & NOT_SUPPORTED


def test_names_are_checked_without_torch() -> None:
    code = "import sys, lightx2v.config.attention_names; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


@pytest.mark.parametrize("repeats", [2, 477])
def test_one_key_with_a_weight_equals_that_many_equal_keys(repeats: int) -> None:
    q, k, v = torch.randn(2, 40, 3, 16), torch.randn(2, 9, 3, 16), torch.randn(2, 9, 3, 16)
    long_k, long_v = (torch.cat([t, t[:, -1:].expand(-1, repeats - 1, -1, -1)], dim=1).double() for t in (k, v))
    exact = sdpa(q.double(), long_k, long_v).float()
    torch.testing.assert_close(sdpa_repeated_last(q, k, v, repeats), exact, rtol=0, atol=1e-6)
