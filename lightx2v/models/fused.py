"""The element-wise steps of a block, each as one fused kernel where the device has one that is correct.

block.py calls these functions; pointwise.py has the same ones without fusion. On CUDA with triton the kernels of
triton_kernels.py replace those once they have agreed with them on this device. Gradients, other devices and a kernel
that fails use the plain functions. On an H100 fusion makes a forward at 480p 9 to 11 % faster.

With gradients disabled, each of these may overwrite x. pointwise.py describes them.
"""

from __future__ import annotations

import logging
import math
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
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

FAILURES = (ImportError, OSError, RuntimeError, ValueError, TypeError, AttributeError, AssertionError)
"""What triton raises where it cannot compile or run."""

EIGHT_BITS = (torch.int8, torch.float8_e4m3fn)

WIDEST = 16384
"""Most values in a row that fit into the registers of one program."""

TOLERANCE = {
    torch.float32: 1e-5,
    torch.float16: 2e-3,
    torch.bfloat16: 1e-2,
    torch.float8_e4m3fn: 0.07,
    torch.int8: 0.01,
}
"""Relative differences that rounding explains: two fp16 or bf16 steps, one step of e4m3."""


Step = tuple[str, torch.dtype]
"""A function of pointwise.py by its name, and the dtype of its result."""


def _fused(plain: Callable[Concatenate[Tensor, P], T]) -> Callable[Concatenate[Tensor, P], T]:
    """`plain`, or the kernel of the same name where the first tensor's device has it."""

    @wraps(plain)
    def step(x: Tensor, *args: P.args, **kwargs: P.kwargs) -> T:
        dtype = next((each for each in args if isinstance(each, torch.dtype)), x.dtype)
        return getattr(_kernels(x, (plain.__name__, dtype)) or pointwise, plain.__name__)(x, *args, **kwargs)

    return step


norm_modulate = _fused(pointwise.norm_modulate)
layer_norm = _fused(pointwise.layer_norm)
normed = _fused(pointwise.normed)
norm_rotate = _fused(pointwise.norm_rotate)
add_gated = _fused(pointwise.add_gated)
add = _fused(pointwise.add)
avoid = _fused(pointwise.avoid)
quantise_tokens = _fused(pointwise.quantise_tokens)


def _kernels(x: Tensor, step: Step) -> ModuleType | None:
    if x.device.type != "cuda" or torch.is_grad_enabled() or x.shape[-1] > WIDEST or x.stride(-1) != 1:
        return None
    return kernels_for(x.device, step)


def kernels_for(device: torch.device, step: Step) -> ModuleType | None:
    """The kernels, if that of this step is correct on this device, else None."""
    return _on(device).module(step)


def compile_for(device: torch.device, dims: Dims, compute: torch.dtype, formats: Iterable[torch.dtype] = ()) -> None:
    """Compile and test what a network of this size needs, with products in `compute` and weights in these 8-bit
    formats. What else is used is compiled when it is."""
    steps = [(name, compute) for name in ("norm_modulate", "layer_norm", "normed", "norm_rotate")]
    steps += [(name, torch.float32) for name in ("norm_modulate", "add_gated", "add")]
    _on(device).test([*steps, *(("quantise_tokens", dtype) for dtype in formats if dtype in EIGHT_BITS)], dims)


@cache
def _on(device: torch.device) -> FusedKernels:
    return FusedKernels(device)


