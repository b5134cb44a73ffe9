"""SolAttention: block-sparse attention to the tokens of a video, by the package `comfy-kitchen`. Not exact.

Each block of 64 queries reads the blocks of keys with the highest mean scores exactly, in 8 bits, and every other block
as one pooled key. Training-free (arXiv 2607.24027). It needs a CUDA device from sm80 on, a torch with CUDA 13, and
heads of 128.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from ..config.sol_attn_setting import SolAttnSetting
from .morton import Grid, TokenOrder
from .sdpa import Attention, sdpa
from .self_test import relative_error

LEAST_TOKENS = 8192
"""Shorter videos are computed exactly: there that is as fast."""

ALL_BLOCKS = -1e3
"""A tau at which every block of keys is above the threshold."""

SparseKernel = Callable[[Tensor, Tensor, Tensor, float], Tensor]
"""Queries, keys and values (B, L, N, H) of the same length, and tau."""


def load() -> SparseKernel:
    import comfy_kitchen  # pyright: ignore[reportMissingImports]

    if not comfy_kitchen.sol_attn_is_available():
        raise ImportError("its CUDA part is off; it needs a torch with CUDA 13")

    def sparse(q_BLNH: Tensor, k_BLNH: Tensor, v_BLNH: Tensor, tau: float) -> Tensor:
        return comfy_kitchen.sol_attn(*(x.contiguous() for x in (q_BLNH, k_BLNH, v_BLNH)), tau=tau)

    return sparse


@dataclass(frozen=True, slots=True)
class SolAttention:
    """Sparse attention with the exact one (`dense`) for the steps, blocks and lengths that need it.

    The denoising loop takes `in_step`, the network `in_block` of that. A video's tokens go through the blocks in the
    order that `order` gives; it is the same in exact steps.
    """

    sparse: SparseKernel
    dense: Attention
    dense_name: str
    setting: SolAttnSetting
    exact: bool = False
    _order: TokenOrder = field(default_factory=TokenOrder, compare=False)

    def in_step(self, step: int, steps: int) -> SolAttention:
        """The attention of step `step`, counted from 0, of `steps`."""
        return replace(self, exact=step < self.setting.exact_steps(steps))

    def in_block(self, index: int) -> Attention:
        """The attention of one of the network's blocks."""
        return self.dense if self.exact or index in self.setting.dense_layers else self

    def order(self, grid: Grid, device: torch.device) -> Tensor | None:
        """The order of the grid's tokens (L,); None for that of time, height and width."""
        return self._order(grid, device) if self.setting.reorder == "morton3d" else None

    def __call__(self, q_BLNH: Tensor, k_BLNH: Tensor, v_BLNH: Tensor) -> Tensor:
        if self.exact or q_BLNH.shape[1] < LEAST_TOKENS or q_BLNH.shape != k_BLNH.shape:
            return self.dense(q_BLNH, k_BLNH, v_BLNH)
        return self.sparse(q_BLNH, k_BLNH, v_BLNH, self.setting.tau)

    @property
    def summary(self) -> str:
        """What is exact, in words."""
        setting = self.setting
        steps = "fifth of the steps" if setting.dense_steps is None else f"{setting.dense_steps} steps"
        blocks = ", ".join(map(str, setting.dense_layers)) or "none"
        return f"tau {setting.tau:g}; {self.dense_name} in the first {steps} and in these blocks: {blocks}"


def self_test(kernel: SparseKernel, device: torch.device, dtype: torch.dtype, head_dim: int) -> float:
    """Largest relative error against float32: with every block exact, and where only a few blocks matter.

    On random values sparse attention is far from exact, so they would show nothing. Here every block of 64 keys has a
    direction of its own, and each query looks for one of them.
    """
    generator = torch.Generator("cpu").manual_seed(0)
    blocks, heads = 20, 4
    directions = torch.randn(blocks, heads, head_dim, generator=generator)
    wanted = torch.randperm(blocks, generator=generator)

    def near(order: Tensor, strength: float) -> Tensor:
        tokens = torch.randn(blocks * 64 - 24, heads, head_dim, generator=generator)
        tokens += strength * directions[order].repeat_interleave(64, dim=0)[: len(tokens)]
        return tokens.unsqueeze(0).to(device, dtype)

    v_BLNH = near(torch.arange(blocks), 0.5)
    worst = 0.0
    for tau, strength in ((ALL_BLOCKS, 0.0), (1.0, 1.2)):
        q_BLNH, k_BLNH = near(wanted, strength), near(torch.arange(blocks), strength)
        expected = sdpa(q_BLNH.float(), k_BLNH.float(), v_BLNH.float())
        error = relative_error(kernel(q_BLNH, k_BLNH, v_BLNH, tau), expected)
        if error != error:
            return error
        worst = max(worst, error)
    return worst
