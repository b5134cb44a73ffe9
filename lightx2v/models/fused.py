"""The element-wise steps of a block, each as one fused kernel where the device has one that is correct.

block.py calls these functions; pointwise.py has the same ones without fusion. On CUDA with triton the kernels of
triton_kernels.py replace those once they have agreed with them on this device. Gradients, other devices and a kernel
that fails use the plain functions. On an H100 fusion makes a forward at 480p 9 to 11 % faster.

With gradients disabled, each of these may overwrite x. pointwise.py describes them.
"""

import logging
import math
from collections.abc import Callable
from functools import cache, wraps
from types import ModuleType
from typing import Any, Concatenate, ParamSpec, TypeVar

import torch
from torch import Tensor

from ..config.folders import use_kernel_cache
from . import pointwise

log = logging.getLogger("lightx2v.fused")

P = ParamSpec("P")
T = TypeVar("T")

WIDEST = 16384
"""Most values in a row that fit into the registers of one program."""

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float8_e4m3fn: 0.07, torch.int8: 0.01}
"""Relative differences that rounding explains: two bf16 steps, one step of e4m3."""


def _fused(plain: Callable[Concatenate[Tensor, P], T]) -> Callable[Concatenate[Tensor, P], T]:
    """`plain`, or the kernel of the same name where the first tensor's device has it."""

    @wraps(plain)
    def step(x: Tensor, *args: P.args, **kwargs: P.kwargs) -> T:
        return getattr(_kernels(x) or pointwise, plain.__name__)(x, *args, **kwargs)

    return step


norm_modulate = _fused(pointwise.norm_modulate)
layer_norm = _fused(pointwise.layer_norm)
normed = _fused(pointwise.normed)
norm_rotate = _fused(pointwise.norm_rotate)
add_gated = _fused(pointwise.add_gated)
add = _fused(pointwise.add)
avoid = _fused(pointwise.avoid)
quantise_tokens = _fused(pointwise.quantise_tokens)


def _kernels(x: Tensor) -> ModuleType | None:
    if x.device.type != "cuda" or torch.is_grad_enabled() or x.shape[-1] > WIDEST or x.stride(-1) != 1:
        return None
    return kernels_for(x.device)


@cache
def kernels_for(device: torch.device) -> ModuleType | None:
    """The kernels if they are correct on this device, else None. Logs the reason once."""
    name = torch.cuda.get_device_name(device)
    try:
        use_kernel_cache()
        from . import triton_kernels

        why = why_not(triton_kernels, device)
    except (ImportError, OSError, RuntimeError, ValueError, TypeError, AttributeError, AssertionError) as failure:
        why = (str(failure).splitlines() or [type(failure).__name__])[0][:120]
        triton_kernels = None
    log.info("Fused element-wise steps on %s: %s", name, f"no ({why})" if why else "triton")
    return None if why else triton_kernels


@torch.no_grad()
def why_not(kernels: ModuleType, device: torch.device) -> str:
    """The kernel that differs from its plain function on this device, or "". Tries odd widths and two batch rows."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device)

    batch, length, heads, head_dim = 2, 37, 5, 24
    width = heads * head_dim
    x_BLD, y_BLD, eps = 3 * draw(batch, length, width) + 1, draw(batch, length, width).bfloat16(), 1e-6
    rows_BD, other_BD, weight_D = draw(batch, width), draw(batch, width), draw(width)
    rotations_L1P = torch.polar(torch.ones(length, 1, head_dim // 2), draw(length, 1, head_dim // 2).cpu()).to(device)
    eight_bits = [torch.int8, torch.float8_e4m3fn]
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 9):
        eight_bits.remove(torch.float8_e4m3fn)
    cases: list[tuple[str, torch.dtype, Tensor, tuple[Any, ...]]] = []
    for dtype in (torch.float32, torch.bfloat16):
        for rows in (slice(0, batch), slice(0, 1)):
            cases.append(("norm_modulate", dtype, x_BLD[:, 3:], (other_BD[rows], rows_BD[rows], eps, dtype)))
        cases.append(("layer_norm", dtype, x_BLD[:, 3:], (weight_D, other_BD[0], eps, dtype)))
        cases.append(("normed", dtype, x_BLD.to(dtype), (weight_D, eps)))
        cases += [("avoid", dtype, x_BLD.to(dtype), (y_BLD.to(dtype), 11.0, tau, 0.25)) for tau in (2.5, 100.0)]
        cases.append(("norm_rotate", dtype, x_BLD.to(dtype), (weight_D, eps, rotations_L1P)))
    cases += [("add_gated", torch.float32, x_BLD, (y_BLD, gate_BD)) for gate_BD in (rows_BD, rows_BD[:1])]
    cases.append(("add", torch.float32, x_BLD, (y_BLD,)))
    cases += [("quantise_tokens", dtype, y_BLD.flatten(0, 1), (dtype,)) for dtype in eight_bits]
    for name, dtype, x, args in cases:
        got, expected = (_widened(getattr(module, name)(_copied(x), *args)) for module in (kernels, pointwise))
        difference = ((got - expected).norm() / expected.norm()).item() if got.shape == expected.shape else math.nan
        if not difference <= TOLERANCE[dtype]:
            return f"{name} to {dtype} is off by {difference:.1e}"
    return ""


def _copied(x: Tensor) -> Tensor:
    """A copy for steps that overwrite it, with the same gaps between its rows."""
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device).copy_(x)


def _widened(result: Tensor | tuple[Tensor, Tensor]) -> Tensor:
    """The numbers in float32; `quantise_tokens` returns them with scales."""
    return result.float() if isinstance(result, Tensor) else result[0].float() * result[1]