class FusedKernels:
    """The kernels on one device. Each is tested there before it is used in a dtype."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._works: dict[Step, bool] = {}
        self._lock = threading.Lock()
        self._module: ModuleType | None = None

    def module(self, step: Step) -> ModuleType | None:
        if step not in self._works:
            self.test([step])
        return self._module if self._works[step] else None

    def test(self, steps: Sequence[Step], dims: Dims | None = None) -> None:
        """Find out which of these kernels work, at the widths of a network or at odd ones. Logs what does not."""
        with self._lock:
            new = [step for step in steps if step not in self._works]
            if not new:
                return
            why = self._why_not(new, dims or ODD)
            for step in new:
                self._works[step] = step not in why
            reasons = "; ".join(dict.fromkeys(why.values()))
            log.info(
                "Fused element-wise steps on %s: %s",
                torch.cuda.get_device_name(self._device),
                f"plain {', '.join(sorted({name for name, _ in why}))} ({reasons})" if why else "triton",
            )

    def _why_not(self, steps: Sequence[Step], dims: Dims) -> dict[Step, str]:
        try:
            use_kernel_cache()
            from . import triton_kernels

            self._module = triton_kernels
            return why_not(triton_kernels, self._device, steps, dims)
        except FAILURES as failure:
            return dict.fromkeys(steps, _reason(failure))


@dataclass(frozen=True, slots=True)
class Dims:
    """The sizes of a network that kernels are compiled for."""

    heads: int
    head_dim: int
    ffn_dim: int


ODD = Dims(5, 24, 200)
"""Widths that fill no program."""


@torch.no_grad()
def why_not(
    kernels: ModuleType, device: torch.device, steps: Iterable[Step] | None = None, dims: Dims = ODD
) -> dict[Step, str]:
    """Of these steps, or of all, those whose kernel differs from its plain function on this device,
    and why. Tries two batch rows."""
    found: dict[Step, str] = {}
    cases = _cases(device, dims)
    for step in cases if steps is None else steps:
        name, dtype = step
        for x, args in cases.get(step) or []:
            try:
                got, expected = (_widened(getattr(module, name)(_copied(x), *args)) for module in (kernels, pointwise))
            except FAILURES as failure:
                found[step] = _reason(failure)
                break
            same = got.shape == expected.shape
            difference = ((got - expected).norm() / expected.norm()).item() if same else math.nan
            if not difference <= TOLERANCE[dtype]:
                found[step] = f"{name} to {dtype} is off by {difference:.1e}"
                break
        else:
            if step not in cases:
                found[step] = f"{name} to {dtype} was never tested"
    return found


def _cases(device: torch.device, dims: Dims) -> dict[Step, list[tuple[Tensor, tuple[Any, ...]]]]:
    """The inputs to try each step with: its first tensor and the other arguments."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device)

    batch, length, width, half = 2, 37, dims.heads * dims.head_dim, dims.head_dim // 2
    x_BLD, y_BLD, eps = 3 * draw(batch, length, width) + 1, draw(batch, length, width).bfloat16(), 1e-6
    rows_BD, other_BD, weight_D = draw(batch, width), draw(batch, width), draw(width)
    rotations_L1P = torch.polar(torch.ones(length, 1, half), draw(length, 1, half).cpu()).to(device)
    eight_bits = [*EIGHT_BITS]
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 9):
        eight_bits.remove(torch.float8_e4m3fn)
    cases: dict[Step, list[tuple[Tensor, tuple[Any, ...]]]] = {}
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        cases["norm_modulate", dtype] = [
            (x_BLD[:, 3:], (other_BD[rows], rows_BD[rows], eps, dtype)) for rows in (slice(0, batch), slice(0, 1))
        ]
        cases["layer_norm", dtype] = [(x_BLD[:, 3:], (weight_D, other_BD[0], eps, dtype))]
        cases["normed", dtype] = [(x_BLD.to(dtype), (weight_D, eps))]
        cases["avoid", dtype] = [(x_BLD.to(dtype), (y_BLD.to(dtype), 11.0, tau, 0.25)) for tau in (2.5, 100.0)]
        cases["norm_rotate", dtype] = [(x_BLD.to(dtype), (weight_D, eps, rotations_L1P))]
    cases["add_gated", torch.float32] = [(x_BLD, (y_BLD, gate_BD)) for gate_BD in (rows_BD, rows_BD[:1])]
    cases["add", torch.float32] = [(x_BLD, (y_BLD,))]
    for dtype in eight_bits:
        inner_MF = draw(length, dims.ffn_dim).bfloat16()
        cases["quantise_tokens", dtype] = [(x_MI, (dtype,)) for x_MI in (y_BLD.flatten(0, 1), inner_MF)]
    return cases


def _reason(failure: BaseException) -> str:
    return (str(failure).splitlines() or [type(failure).__name__])[0][:120]


def _copied(x: Tensor) -> Tensor:
    """A copy for steps that overwrite it, with the same gaps between its rows."""
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device).copy_(x)


def _widened(result: Tensor | tuple[Tensor, Tensor]) -> Tensor:
    """The numbers in float32; `quantise_tokens` returns them with scales."""
    return result.float() if isinstance(result, Tensor) else result[0].float() * result[1]
