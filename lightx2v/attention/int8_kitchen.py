"""8-bit attention of the package `comfy-kitchen`: scores and values in int8, from Turing on. Not exact.

Faster than exact kernels where int8 products are, on Turing, Ampere, Ada and consumer Blackwell. Slower on Hopper.
"""

from torch import Tensor

from .sdpa import Attention


def load() -> Attention:
    from comfy_kitchen import int8_attention  # pyright: ignore[reportMissingImports]

    def int8_kitchen(q_BLNH: Tensor, k_BLNH: Tensor, v_BLNH: Tensor) -> Tensor:
        return int8_attention(q_BLNH.transpose(1, 2), k_BLNH.transpose(1, 2), v_BLNH.transpose(1, 2)).transpose(1, 2)

    return int8_kitchen
