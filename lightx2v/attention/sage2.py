"""SageAttention 2: package `sageattention`; scores in int8, values in fp8 if the device supports it. Not exact."""

from torch import Tensor

from .sdpa import Attention


def load() -> Attention:
    from sageattention import sageattn  # pyright: ignore[reportMissingImports]

    def sage2(q_BLNH: Tensor, k_BLNH: Tensor, v_BLNH: Tensor) -> Tensor:
        return sageattn(q_BLNH, k_BLNH, v_BLNH, tensor_layout="NHD", is_causal=False)

    return sage2
