"""One block of the Wan DiT: self-attention over the video, cross-attention to the prompt, feed-forward.

The residual stream and everything between the matrix products is float32, as in the official code; the products and
both attentions run in the weights' dtype. With gradients disabled, the residual stream is updated in place.

Legend: B batch, L tokens, D width, N heads, H head dim, P = H/2 pairs, F feed-forward width.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..attention.flash3_fp8 import Flash3Fp8
from ..attention.fp8 import CentredFp8, Fp8
from ..attention.fp8_inputs import values_to_fp8
from ..attention.sdpa import Attention, sdpa, sdpa_repeated_last
from .fp8_attention import rotary_fp8
from .fused import add, add_gated, avoid, layer_norm, norm_modulate, norm_rotate, normed
from .pointwise import gelu

KeysValues = tuple[Tensor, Tensor]


@dataclass(frozen=True, slots=True)
class Nag:
    """How a prompt's tokens avoid a negative prompt: `pointwise.avoid` has the formula."""

    scale: float
    tau: float
    alpha: float


class TextStates:
    """Prompts of one or more batch rows, after one expert's text embedding.

    If the model's text length needs zero padding, `rows_BLD` ends with one row for all of it, and `padding` is the
    number of rows that this one represents. With `keep`, each block's keys and values are computed in the first
    step and kept for the others. They belong to the weights that made them: encode again after the weights change.
    With `nag` the tokens also read the `negative` prompt, and go away from what they find there.
    """

    def __init__(
        self,
        rows_BLD: Tensor,
        padding: int,
        *,
        keep: bool,
        negative: "TextStates | None" = None,
        nag: Nag | None = None,
    ) -> None:
        self.rows_BLD = rows_BLD
        self.padding = padding
        self.negative, self.nag = negative, nag
        self.kept: dict[int, tuple[Tensor, Tensor]] | None = {} if keep else None

    @property
    def batch(self) -> int:
        return self.rows_BLD.shape[0]


@dataclass(frozen=True, slots=True, kw_only=True)
class Pass:
    """The inputs that all blocks share in one forward.

    `groups` are the prompts that the rows of each stream attend to. `modulation_B6D` has B = 1 if all rows share a
    timestep. At most `chunk` tokens go through the feed-forward at once.
    """

    modulation_B6D: Tensor
    rotations_L1P: Tensor
    groups: tuple[tuple[TextStates, ...], ...]
    self_attention: Attention
    cross_attention: Attention
    dtype: torch.dtype
    chunk: int

    def slices(self, tokens: int) -> list[slice]:
        """How to cut a stream after its self-attention. Only in-place work can be cut: gradients need one piece."""
        if torch.is_grad_enabled():
            return [slice(0, tokens)]
        return [slice(start, min(start + self.chunk, tokens)) for start in range(0, tokens, self.chunk)]

    def fan_out(self, streams: list[Tensor]) -> list[Tensor]:
        """Copy the one stream that all prompts have shared to one row per prompt; the first may keep the original."""
        rows = [sum(text.batch for text in group) for group in self.groups]
        if [x_BLD.shape[0] for x_BLD in streams] == rows:
            return streams
        (shared,) = streams
        keep = shared.shape[0] == rows[0]
        return [shared if keep and n == 0 else shared.expand(count, -1, -1).clone() for n, count in enumerate(rows)]


