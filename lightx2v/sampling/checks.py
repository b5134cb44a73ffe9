"""Checks on latents, frames and what other networks make, which would otherwise become a black or frozen clip."""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from ..errors import NumericsError


def require_finite(latents: Tensor, *, step: int, total: int, expert: str, backend: str = "") -> None:
    """Raise NumericsError, with the step counted from 1."""
    if is_finite(latents):
        return
    attention = f", attention {backend}" if backend else ""
    raise NumericsError(
        f"NaN or infinity in the latents after step {step} of {total} ({expert}-noise expert{attention}); the video "
        "would be black. Try another attention backend (torch_sdpa) or dtype (bf16 instead of fp16); with a LoRA, a "
        "smaller strength; if it stays, check the expert's checkpoint."
    )


def not_finite(network: str, source: str) -> NumericsError:
    """The error for a network ("VAE") that makes NaN or infinity of something ("the picture")."""
    return NumericsError(
        f"The {network} made NaN or infinity of {source}; the video would be black. If it runs in fp16, use bf16 or "
        "fp32; if it stays, its file is damaged: download it again."
    )


def is_finite(values: Tensor) -> bool:
    """Whether no value is NaN or infinity. Reads them once and waits for the device once."""
    # The extremes are NaN if any number is, and on a CPU they cost a twentieth of isfinite() on all numbers.
    return all(map(math.isfinite, torch.stack(torch.aminmax(values)).tolist()))


def still_warning(frames: Iterable[Any]) -> str | None:
    """A warning if all frames (THWC array or tensor, or any iterable of frames) are identical, else None.

    Stops at the first frame that differs. A clip of one frame is a picture, which has no motion to check.
    """
    rest = iter(frames)
    first = next(rest, None)
    still = False
    for frame in rest:
        still = bool((frame == first).all())
        if not still:
            break
    if not still:
        return None
    return (
        "All frames are identical: the model made a still picture. Check that the experts, the LoRAs and the step list "
        "belong together."
    )
