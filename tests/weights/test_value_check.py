"""Weights that are all zero, constant, NaN or infinite are found while they are loaded."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from lightx2v.errors import CheckpointError
from lightx2v.weights.checkpoint import open_checkpoint
from lightx2v.weights.module_loader import load_into
from lightx2v.weights.value_check import ValueCheck

FLOATS = [torch.float32, torch.bfloat16, torch.float16]
FP8 = [torch.float8_e4m3fn, torch.float8_e5m2]


def judged(name: str, tensor: torch.Tensor) -> str:
    """What is said of a tensor that is seen whole; of one whose parts were looked at before, the same is said."""
    whole, in_parts = _judged(name, tensor, looks=False), _judged(name, tensor, looks=True)
    assert whole == in_parts
    return whole


def _judged(name: str, tensor: torch.Tensor, *, looks: bool) -> str:
    check = ValueCheck("x.safetensors")
    try:
        for part in tensor.flatten().split(997) if looks else ():
            check.look(name, part)
        check.see(name, tensor)
        check.finish()
    except CheckpointError as error:
        return str(error)
    return ""


def ordinary(dtype: torch.dtype) -> torch.Tensor:
    values = torch.randn(300, 40, generator=torch.Generator().manual_seed(0))
    return (values * 50).round().to(dtype) if dtype is torch.int8 else values.to(dtype)


@pytest.mark.parametrize("dtype", [*FLOATS, *FP8, torch.int8])
def test_ordinary_weights_pass_and_zeros_do_not(dtype: torch.dtype) -> None:
    assert judged("a.weight", ordinary(dtype)) == ""
    assert "every value of a.weight is zero" in judged("a.weight", torch.zeros(30, 40).to(dtype))


@pytest.mark.parametrize("dtype", [*FLOATS, *FP8])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_one_bad_value_is_found(dtype: torch.dtype, value: float) -> None:
    tensor = ordinary(dtype)
    tensor[299, 17] = torch.tensor(value).to(dtype)
    if not bool(torch.isfinite(tensor.float()).all()):  # e4m3 has no infinity
        assert "a.weight holds NaN or infinity" in judged("a.weight", tensor)


@pytest.mark.parametrize("dtype", FP8)
def test_every_code_of_float8_is_judged_rightly(dtype: torch.dtype) -> None:
    for code in range(256):
        tensor = ordinary(dtype)
        tensor.view(torch.uint8)[3, 4] = code
        finite = bool(torch.isfinite(tensor[3, 4].float()))
        assert (judged("a.weight", tensor) == "") is finite, code


def test_norms_of_one_and_biases_of_zero_are_ordinary() -> None:
    assert judged("norm.weight", torch.ones(8)) == judged("norm.gamma", torch.ones(8, 1, 1, 1)) == ""
    assert judged("a.bias", torch.zeros(8)) == judged("a.weight", torch.zeros(1, 1)) == ""
    assert "every value of norm.weight is zero" in judged("norm.weight", torch.zeros(8))
    assert "every value of a.weight is 0.5" in judged("a.weight", torch.full((4, 4), 0.5))


def test_a_file_with_a_hole_is_refused_by_the_name_of_a_tensor(tmp_path: Path) -> None:
    save_file({"weight": torch.zeros(6, 4), "bias": torch.ones(6)}, tmp_path / "x.safetensors")
    with torch.device("meta"):
        layer = nn.Linear(4, 6)
    with pytest.raises(CheckpointError, match=r"x\.safetensors: every value of weight is zero.*download it again"):
        load_into(layer, open_checkpoint(tmp_path / "x.safetensors"), dtype_of=lambda _: torch.float32, device="cpu")


@pytest.mark.parametrize("dtype", [torch.float64, *FLOATS, *FP8, torch.int8])
@pytest.mark.parametrize("values", ["mixed", "positive", "negative", "zeros of both signs"])
def test_the_extremes_of_parts_are_those_of_the_tensor(
    dtype: torch.dtype, values: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensor = ordinary(dtype if dtype is not torch.float64 else torch.float32).to(dtype)
    if values != "mixed":
        tensor = (tensor.float().abs() * (-1 if values == "negative" else 1)).to(dtype)
    if values == "zeros of both signs":
        tensor = (tensor.float() * 0 * ordinary(torch.float32).sign()).to(dtype)
    found: list[list[float]] = []
    monkeypatch.setattr(ValueCheck, "_judge", lambda check, name, dtype, dims, ends: found.append(list(ends)))
    _judged("a.weight", tensor, looks=True)
    _judged("a.weight", tensor, looks=False)
    assert found[0] == found[1]


def test_a_tensor_of_which_a_part_was_not_looked_at_is_seen_whole() -> None:
    check, tensor = ValueCheck("x.safetensors"), ordinary(torch.bfloat16)
    tensor[299, 39] = float("nan")
    check.look("a.weight", tensor.flatten()[:-1])
    with pytest.raises(CheckpointError, match="NaN"):
        check.see("a.weight", tensor)


def test_the_threads_that_read_look_at_the_values(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = {"weight": torch.randn(2048, 4096), "bias": torch.randn(2048)}
    save_file(tensors, tmp_path / "w.safetensors")
    with torch.device("meta"):
        net = nn.Linear(4096, 2048)
    looked: set[str] = set()
    look = ValueCheck.look
    monkeypatch.setattr(
        ValueCheck,
        "look",
        lambda check, name, part: looked.add(threading.current_thread().name) or look(check, name, part),
    )
    monkeypatch.setattr("lightx2v.weights.value_check._extremes", None)
    load_into(net, open_checkpoint(tmp_path / "w.safetensors"), dtype_of=lambda _: torch.bfloat16, device="cpu")
    assert looked and all(name.startswith("lightx2v-read") for name in looked)
    assert torch.equal(net.weight, tensors["weight"].bfloat16())
