"""GGUFLinear: linear layers whose weights stay in GGUF blocks and are dequantised as they are used.

A block of the network dequantises each of its matrices once, into memory that is free again when the block has run:
`dequantise_once` puts that on a block. On CUDA a Triton kernel does it, once it has given the same bits as the plain
function on this device.

LoRAs in `merged` are added to the dequantised weights in float32; the sum is rounded once, as in a model with merged
LoRAs. They may wait in host memory.
"""

import logging
from collections.abc import Callable, Iterable, Mapping
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..weights import gguf_blocks
from ..weights.gguf_blocks import BlockFormat
from ..weights.lora import ROWS
from ..weights.lora_delta import Delta, add_deltas

log = logging.getLogger("lightx2v.quant")

Dequantise = Callable[[Tensor, BlockFormat, torch.dtype], Tensor]
"""(uint8 [rows, bytes], their format, dtype) -> weights [rows, columns]."""

MANY_ROWS = 2048
"""Rows that an accelerator merges LoRAs into at once: their float32 values take 42 MB at full width."""


class GGUFLinear(nn.Module):
    """y = x W^T + bias. `weight` holds the blocks of W, uint8 [out, bytes of a row]."""

    def __init__(self, in_features: int, out_features: int, form: BlockFormat, *, bias: bool) -> None:
        super().__init__()
        self.in_features, self.out_features, self.form = in_features, out_features, form
        width = in_features // form.size * form.nbytes
        self.weight = nn.Parameter(torch.empty(out_features, width, dtype=torch.uint8), requires_grad=False)
        self.bias = nn.Parameter(torch.empty(out_features), requires_grad=False) if bias else None
        self.merged: list[Delta] = []
        self.check_sum: Callable[[Tensor], None] | None = None
        self._values: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self._values is None:
            self._values = self.values(x.dtype)
        return F.linear(x, self._values, self.bias)

    def values(self, dtype: torch.dtype) -> Tensor:
        """The weights [out, in] with the merged LoRAs. The first time after an exchange, `check_sum` sees them."""
        dequantise = dequantise_on(self.weight.device, self.form)
        if not self.merged:
            return dequantise(self.weight, self.form, dtype)
        deltas = [delta.to(self.weight.device, torch.float32) for delta in self.merged]
        result = torch.empty(self.out_features, self.in_features, dtype=dtype, device=self.weight.device)
        rows = ROWS if self.weight.device.type == "cpu" else MANY_ROWS
        blocks = lambda start: dequantise(self.weight[start : start + rows], self.form, torch.float32)  # noqa: E731
        for part in add_deltas(deltas, blocks, result, rows):
            if self.check_sum is not None:
                self.check_sum(part)
        self.check_sum = None
        return result

    def forget(self) -> None:
        """Give the memory of the dequantised weights back."""
        self._values = None

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, {self.form.name}"


def swap_for_blocks(module: nn.Module, forms: Mapping[str, BlockFormat], units: Iterable[nn.Module]) -> None:
    """Replace linear layers whose weights are in `forms` (weight name -> format) by GGUFLinears on the meta device.

    `units` are the network's blocks, which run one after the other.
    """
    for name, form in forms.items():
        parent, _, leaf = name.removesuffix(".weight").rpartition(".")
        owner = module.get_submodule(parent)
        linear = getattr(owner, leaf)
        with torch.device("meta"):
            layer = GGUFLinear(linear.in_features, linear.out_features, form, bias=linear.bias is not None)
        setattr(owner, leaf, layer)
    for unit in units if forms else ():
        dequantise_once(unit)


def dequantise_once(unit: nn.Module) -> None:
    """Let the layers inside `unit` keep their dequantised weights until it has run: chunks of tokens and prompts that
    take turns use them several times."""
    layers = [layer for layer in unit.modules() if isinstance(layer, GGUFLinear)]

    def forget(*_: object) -> None:
        for layer in layers:
            layer.forget()

    unit.register_forward_hook(forget, always_call=True)


@cache
def dequantise_on(device: torch.device, form: BlockFormat) -> Dequantise:
    """The fastest function for this format that is correct on this device. Logs the reason once."""
    if device.type != "cuda":
        return gguf_blocks.dequantise
    try:
        from . import triton_gguf

        kernel = triton_gguf.dequantise
        why = "" if same_weights(kernel, form, device) else "its weights differ"
    except (ImportError, OSError, RuntimeError, ValueError, TypeError, AttributeError, AssertionError) as failure:
        kernel, why = gguf_blocks.dequantise, (str(failure).splitlines() or [type(failure).__name__])[0][:120]
    name = torch.cuda.get_device_name(device)
    log.info("GGUF %s on %s: %s", form.name, name, f"plain ({why})" if why else "triton")
    return gguf_blocks.dequantise if why else kernel


def same_weights(kernel: Dequantise, form: BlockFormat, device: torch.device) -> bool:
    """Whether `kernel` gives the bits of the plain function for random blocks, of which some hold NaN."""
    generator = torch.Generator().manual_seed(0)
    blocks = torch.randint(0, 256, (5, 12 * form.nbytes), generator=generator, dtype=torch.uint8)
    for dtype in (torch.float32, torch.bfloat16):
        expected = gguf_blocks.dequantise(blocks, form, dtype)
        got = kernel(blocks.to(device), form, dtype).cpu()
        if not torch.equal(got.nan_to_num(), expected.nan_to_num()) or not torch.equal(got.isnan(), expected.isnan()):
            return False
    return True
