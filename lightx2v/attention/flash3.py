"""FlashAttention 3 for H100 and H200: package `fa3-fwd`, or `flash_attn_interface` built from flash-attention."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from .sdpa import Attention

Flash3 = Callable[..., Tensor]
"""Queries, keys and values (B, L, N, H) to outputs; for FP8 inputs also their scales (B, N) as `q_descale`, `k_descale`
and `v_descale`."""


def load() -> Attention:
    return kernel()


def kernel() -> Flash3:
    try:
        from flash_attn_interface import flash_attn_func  # pyright: ignore[reportMissingImports]
    except ModuleNotFoundError:
        import fa3_fwd_interface as package  # pyright: ignore[reportMissingImports]

        return operator(package) or wrapper(package.flash_attn_func)
    return wrapper(flash_attn_func)


def wrapper(flash_attn_func: Callable[..., Any]) -> Flash3:
    """Call the package's Python function."""

    def flash3(q_BLNH: Tensor, k_BLNH: Tensor, v_BLNH: Tensor, **scales: Tensor) -> Tensor:
        out = flash_attn_func(q_BLNH, k_BLNH, v_BLNH, **scales)
        return out[0] if isinstance(out, tuple) else out  # releases before October 2025 also return the softmax sums

    return flash3


def operator(package: Any) -> Flash3 | None:
    """Call the package's operator itself; None if its arguments are not those known here.

    The package's Python function is a `torch.library.custom_op`. Its first call imports torch's compiler, which takes
    5 seconds in each process. The operator gives the same bits.
    """
    try:
        fwd = package.fa3_fwd_cuda.fwd
        arguments = fwd.default._schema.arguments
    except AttributeError:
        return None
    needed = [argument.name for argument in arguments if not argument.has_default_value()]
    if needed != ["q", "k", "v"] or not {"softmax_scale", "num_splits"} <= {argument.name for argument in arguments}:
        return None

    def flash3(q_BLNH: Tensor, k_BLNH: Tensor, v_BLNH: Tensor, **scales: Tensor) -> Tensor:
        q_BLNH, k_BLNH, v_BLNH = (x if x.stride(-1) == 1 else x.contiguous() for x in (q_BLNH, k_BLNH, v_BLNH))
        scale = q_BLNH.shape[-1] ** -0.5
        return fwd(q_BLNH, k_BLNH, v_BLNH, softmax_scale=scale, num_splits=1, **scales)[
            0
        ]  # as flash_attn_func calls it

    return flash3
