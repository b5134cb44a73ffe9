"""QuantLinear: linear layers with 8-bit weights, in place of ordinary ones.

Where the device multiplies 8-bit numbers (`torch._scaled_mm` for e4m3, `torch._int_mm` for int8), activations are
quantised per token. Each kernel is first compared with the exact product, once per device. On other devices the weights
are dequantised for each product, which gives the same numbers as a dequantised model.

Legend: M rows, I input and O output features.
"""

import logging
from collections.abc import Callable, Container, Mapping
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..weights.quantization import dequantise, quantise
from .fused import quantise_tokens

log = logging.getLogger("lightx2v.quant")

Kernel = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]
"""(x_MI, q_OI, scale_O1, bias_O) -> y_MO in the dtype of x."""

GATE = 0.998
"""The lowest cosine to the exact product that a kernel may have. Activations in e4m3 alone give about 0.9993."""


class QuantLinear(nn.Module):
    """y = x (q * scale)^T + bias. `weight` holds q; names and shapes are those of LightX2V's files."""

    def __init__(self, in_features: int, out_features: int, dtype: torch.dtype, *, bias: bool, fast: bool) -> None:
        super().__init__()
        self.in_features, self.out_features, self.fast = in_features, out_features, fast
        self.weight = nn.Parameter(torch.empty(out_features, in_features, dtype=dtype), requires_grad=False)
        self.weight_scale = nn.Parameter(torch.empty(out_features, 1, dtype=torch.float32), requires_grad=False)
        self.bias = nn.Parameter(torch.empty(out_features), requires_grad=False) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        kernel = kernel_for(self.weight.dtype, x.device, x.dtype) if self.fast else dequantised
        y_MO = kernel(x.reshape(-1, self.in_features), self.weight, self.weight_scale, self.bias)
        return y_MO.unflatten(0, x.shape[:-1]) if x.dim() != 2 else y_MO

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, {str(self.weight.dtype).removeprefix('torch.')}"


def swap_linears(
    module: nn.Module, formats: Mapping[str, torch.dtype], *, fast: bool = True, exact: Container[str] = ()
) -> None:
    """Replace linear layers whose weights are in `formats` (weight name -> dtype) by QuantLinears on the meta device.

    `fast` allows kernels that quantise activations too, but not for the weights in `exact`.
    """
    for name, dtype in formats.items():
        parent, _, leaf = name.removesuffix(".weight").rpartition(".")
        owner = module.get_submodule(parent)
        linear = getattr(owner, leaf)
        with torch.device("meta"):
            quant = QuantLinear(
                *(linear.in_features, linear.out_features, dtype),
                bias=linear.bias is not None,
                fast=fast and name not in exact,
            )
        setattr(owner, leaf, quant)


def dequantised(x_MI: Tensor, q_OI: Tensor, scale_O1: Tensor, bias_O: Tensor | None) -> Tensor:
    return F.linear(x_MI, dequantise(q_OI, scale_O1, x_MI.dtype), bias_O)


def scaled_mm(x_MI: Tensor, q_OI: Tensor, scale_O1: Tensor, bias_O: Tensor | None) -> Tensor:
    """e4m3 x e4m3 with a scale per token and per output channel."""
    x_q, x_scale = quantise_tokens(x_MI, torch.float8_e4m3fn)
    return torch._scaled_mm(
        x_q, q_OI.t(), scale_a=x_scale, scale_b=scale_O1.t(), bias=bias_O, out_dtype=x_MI.dtype, use_fast_accum=True
    )


def int_mm(x_MI: Tensor, q_OI: Tensor, scale_O1: Tensor, bias_O: Tensor | None) -> Tensor:
    """int8 x int8 in int32, with a scale per token and per output channel."""
    rows = len(x_MI)
    x_q, x_scale = quantise_tokens(F.pad(x_MI, (0, 0, 0, max(0, 32 - rows))), torch.int8)  # needs more than 16 rows
    y_MO = torch._int_mm(x_q, q_OI.t())[:rows].float().mul_(x_scale[:rows]).mul_(scale_O1.t())
    return (y_MO if bias_O is None else y_MO.add_(bias_O)).to(x_MI.dtype)


_KERNELS: dict[torch.dtype, Kernel] = {torch.float8_e4m3fn: scaled_mm, torch.int8: int_mm}


@cache
def kernel_for(weight: torch.dtype, device: torch.device, compute: torch.dtype) -> Kernel:
    """The fastest kernel that works on this device and passes GATE. Logs its name and the reason once."""
    fast = _KERNELS.get(weight)
    if device.type != "cuda" or fast is None or compute != torch.bfloat16:
        return dequantised
    why = why_not(fast, weight, device, compute)
    name = "dequantised" if why else fast.__name__
    log.info("8-bit products on %s: %s%s", torch.cuda.get_device_name(device), name, f" ({why})" if why else "")
    return dequantised if why else fast


def why_not(kernel: Kernel, weight: torch.dtype, device: torch.device, compute: torch.dtype) -> str:
    """Why `kernel` cannot be used, or "". Tries one product whose channels have very different sizes."""
    generator = torch.Generator().manual_seed(0)
    x_MI = torch.randn(48, 256, generator=generator).to(device, compute)
    sizes_O = torch.logspace(-3, 1, 128)
    w_OI = torch.randn(128, 256, generator=generator) * sizes_O[:, None]
    q_OI, scale_O1 = (part.to(device) for part in quantise(w_OI, weight))
    bias_O = (torch.randn(128, generator=generator) * sizes_O).to(device, compute)
    try:
        got = kernel(x_MI, q_OI, scale_O1, bias_O).float()
    except (RuntimeError, NotImplementedError, ValueError) as error:
        return (str(error).splitlines() or ["no reason given"])[0][:120]
    exact = dequantised(x_MI.float(), q_OI, scale_O1, bias_O.float())
    # Channel by channel: in the whole product a wrong scale of a small channel would not show.
    cosine = F.cosine_similarity(got, exact, dim=0).min().item()
    size = (got.norm(dim=0) / exact.norm(dim=0) - 1).abs().max().item()
    good = cosine >= GATE and size <= 0.05
    return "" if good else f"cosine {cosine:.4f} to the exact product, sizes off by {size:.2%}"
