"""FlashAttention 3 for H100 and H200: package `fa3-fwd`, or `flash_attn_interface` built from flash-attention."""

from __future__ import annotations

from torch import Tensor

from .sdpa import Attention


def load() -> Attention:
    try:
        from flash_attn_interface import flash_attn_func  # pyright: ignore[reportMissingImports]
    except ModuleNotFoundError:
        from fa3_fwd_interface import flash_attn_func  # pyright: ignore[reportMissingImports]

    def flash3(q_BLNH: Tensor, k_BLNH: Tensor, v_BLNH: Tensor) -> Tensor:
        out = flash_attn_func(q_BLNH, k_BLNH, v_BLNH)
        return out[0] if isinstance(out, tuple) else out  # releases before October 2025 return the softmax sums too

    return flash3
