"""UMT5Stack: the layers of the UMT5 encoder, with transformers' names for them.

The same operations in the same order as transformers 5's `UMT5Stack` with eager attention, so the same bits in every
dtype (modeling_umt5.py). Importing that takes 3 to 7 seconds of Python, during which other threads cannot read weights.

Legend: B batch, L tokens, N heads, H head size, D width.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..weights.umt5_names import EMBEDDING

EPS = 1e-6
MAX_DISTANCE = 128
"""Tokens that are this far apart or farther share a position bias."""


@dataclass(frozen=True, slots=True, kw_only=True)
class UMT5Sizes:
    """The encoder's sizes, from the shapes of its tensors. UMT5-XXL: 256384, 4096, 64, 64, 10240, 24, 32."""

    vocab: int
    width: int
    heads: int
    head_dim: int
    ffn: int
    layers: int
    buckets: int

    @classmethod
    def from_shapes(cls, shapes: Mapping[str, tuple[int, ...]]) -> UMT5Sizes:
        """From shapes under transformers' names. Raises KeyError if a tensor is missing."""
        layer = "encoder.block.0.layer"
        vocab, width = shapes[EMBEDDING]
        buckets, heads = shapes[f"{layer}.0.SelfAttention.relative_attention_bias.weight"]
        numbers = {int(match[1]) for name in shapes if (match := re.match(r"encoder\.block\.([0-9]+)\.", name))}
        return cls(
            vocab=vocab,
            width=width,
            heads=heads,
            head_dim=shapes[f"{layer}.0.SelfAttention.q.weight"][0] // heads,
            ffn=shapes[f"{layer}.1.DenseReluDense.wo.weight"][1],
            layers=max(numbers) + 1,
            buckets=buckets,
        )


class UMT5Stack(nn.Module):
    """All layers and the last norm; the token table is not among them."""

    def __init__(self, sizes: UMT5Sizes) -> None:
        super().__init__()
        self.block = nn.ModuleList(Block(sizes) for _ in range(sizes.layers))
        self.final_layer_norm = RMSNorm(sizes.width)

    def forward(self, x_BLD: Tensor) -> Tensor:
        """The states of rows of the token table, for a prompt without padding."""
        for block in self.block:
            x_BLD = block(x_BLD)
        return self.final_layer_norm(x_BLD)


class Block(nn.Module):
    def __init__(self, sizes: UMT5Sizes) -> None:
        super().__init__()
        self.layer = nn.ModuleList([AttentionLayer(sizes), FeedForwardLayer(sizes)])

    def forward(self, x_BLD: Tensor) -> Tensor:
        for layer in self.layer:
            x_BLD = layer(x_BLD)
        return x_BLD


class AttentionLayer(nn.Module):
    def __init__(self, sizes: UMT5Sizes) -> None:
        super().__init__()
        self.SelfAttention = SelfAttention(sizes)
        self.layer_norm = RMSNorm(sizes.width)

    def forward(self, x_BLD: Tensor) -> Tensor:
        return x_BLD + self.SelfAttention(self.layer_norm(x_BLD))


class FeedForwardLayer(nn.Module):
    def __init__(self, sizes: UMT5Sizes) -> None:
        super().__init__()
        self.DenseReluDense = FeedForward(sizes)
        self.layer_norm = RMSNorm(sizes.width)

    def forward(self, x_BLD: Tensor) -> Tensor:
        return x_BLD + self.DenseReluDense(self.layer_norm(x_BLD))


class SelfAttention(nn.Module):
    """Scores are not scaled; every layer adds a bias of its own for the distance of two tokens."""

    def __init__(self, sizes: UMT5Sizes) -> None:
        super().__init__()
        inner = sizes.heads * sizes.head_dim
        self.head_dim, self.buckets = sizes.head_dim, sizes.buckets
        self.q, self.k, self.v = (nn.Linear(sizes.width, inner, bias=False) for _ in range(3))
        self.o = nn.Linear(inner, sizes.width, bias=False)
        # nn.Embedding alone draws random numbers, for which torch imports its compiler on the meta device.
        self.relative_attention_bias = nn.Embedding.from_pretrained(torch.zeros(sizes.buckets, sizes.heads))

    def forward(self, x_BLD: Tensor) -> Tensor:
        q_BNLH, k_BNLH, v_BNLH = (
            linear(x_BLD).unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for linear in (self.q, self.k, self.v)
        )
        scores_BNLL = torch.matmul(q_BNLH, k_BNLH.transpose(2, 3)) + self._bias(x_BLD.shape[1], x_BLD.device)
        y_BNLH = torch.matmul(scores_BNLL.softmax(dim=-1), v_BNLH)
        return self.o(y_BNLH.transpose(1, 2).flatten(2))

    def _bias(self, length: int, device: torch.device) -> Tensor:
        """(1, N, L, L)"""
        at_L = torch.arange(length, device=device)
        buckets_LL = bucket(at_L[None] - at_L[:, None], self.buckets)
        return self.relative_attention_bias(buckets_LL).permute(2, 0, 1)[None]


def bucket(distance: Tensor, buckets: int) -> Tensor:
    """The row of the bias for each distance: one half for tokens before, the other for those after. Half of each is for
    single distances, the rest for ranges that grow up to MAX_DISTANCE."""
    half = buckets // 2
    after, distance = (distance > 0).long() * half, distance.abs()
    exact = half // 2
    steps = torch.log(distance.float() / exact) / math.log(MAX_DISTANCE / exact) * (half - exact)
    far = (exact + steps.long()).clamp(max=half - 1)
    return after + torch.where(distance < exact, distance, far)


class FeedForward(nn.Module):
    """Gated; its layers may be replaced by quantised ones."""

    def __init__(self, sizes: UMT5Sizes) -> None:
        super().__init__()
        self.wi_0, self.wi_1 = (nn.Linear(sizes.width, sizes.ffn, bias=False) for _ in range(2))
        self.wo = nn.Linear(sizes.ffn, sizes.width, bias=False)

    def forward(self, x_BLD: Tensor) -> Tensor:
        return self.wo(gelu(self.wi_0(x_BLD)) * self.wi_1(x_BLD))


def gelu(x: Tensor) -> Tensor:
    """GELU by tanh. torch's own rounds less often in bf16: other bits."""
    return 0.5 * x * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * torch.pow(x, 3.0))))


class RMSNorm(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x_BLD: Tensor) -> Tensor:
        variance = x_BLD.to(torch.float32).pow(2).mean(-1, keepdim=True)
        x_BLD = x_BLD * torch.rsqrt(variance + EPS)
        if self.weight.dtype in (torch.float16, torch.bfloat16):
            x_BLD = x_BLD.to(self.weight.dtype)
        return self.weight * x_BLD