class QKVO(nn.Module):
    """The four projections of an attention and the RMS norms of its queries and keys, over the width of all heads."""

    def __init__(self, dim: int, num_heads: int, eps: float) -> None:
        super().__init__()
        self.num_heads, self.eps = num_heads, eps
        self.q, self.k, self.v, self.o = (nn.Linear(dim, dim) for _ in range(4))
        self.norm_q = nn.RMSNorm(dim, eps)
        self.norm_k = nn.RMSNorm(dim, eps)

    def split(self, x_BLD: Tensor) -> Tensor:
        return x_BLD.unflatten(-1, (self.num_heads, -1))

    def rotated(self, x_BLD: Tensor, rotations_L1P: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values (B, L, N, H) of tokens that have a position."""
        q_BLNH = norm_rotate(self.q(x_BLD), self.norm_q.weight, self.eps, rotations_L1P)
        k_BLNH = norm_rotate(self.k(x_BLD), self.norm_k.weight, self.eps, rotations_L1P)
        return q_BLNH, k_BLNH, self.split(self.v(x_BLD))

    def rotated_fp8(self, x_BLD: Tensor, rotations_L1P: Tensor) -> tuple[Fp8, Fp8, CentredFp8]:
        """The same in 8 bits, for `Flash3Fp8`."""
        q = rotary_fp8(self.q(x_BLD), self.norm_q.weight, self.eps, rotations_L1P)
        k = rotary_fp8(self.k(x_BLD), self.norm_k.weight, self.eps, rotations_L1P, centre=True)
        return q, k, values_to_fp8(self.split(self.v(x_BLD)))

    def queries(self, x_BLD: Tensor) -> Tensor:
        return self.split(normed(self.q(x_BLD), self.norm_q.weight, self.eps))

    def keys_values(self, rows_BLD: Tensor) -> tuple[Tensor, Tensor]:
        k_BLD = normed(self.k(rows_BLD), self.norm_k.weight, self.eps)
        return self.split(k_BLD), self.split(self.v(rows_BLD))


class Gelu(nn.Module):
    def forward(self, x_BLF: Tensor) -> Tensor:
        return gelu(x_BLF)


def modulation(rows: int, dim: int) -> nn.Parameter:
    """(1, rows, dim), random but on the meta device: there random numbers make torch import sympy, for seconds."""
    values = torch.empty(1, rows, dim)
    return nn.Parameter(values if values.is_meta else torch.randn(1, rows, dim).div_(dim**0.5))


class Block(nn.Module):
    def __init__(self, dim: int, ffn_dim: int, num_heads: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.modulation = modulation(6, dim)
        self.self_attn = QKVO(dim, num_heads, eps)
        self.norm3 = nn.LayerNorm(dim, eps)
        self.cross_attn = QKVO(dim, num_heads, eps)
        self.ffn = nn.Sequential(nn.Linear(dim, ffn_dim), Gelu(), nn.Linear(ffn_dim, dim))

    def forward(self, streams: list[Tensor], index: int, shared: Pass) -> list[Tensor]:
        """Run all streams at once, so several prompts load the weights once. `index` names the kept keys and values.

        Up to the first cross-attention all prompts have the same tokens, so the first self-attention runs once.
        """
        shift_a, scale_a, gate_a, shift_f, scale_f, gate_f = (self.modulation + shared.modulation_B6D).unbind(1)
        streams = [self._attend(x_BLD, shift_a, scale_a, gate_a, shared) for x_BLD in streams]
        streams = shared.fan_out(streams)
        for n, group in enumerate(shared.groups):
            keys = [(self._keys_values(text, index), self._negative_keys_values(text, index)) for text in group]
            parts = []
            for where in shared.slices(streams[n].shape[1]):
                part_BLD = streams[n][:, where]
                part_BLD = add(part_BLD, self._read_text(part_BLD, keys, group, shared))
                h_BLD = norm_modulate(part_BLD, shift_f, scale_f, self.eps, shared.dtype)
                parts.append(add_gated(part_BLD, self.ffn(h_BLD), gate_f))
            if len(parts) == 1:  # several parts have been written into the stream itself
                streams[n] = parts[0]
        return streams

    def _attend(self, x_BLD: Tensor, shift_BD: Tensor, scale_BD: Tensor, gate_BD: Tensor, shared: Pass) -> Tensor:
        """x + gate·SelfAttention(LayerNorm(x)·(1 + scale) + shift)."""
        attn = self.self_attn
        h_BLD = norm_modulate(x_BLD, shift_BD, scale_BD, self.eps, shared.dtype)
        attention, rotations_L1P = shared.self_attention, shared.rotations_L1P
        if isinstance(attention, Flash3Fp8) and not torch.is_grad_enabled():
            out_BLNH = attention.attend(*attn.rotated_fp8(h_BLD, rotations_L1P)).to(shared.dtype)
        else:
            q_BLNH, k_BLNH, v_BLNH = attn.rotated(h_BLD, rotations_L1P)
            del h_BLD
            out_BLNH = attention(q_BLNH, k_BLNH, v_BLNH)
            del q_BLNH, k_BLNH, v_BLNH
        return add_gated(x_BLD, attn.o(out_BLNH.flatten(2)), gate_BD)

    def _keys_values(self, text: TextStates, index: int) -> KeysValues:
        if text.kept is None or torch.is_grad_enabled():
            return self.cross_attn.keys_values(text.rows_BLD)
        if index not in text.kept:
            text.kept[index] = self.cross_attn.keys_values(text.rows_BLD)
        return text.kept[index]

    def _negative_keys_values(self, text: TextStates, index: int) -> KeysValues | None:
        return None if text.negative is None else self._keys_values(text.negative, index)

    def _read_text(
        self,
        x_BLD: Tensor,
        keys: list[tuple[KeysValues, KeysValues | None]],
        group: tuple[TextStates, ...],
        shared: Pass,
    ) -> Tensor:
        """CrossAttention(LayerNorm(x)): the rows of each prompt attend to its keys."""
        norm = self.norm3
        q_BLNH = self.cross_attn.queries(layer_norm(x_BLD, norm.weight, norm.bias, self.eps, shared.dtype))
        outs = []
        for q, (own, negative), text in zip(q_BLNH.split([t.batch for t in group]), keys, group, strict=True):
            out_BLD = attend_to_text(q, *own, text.padding, shared.cross_attention).flatten(2)
            if negative is not None and text.negative is not None and text.nag is not None:
                away_BLD = attend_to_text(q, *negative, text.negative.padding, shared.cross_attention).flatten(2)
                out_BLD = avoid(out_BLD, away_BLD, text.nag.scale, text.nag.tau, text.nag.alpha)
            outs.append(out_BLD)
        return self.cross_attn.o(outs[0] if len(outs) == 1 else torch.cat(outs))


def attend_to_text(q_BLNH: Tensor, k_BLNH: Tensor, v_BLNH: Tensor, padding: int, attention: Attention) -> Tensor:
    """Attention to a prompt whose last row represents `padding` rows: the model attends to padding, with no mask."""
    if padding > 1 and attention is sdpa and q_BLNH.device.type == "cpu":
        return sdpa_repeated_last(q_BLNH, k_BLNH, v_BLNH, padding)
    if padding > 1:
        k_BLNH, v_BLNH = (torch.cat([t, t[:, -1:].expand(-1, padding - 1, -1, -1)], dim=1) for t in (k_BLNH, v_BLNH))
    return attention(q_BLNH, k_BLNH, v_BLNH)
