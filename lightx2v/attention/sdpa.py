"""torch's own scaled dot product attention: runs on every device, and is the reference for all other backends."""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Queries, keys and values (B, L, N, H) to outputs of the queries' shape; no mask, scale 1/√H."""


def sdpa(q_BLNH: Tensor, k_BLNH: Tensor, v_BLNH: Tensor) -> Tensor:
    """Full attention with the kernel that torch chooses."""
    return F.scaled_dot_product_attention(
        q_BLNH.transpose(1, 2), k_BLNH.transpose(1, 2), v_BLNH.transpose(1, 2)
    ).transpose(1, 2)


def cudnn_sdpa(q_BLNH: Tensor, k_BLNH: Tensor, v_BLNH: Tensor) -> Tensor:
    """Full attention with cuDNN's kernel: on an H100 1.5 to 1.7 times as fast as torch's FlashAttention 2."""
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        return sdpa(q_BLNH, k_BLNH, v_BLNH)


def sdpa_repeated_last(q_BLNH: Tensor, k_BLNH: Tensor, v_BLNH: Tensor, repeats: int) -> Tensor:
    """Full attention to keys whose last one represents `repeats` equal ones.

    m equal keys weigh m·exp(s) = exp(s + ln m) in the softmax, so one key with ln m added to its score replaces them
    exactly. So a short prompt that is padded to 512 rows costs only its own length.
    """
    bias = torch.zeros(k_BLNH.shape[1], device=q_BLNH.device, dtype=q_BLNH.dtype)
    bias[-1] = math.log(repeats)
    return F.scaled_dot_product_attention(
        q_BLNH.transpose(1, 2), k_BLNH.transpose(1, 2), v_BLNH.transpose(1, 2), attn_mask=bias.view(1, 1, 1, -1)
    ).transpose(1, 2)
