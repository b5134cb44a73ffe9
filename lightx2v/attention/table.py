"""The table of attention backends, and the choice of the one that runs.

A backend is taken only if the device fits, its package imports, and its output agrees with torch's float32 attention on
this device: an installed kernel is not yet one that works. `auto` tries the exact ones that are fastest on the device's
architecture and never one that rounds to 8 bits. Every backend takes and returns (B, L, N, H) and knows no mask.

| architecture         | auto tries                           |
|----------------------|--------------------------------------|
| sm90  H100, H200     | flash_attn3, cudnn, torch_sdpa       |
| sm100 B200, B300     | flash_attn4, cudnn, torch_sdpa       |
| sm86, sm89 3090 4090 | cudnn, torch_sdpa                    |
| everything else      | torch_sdpa                           |
"""

from __future__ import annotations

import logging
import subprocess
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import ConfigError
from .names import SUPPORTED, check_attention_name
from .sdpa import cudnn_sdpa, sdpa

log = logging.getLogger("lightx2v.attention")

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]

KERNEL_FAILURES = (
    ImportError,
    OSError,
    RuntimeError,
    ValueError,
    TypeError,
    AttributeError,
    AssertionError,
    LookupError,
    subprocess.SubprocessError,
)
"""What foreign kernels raise where they do not fit: wrong wheel, wrong device, no compiler, another signature."""


@dataclass(frozen=True, slots=True)
class Choice:
    """The backend that runs, and why it was chosen."""

    name: str
    fn: Attention
    reason: str
