"""The element-wise steps of a block, each as one fused kernel where the device has one that is correct.

block.py calls these functions; pointwise.py has the same ones without fusion. On CUDA with triton the kernels of
triton_kernels.py replace those once they have agreed with them on this device. Gradients, other devices and a kernel
that fails use the plain functions. On an H100 fusion makes a forward at 480p 9 to 11 % faster.

Without gradients each of these may overwrite x.
"""

from __future__ import annotations

import logging
from functools import cache
from types import ModuleType

import torch
from torch import Tensor

from . import pointwise
from .pointwise import gelu

__all__ = ["add", "add_gated", "gelu", "layer_norm", "norm_modulate", "norm_rotate", "normed", "quantise_tokens"]

log = logging.getLogger("lightx2v.fused")

WIDEST = 16384
"""Most values in a row that fit into the registers of one program."""

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float8_e4m3fn: 0.07, torch.int8: 0.01}
"""Relative differences that rounding explains: two bf16 steps, one step of e4m3."""


def norm_modulate(x_BLD: Tensor, shift_BD: Tensor, scale_BD: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    """LayerNorm(x)·(1 + scale) + shift, rounded to `dtype`."""
    if kernels := _kernels(x_BLD):
        return kernels.layer_norm(x_BLD, 1 + scale_BD, shift_BD, eps, dtype)
    return pointwise.norm_modulate(x_BLD, shift_BD, scale_BD, eps, dtype)


def layer_norm(x_BLD: Tensor, weight_D: Tensor, bias_D: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    """LayerNorm(x)·weight + bias, rounded to `dtype`."""
    if kernels := _kernels(x_BLD):
        return kernels.layer_norm(x_BLD, weight_D[None], bias_D[None], eps, dtype)
    return pointwise.layer_norm(x_BLD, weight_D, bias_D, eps, dtype)


def normed(x_BLD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """RMSNorm over the whole width, in x's dtype."""
    if kernels := _kernels(x_BLD):
        return kernels.rms_norm_(x_BLD, weight_D, eps)
    return pointwise.normed(x_BLD, weight_D, eps)


def norm_rotate(x_BLD: Tensor, weight_D: Tensor, eps: float, rotations_L1P: Tensor) -> Tensor:
    """RMSNorm over the whole width, then the rotary position of every head; (B, L, N, H) in x's dtype."""
    if kernels := _kernels(x_BLD):
        return kernels.norm_rotate_(x_BLD, weight_D, eps, rotations_L1P)
    return pointwise.norm_rotate(x_BLD, weight_D, eps, rotations_L1P)


def add_gated(x_BLD: Tensor, y_BLD: Tensor, gate_BD: Tensor) -> Tensor:
    """x + gate·y in float32."""
    if kernels := _kernels(x_BLD):
        return kernels.add_gated_(x_BLD, y_BLD, gate_BD)
    return pointwise.add_gated(x_BLD, y_BLD, gate_BD)


def add(x_BLD: Tensor, y_BLD: Tensor) -> Tensor:
    """x + y in float32."""
    if kernels := _kernels(x_BLD):
        return kernels.add_gated_(x_BLD, y_BLD, None)
    return pointwise.add(x_BLD, y_BLD)


def quantise_tokens(x_MI: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The rows in 8 bits and the scale (M, 1) of each, for products with 8-bit weights."""
    if kernels := _kernels(x_MI):
        return kernels.quantise_tokens(x_MI, dtype)
    return pointwise.quantise_tokens(x_MI, dtype)


def _kernels(x: Tensor) -> ModuleType | None:
    if x.device.type != "cuda" or torch.is_grad_enabled() or x.shape[-1] > WIDEST or x.stride(-1) != 1:
        return None
    return kernels_for(x.device)


@cache
def kernels_for(device: torch.device) -> ModuleType | None:
    """The kernels if they are correct on this device, else None. Logs the reason once."""
    name = torch.cuda.get_device_name(device)
    try:
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
    differences: dict[str, tuple[float, float]] = {}

    def compare(step: str, got: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
        difference = ((got.float() - expected.float()).norm() / expected.float().norm()).item()
        differences[step] = (difference if got.shape == expected.shape else float("nan"), TOLERANCE[dtype])

    for dtype in (torch.float32, torch.bfloat16):
        for rows, shift in ((rows_BD, other_BD), (rows_BD[:1], other_BD[:1])):
            got = kernels.layer_norm(x_BLD[:, 3:], 1 + rows, shift, eps, dtype)
            compare("layer_norm", got, pointwise.norm_modulate(x_BLD[:, 3:], shift, rows, eps, dtype), dtype)
        x = x_BLD.to(dtype)
        expected = pointwise.rms_norm(x, weight_D, eps)
        compare("rms_norm", kernels.rms_norm_(x.clone(), weight_D, eps), expected, dtype)
        expected = pointwise.norm_rotate(x, weight_D, eps, rotations_L1P)
        compare("norm_rotate", kernels.norm_rotate_(x.clone(), weight_D, eps, rotations_L1P), expected, dtype)
    for gate in (rows_BD, rows_BD[:1]):
        expected = pointwise.add_gated(x_BLD.clone(), y_BLD, gate)
        compare("add_gated", kernels.add_gated_(x_BLD.clone(), y_BLD, gate), expected, torch.float32)
    compare("add", kernels.add_gated_(x_BLD.clone(), y_BLD, None), x_BLD + y_BLD.float(), torch.float32)
    for dtype in (torch.int8, torch.float8_e4m3fn):
        if dtype is torch.int8 or device.type != "cuda" or torch.cuda.get_device_capability(device) >= (8, 9):
            q_MI, scale_M1 = kernels.quantise_tokens(y_BLD.flatten(0, 1), dtype)
            q, scale = pointwise.quantise_tokens(y_BLD.flatten(0, 1), dtype)
            compare(f"quantise_tokens to {dtype}", q_MI.float() * scale_M1, q.float() * scale, dtype)
    wrong = [step for step, (difference, allowed) in differences.items() if not difference <= allowed]
    return f"{wrong[0]} is off by {differences[wrong[0]][0]:.1e}" if wrong else ""
