"""The fused kernels against their plain functions: in triton's interpreter on a CPU, compiled on CUDA."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lightx2v import models
from lightx2v.models import fused, pointwise

CPU = torch.device("cpu")

INTERPRETED = """
import torch
from lightx2v.models import fused, triton_kernels
print(repr(fused.why_not(triton_kernels, torch.device("cpu"))))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="triton is for Linux")
def test_every_kernel_does_what_its_plain_function_does() -> None:
    """In a process of its own: triton decides on import whether it interprets."""
    env = {"TRITON_INTERPRET": "1", "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", INTERPRETED], env=env, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "{}", done.stdout + done.stderr


@pytest.mark.parametrize(
    ("step", "wrong"),
    [
        ("norm_modulate", lambda x, shift, scale, eps, dtype: pointwise.norm_modulate(x, shift, scale - 1, eps, dtype)),
        ("layer_norm", lambda x, weight, bias, eps, dtype: pointwise.layer_norm(x, weight, -bias, eps, dtype)),
        ("normed", lambda x, w, eps: x * w),
        ("norm_rotate", lambda x, w, eps, turn: pointwise.norm_rotate(x, w, eps, turn.conj())),
        ("add_gated", lambda x, y, gate: x + y),
        ("add", lambda x, y: x - y),
        ("quantise_tokens", lambda x, dtype: (x.to(dtype), torch.ones(len(x), 1))),
    ],
)
def test_a_kernel_that_computes_something_else_is_not_used(step: str, wrong: object) -> None:
    kernels = SimpleNamespace(**vars(pointwise))
    assert fused.why_not(kernels, torch.device("cpu")) == {}  # type: ignore[arg-type]
    setattr(kernels, step, wrong)
    wrong_ones = fused.why_not(kernels, torch.device("cpu"))  # type: ignore[arg-type]
    assert {name for name, _ in wrong_ones} == {step}
    assert all(why.startswith(f"{step} to ") for why in wrong_ones.values())


def test_on_a_cpu_the_plain_functions_run() -> None:
    x, row = torch.randn(1, 4, 8), torch.randn(1, 8)
    with torch.no_grad():
        expected = pointwise.norm_modulate(x, row, row, 1e-6, torch.float32)
        assert torch.equal(fused.norm_modulate(x, row, row, 1e-6, torch.float32), expected)


def test_a_network_has_only_its_own_kernels_compiled_at_its_own_widths(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each kernel for each dtype and width costs a third of a second."""
    used: set[tuple[str, torch.dtype, int]] = set()

    def noting(name: str) -> Callable[..., Any]:
        def step(x: torch.Tensor, *args: Any) -> Any:
            result = getattr(pointwise, name)(x, *args)
            used.add((name, (result if isinstance(result, torch.Tensor) else result[0]).dtype, x.shape[-1]))
            return result

        return step

    kernels = SimpleNamespace(**{name: noting(name) for name, _ in fused._cases(CPU, fused.ODD)})
    on = fused.FusedKernels(CPU)
    monkeypatch.setattr(fused, "_on", lambda device: on)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    monkeypatch.setitem(sys.modules, "lightx2v.models.triton_kernels", kernels)
    monkeypatch.setattr(models, "triton_kernels", kernels, raising=False)
    fused.compile_for(CPU, fused.Dims(2, 24, 80), torch.bfloat16, {torch.float8_e4m3fn})
    of_width = {(name, torch.bfloat16) for name in ("norm_modulate", "layer_norm", "normed", "norm_rotate")}
    of_width |= {(name, torch.float32) for name in ("norm_modulate", "add_gated", "add")}
    assert {(name, dtype) for name, dtype, width in used if name != "quantise_tokens"} == of_width
    assert {width for name, _, width in used if name != "quantise_tokens"} == {48}
    assert {each for each in used if each[0] == "quantise_tokens"} == {
        ("quantise_tokens", torch.float8_e4m3fn, width) for width in (48, 80)
    }
    used.clear()
    assert fused.kernels_for(CPU, ("normed", torch.bfloat16)) is kernels and not used, "it was tested before"
    assert fused.kernels_for(CPU, ("normed", torch.float16)) is kernels and used == {("normed", torch.float16, 120)}
    assert fused.kernels_for(CPU, ("normed", torch.float64)) is None, "nobody tests it in this dtype"
