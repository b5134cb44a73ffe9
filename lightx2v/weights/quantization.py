"""Quantise matrices to 8 bits with one scale per output channel, and dequantise them.

W[o, i] ~ q[o, i] * scale[o]        q float8 e4m3 (largest 448) or int8 (127), scale float32
"""

import torch
from torch import Tensor

FORMATS = {"fp8": torch.float8_e4m3fn, "int8": torch.int8}
LARGEST = {torch.float8_e4m3fn: 448.0, torch.float8_e5m2: 57344.0, torch.int8: 127.0}
MIN_COSINE = 0.999
"""The least cosine between a layer's weights and their quantised form; e4m3 gives 0.9996 at any size."""
SMALLEST_ROW = 1e-5
"""A row of zeros gets the scale of this largest value, as in LightX2V's converter."""

ROWS = {"cpu": 64}
"""Rows quantised at once: 64 x 5120 float32 values stay in a processor's cache, which is several times faster."""
MANY_ROWS = 4096
"""The same on accelerators, where it only bounds memory."""


def scheme_format(scheme: str | None) -> torch.dtype | None:
    """The 8-bit dtype that a scheme such as "fp8-sgl" stores; None for GGUF's, which only files have."""
    return FORMATS.get((scheme or "fp8").partition("-")[0])


def quantise(weight_OI: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(q_OI in `dtype`, scale_O1 float32), one scale per row. ValueError if a weight is not finite."""
    largest = LARGEST[dtype]
    q_OI = torch.empty(weight_OI.shape, dtype=dtype, device=weight_OI.device)
    scale_O1 = torch.empty(weight_OI.shape[0], 1, dtype=torch.float32, device=weight_OI.device)
    rows = ROWS.get(weight_OI.device.type, MANY_ROWS)
    buffer = torch.empty(min(rows, len(weight_OI)), weight_OI.shape[1], dtype=torch.float32, device=weight_OI.device)
    for values, q, scale in zip(weight_OI.split(rows), q_OI.split(rows), scale_O1.split(rows), strict=True):
        scale.copy_(values.abs().amax(dim=1, keepdim=True)).clamp_(min=SMALLEST_ROW).div_(largest)
        # No clamp: a quotient passes `largest` by a rounding error at most, and both casts bring that back.
        scaled = buffer[: len(values)].copy_(values).div_(scale)
        q.copy_(scaled.round_() if dtype == torch.int8 else scaled)
    if not bool(torch.isfinite(scale_O1).all()):
        raise ValueError("it holds NaN or infinity")
    return q_OI, scale_O1


def dequantise(q: Tensor, scale_O1: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """The weights in `dtype`, multiplied in float32 and rounded once. `q` has one row per scale and any shape."""
    result = torch.empty(q.shape, dtype=dtype, device=q.device)
    rows = ROWS.get(q.device.type, MANY_ROWS)
    scales = scale_O1.view(-1, *[1] * (q.dim() - 1))
    for target, part, scale in zip(result.split(rows), q.split(rows), scales.split(rows), strict=True):
        target.copy_(widen(part).mul_(scale))
    return result


def cosine(weight_OI: Tensor, q_OI: Tensor, scale_O1: Tensor) -> float:
    """How close quantised weights are to their original: 1 is the same direction."""
    rows = ROWS.get(weight_OI.device.type, MANY_ROWS)
    sums = torch.zeros(3, dtype=torch.float64, device=weight_OI.device)
    for values, q, scale in zip(weight_OI.split(rows), q_OI.split(rows), scale_O1.split(rows), strict=True):
        exact, back = values.float().flatten(), widen(q).mul_(scale).flatten()
        sums += torch.stack([exact @ back, exact @ exact, back @ back]).double()
    both, exact_2, back_2 = sums.tolist()
    return both / (exact_2 * back_2) ** 0.5 if exact_2 and back_2 else float(exact_2 == back_2)


def widen(q: Tensor) -> Tensor:
    """8-bit values as exact float32 in new memory.

    A CPU casts e4m3 with integer instructions, which is faster: e4m3 and float16 differ in the place and the bias of
    the exponent, so move the bits, then multiply by 2^(15 - 7).
    """
    if q.dtype != torch.float8_e4m3fn or q.device.type != "cpu":
        return q.float()
    bits = q.view(torch.int8).to(torch.int16).bitwise_left_shift_(7).bitwise_and_(~0x4000)
    return bits.view(torch.float16).float().mul_(256.0)
