"""FlashAttention 2: package `flash-attn`, Ampere and newer."""

from torch import Tensor

from .sdpa import Attention


def load() -> Attention:
    from flash_attn import flash_attn_func  # pyright: ignore[reportMissingImports]

    def flash2(q_BLNH: Tensor, k_BLNH: Tensor, v_BLNH: Tensor) -> Tensor:
        return flash_attn_func(q_BLNH, k_BLNH, v_BLNH)

    return flash2
