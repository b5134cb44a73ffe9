"""SageAttention 3: package `sageattn3`; fp4 products on Blackwell. Not exact. Its own layout is (B, N, L, H)."""

from torch import Tensor

from .sdpa import Attention


def load() -> Attention:
    from sageattn3 import sageattn3_blackwell  # pyright: ignore[reportMissingImports]

    def sage3(q_BLNH: Tensor, k_BLNH: Tensor, v_BLNH: Tensor) -> Tensor:
        q, k, v = (t.transpose(1, 2).contiguous() for t in (q_BLNH, k_BLNH, v_BLNH))
        return sageattn3_blackwell(q, k, v, is_causal=False).transpose(1, 2)

    return sage3
