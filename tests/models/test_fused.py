"""The fused kernels against their plain functions: in triton's interpreter on a CPU, compiled on CUDA."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from lightx2v.models import fused, pointwise

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
    assert done.stdout.strip() == "''", done.stdout + done.stderr


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
    assert fused.why_not(kernels, torch.device("cpu")) == ""  # type: ignore[arg-type]
    setattr(kernels, step, wrong)
    assert fused.why_not(kernels, torch.device("cpu")).startswith(f"{step} to ")  # type: ignore[arg-type]


def test_on_a_cpu_the_plain_functions_run() -> None:
    x, row = torch.randn(1, 4, 8), torch.randn(1, 8)
    with torch.no_grad():
        expected = pointwise.norm_modulate(x, row, row, 1e-6, torch.float32)
        assert torch.equal(fused.norm_modulate(x, row, row, 1e-6, torch.float32), expected)
