"""FlashAttention 4: module `flash_attn.cute`, package `flash-attn-4`; Hopper and Blackwell."""

from torch import Tensor

from .sdpa import Attention


def load() -> Attention:
    from flash_attn.cute import flash_attn_func  # pyright: ignore[reportMissingImports]

    def flash4(q_BLNH: Tensor, k_BLNH: Tensor, v_BLNH: Tensor) -> Tensor:
        out = flash_attn_func(q_BLNH, k_BLNH, v_BLNH)
        return out[0] if isinstance(out, tuple) else out

    return flash4
