"""The diffusion transformer of Wan2.2-A14B: noisy latents, a timestep and prompts in, one velocity per prompt out.

Two of these are the model's experts, one for high and one for low noise. Parameter names are those of the official
checkpoints. The width, depth and channels come from the checkpoint, so that any size of this architecture loads.

Legend: B batch, C channels, T frames, H W latent height and width, L tokens, D width, P rotated pairs in a head.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..attention.sdpa import Attention, sdpa
from ..attention.sol import SolAttention
from ..config.architecture import CHUNK, PATCH, DiTConfig
from ..progress import CancelToken
from .block import Block, Nag, Pass, TextStates, modulation
from .fused import add, norm_modulate
from .rope import RotaryTable

FLOAT32_PARTS = frozenset(
    {"modulation", "norm_q", "norm_k", "norm3", "patch_embedding", "time_embedding", "time_projection", "head"}
)
"""Parameters with one of these in their name stay float32: they touch the residual stream or scale all of it.

The patch embedding is one of them because in bf16 it would round the latents themselves, once per step.
"""


def parameter_dtype(name: str, compute: torch.dtype) -> torch.dtype:
    """The dtype in which a parameter is kept when products are computed in `compute`."""
    return torch.float32 if FLOAT32_PARTS.intersection(name.split(".")) else compute


class TokenSplit(Protocol):
    """How several processes split the tokens of one video. The network knows no more."""

    def shard(self, x: Tensor, dim: int) -> Tensor: ...

    def all_gather(self, x_BlD: Tensor, tokens: int) -> Tensor: ...

    def attend(self, attention: Attention, tokens: int, q_BlNH: Tensor, k_BlNH: Tensor, v_BlNH: Tensor) -> Tensor: ...


class Head(nn.Module):
    def __init__(self, dim: int, out_features: int) -> None:
        super().__init__()
        self.head = nn.Linear(dim, out_features)
        self.modulation = modulation(2, dim)


class WanDiT(nn.Module):
    """`forward` is `embed`, the `blocks` and `finish`. Offloading and parallelism wrap these from outside.

    `self_attention` and `cross_attention` may be replaced at any time. At most `chunk` tokens go through the
    feed-forward at once: its inner tensors would be a block's largest. Up to `stack_tokens` tokens the prompts of one
    forward share a batch (on two CPU cores 25 % faster at 64, 6 % at 576, equal at 2016). Beyond, they take turns in
    each block, or with `sequential_cfg` in the whole forward, which needs memory for only one.
    `cache_text_kv` is the default of `encode_text`. `split` shares the tokens with other processes; every process
    takes the whole input and returns the whole velocity.
    """

    def __init__(
        self, config: DiTConfig, *, self_attention: Attention = sdpa, cross_attention: Attention = sdpa
    ) -> None:
        super().__init__()
        self.config = config
        self.self_attention = self_attention
        self.cross_attention = cross_attention
        self.split: TokenSplit | None = None
        self.chunk = CHUNK
        self.sequential_cfg = False
        self.cache_text_kv = True
        self.stack_tokens = 2048
        self.rotary = RotaryTable(config.head_dim)
        dim = config.dim
        self.patch_embedding = nn.Conv3d(config.in_dim, dim, (1, PATCH, PATCH), stride=(1, PATCH, PATCH))
        self.text_embedding = nn.Sequential(nn.Linear(config.text_dim, dim), nn.GELU("tanh"), nn.Linear(dim, dim))
        self.time_embedding = nn.Sequential(nn.Linear(config.freq_dim, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.time_projection = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))
        self.blocks = nn.ModuleList(
            Block(dim, config.ffn_dim, config.num_heads, config.eps) for _ in range(config.num_layers)
        )
        self.head = Head(dim, config.out_dim * PATCH**2)

    @property
    def compute_dtype(self) -> torch.dtype:
        """The dtype of matrix products. Read from a layer that is never quantised."""
        bias = self.text_embedding[0].bias
        assert isinstance(bias, Tensor)
        return bias.dtype

    def cast(self, compute: torch.dtype) -> WanDiT:
        """Cast each parameter to the dtype that `parameter_dtype` gives for products in `compute`."""
        for name, parameter in self.named_parameters():
            parameter.data = parameter.data.to(parameter_dtype(name, compute))
        return self

    def encode_text(
        self, context_LD: Tensor, *, keep: bool | None = None, negative_LD: Tensor | None = None, nag: Nag | None = None
    ) -> TextStates:
        """Prepare a prompt's encoder states, without padding, for this expert's cross-attention.

        `keep` keeps each block's keys and values of the prompt (200 kB per row in bf16 at full size) for later steps.
        With `nag` the prompt's tokens avoid the negative prompt of these states.
        """
        keep = self.cache_text_kv if keep is None else keep
        negative = None if nag is None or negative_LD is None else self._encode(negative_LD.unsqueeze(0), keep=keep)
        return self._encode(context_LD.unsqueeze(0), keep=keep, negative=negative, nag=nag)

    def _encode(
        self, context_BLD: Tensor, *, keep: bool, negative: TextStates | None = None, nag: Nag | None = None
    ) -> TextStates:
        padding = self.config.text_len - context_BLD.shape[1]
        assert padding >= 0, f"{context_BLD.shape[1]} text rows, at most {self.config.text_len} expected"
        # All rows of zero padding become the same row, so one is enough here.
        rows_BLD = F.pad(context_BLD.to(self.compute_dtype), (0, 0, 0, min(padding, 1)))
        return TextStates(self.text_embedding(rows_BLD), padding, keep=keep, negative=negative, nag=nag)

    def forward(
        self,
        latents_CTHW: Tensor,
        timestep: float,
        text: Sequence[TextStates],
        condition_CTHW: Tensor | None = None,
        cancel: CancelToken | None = None,
        residuals: list[Tensor] | None = None,
    ) -> list[Tensor]:
        """One float32 velocity (C, T, H, W) per prompt. `condition` follows the latents along C (image to video).

        Adds to `residuals`, if given, what all blocks added for each prompt: (1, l, D) of this process's tokens, in the
        dtype of products.
        """
        latents_BCTHW = latents_CTHW.unsqueeze(0)
        condition_BCTHW = None if condition_CTHW is None else condition_CTHW.unsqueeze(0)
        x_BLD, rotations_L1P = self.embed(latents_BCTHW, condition_BCTHW)
        stack = x_BLD.shape[1] <= self.stack_tokens
        if self.sequential_cfg and not stack and len(text) > 1:
            del x_BLD, rotations_L1P
            return [self.forward(latents_CTHW, timestep, [one], condition_CTHW, cancel, residuals)[0] for one in text]
        groups = (tuple(text),) if stack else tuple((each,) for each in text)
        time_BD, modulation_B6D = self.embed_time(_one_timestep(timestep, x_BLD))
        streams = self._run(x_BLD, rotations_L1P, modulation_B6D, groups, cancel)
        del x_BLD
        if residuals is not None:
            start_BLD = self._local_tokens(latents_BCTHW, condition_BCTHW)
            residuals += [row for stream_BLD in streams for row in self._added(start_BLD, stream_BLD).split(1)]
        velocities = [self.finish(stream_BLD, time_BD, latents_BCTHW.shape) for stream_BLD in streams]
        return [row for velocity_BCTHW in velocities for row in velocity_BCTHW]

    def without_blocks(
        self, latents_CTHW: Tensor, timestep: float, residuals: Sequence[Tensor], condition_CTHW: Tensor | None = None
    ) -> list[Tensor]:
        """The velocity per prompt if the blocks add `residuals`, those of an earlier `forward`: no block runs."""
        latents_BCTHW = latents_CTHW.unsqueeze(0)
        condition_BCTHW = None if condition_CTHW is None else condition_CTHW.unsqueeze(0)
        velocities = []
        for residual_BLD in residuals:
            x_BLD = add(self._local_tokens(latents_BCTHW, condition_BCTHW), residual_BLD)
            time_BD, _ = self.embed_time(_one_timestep(timestep, x_BLD))
            velocities.append(self.finish(x_BLD, time_BD, latents_BCTHW.shape)[0])
        return velocities

    def _local_tokens(self, latents_BCTHW: Tensor, condition_BCTHW: Tensor | None) -> Tensor:
        """This process's tokens, before the blocks. To embed them again is cheaper than to keep them meanwhile."""
        x_BLD, _ = self.embed(latents_BCTHW, condition_BCTHW)
        return x_BLD if self.split is None else self.split.shard(x_BLD, 1)

    def _added(self, start_BLD: Tensor, end_BLD: Tensor) -> Tensor:
        """end - start in the dtype of products, with float32 copies of only some tokens at once."""
        added_BLD = torch.empty_like(end_BLD, dtype=self.compute_dtype)
        for part, a, b in zip(*(x_BLD.split(self.chunk, 1) for x_BLD in (added_BLD, start_BLD, end_BLD)), strict=True):
            part.copy_(b - a)
        return added_BLD

    def forward_batch(
        self, latents_BCTHW: Tensor, timesteps_B: Tensor, context_BLD: Tensor, condition_BCTHW: Tensor | None = None
    ) -> Tensor:
        """Velocities (B, C, T, H, W) of different samples, each with its own timestep and prompt, for training.

        `context` holds encoder states. Zero rows pad shorter prompts to the length of the longest.
        """
        x_BLD, rotations_L1P = self.embed(latents_BCTHW, condition_BCTHW)
        text = self._encode(context_BLD, keep=False)
        time_BD, modulation_B6D = self.embed_time(timesteps_B)
        (stream_BLD,) = self._run(x_BLD, rotations_L1P, modulation_B6D, ((text,),), None)
        return self.finish(stream_BLD, time_BD, latents_BCTHW.shape)

    def _run(
        self,
        x_BLD: Tensor,
        rotations_L1P: Tensor,
        modulation_B6D: Tensor,
        groups: tuple[tuple[TextStates, ...], ...],
        cancel: CancelToken | None,
    ) -> list[Tensor]:
        """The streams after all blocks, one for each group; this process's tokens."""
        tokens, split = x_BLD.shape[1], self.split
        if split is not None:
            x_BLD, rotations_L1P = split.shard(x_BLD, 1), split.shard(rotations_L1P, 0)
        shared = Pass(
            modulation_B6D=modulation_B6D,
            rotations_L1P=rotations_L1P,
            groups=groups,
            self_attention=self.self_attention,
            cross_attention=self.cross_attention,
            dtype=self.compute_dtype,
            chunk=self.chunk,
        )
        streams = [x_BLD]
        del x_BLD
        for index, block in enumerate(self.blocks):
            if cancel is not None:
                cancel.check()
            streams = block(streams, index, replace(shared, self_attention=self._attention(index, tokens)))
        return streams

    def _attention(self, index: int, tokens: int) -> Attention:
        """The self-attention of block `index`."""
        attention = self.self_attention
        if isinstance(attention, SolAttention):
            attention = attention.in_block(index)
        return attention if self.split is None else partial(self.split.attend, attention, tokens)

    def _order(self, grid: tuple[int, int, int], device: torch.device) -> Tensor | None:
        """The order of the grid's tokens (L,) in the blocks; None for (t, h, w) order."""
        return self.self_attention.order(grid, device) if isinstance(self.self_attention, SolAttention) else None

    def embed(self, latents_BCTHW: Tensor, condition_BCTHW: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Tokens (B, L, D) in (t, h, w) order, or that of sparse attention, and their rotations (L, 1, P)."""
        if condition_BCTHW is not None:
            latents_BCTHW = torch.cat([latents_BCTHW, condition_BCTHW.to(latents_BCTHW.dtype)], dim=1)
        _, channels, frames, height, width = latents_BCTHW.shape
        assert channels == self.config.in_dim, f"{channels} input channels, the model has {self.config.in_dim}"
        assert height % PATCH == 0 and width % PATCH == 0, f"latents of {height}x{width} are not whole patches"
        grid = (frames, height // PATCH, width // PATCH)
        # The kernel is as large as the stride, so the convolution is one matrix product on the patches.
        patches = latents_BCTHW.float().unflatten(4, (-1, PATCH)).unflatten(3, (-1, PATCH))
        patches_BLK = patches.permute(0, 2, 3, 5, 1, 4, 6).flatten(4).flatten(1, 3)
        rotations_L1P, order_L = self.rotary(grid, patches_BLK.device), self._order(grid, patches_BLK.device)
        if order_L is not None:
            patches_BLK, rotations_L1P = patches_BLK[:, order_L], rotations_L1P[order_L]
        with torch.autocast(latents_BCTHW.device.type, enabled=False):
            x_BLD = F.linear(patches_BLK, self.patch_embedding.weight.flatten(1), self.patch_embedding.bias)
        return x_BLD, rotations_L1P

    def embed_time(self, timesteps_B: Tensor) -> tuple[Tensor, Tensor]:
        """The time embedding (B, D) and the blocks' modulation (B, 6, D): once per sample, not once per token."""
        half = self.config.freq_dim // 2
        frequencies = 10000.0 ** (-torch.arange(half, dtype=torch.float64, device=timesteps_B.device) / half)
        angles = timesteps_B.double().unsqueeze(1) * frequencies
        waves = torch.cat([angles.cos(), angles.sin()], dim=1).float()
        with torch.autocast(timesteps_B.device.type, enabled=False):
            time_BD = self.time_embedding(waves)
            return time_BD, self.time_projection(time_BD).unflatten(1, (6, -1))

    def finish(self, x_BLD: Tensor, time_BD: Tensor, shape: torch.Size) -> Tensor:
        """Tokens to velocity (B, C, T, H, W) float32; `shape` is that of the latents."""
        frames, height, width = shape[2:]
        grid = (frames, height // PATCH, width // PATCH)
        shift_BD, scale_BD = (self.head.modulation + time_BD.unsqueeze(1)).unbind(1)
        with torch.autocast(x_BLD.device.type, enabled=False):
            patches_BLK = self.head.head(norm_modulate(x_BLD, shift_BD, scale_BD, self.config.eps, torch.float32))
        if self.split is not None:
            patches_BLK = self.split.all_gather(patches_BLK, math.prod(grid))
        if (order_L := self._order(grid, patches_BLK.device)) is not None:
            patches_BLK = torch.empty_like(patches_BLK).index_copy_(1, order_L, patches_BLK)
        patches = patches_BLK.unflatten(1, grid)
        patches = patches.unflatten(-1, (PATCH, PATCH, self.config.out_dim))
        return patches.permute(0, 6, 1, 2, 4, 3, 5).flatten(5).flatten(3, 4)


def _one_timestep(timestep: float, x_BLD: Tensor) -> Tensor:
    """(1,), on the device of x."""
    return torch.tensor([timestep], dtype=torch.float64).to(x_BLD.device)
