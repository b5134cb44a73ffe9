"""Causal convolution: it sees only the past, and remembers what it needs when a clip comes in chunks.

`CausalConv3d` is the VAE's 3x3x3 convolution: the two frames before the first one are zero. A `Stream` holds the last
two input frames of every layer for one clip, so that its chunks one by one give the result of the whole clip.

On a CPU in float32, streamed chunks are computed by Winograd's short convolution along time: 2 or 4 frames by 4 or 6
two-dimensional convolutions instead of 6 or 12. That saves up to half of the VAE's arithmetic, and avoids conv3d, which
is ten times slower than conv2d there with few channels. The rounding error stays at 5e-6 of the output's maximum.

Shapes: B batch, C channels, T frames, H height, W width. Streamed tensors have B = 1 and lie in memory as THWC
(channels_last_3d), so a run of frames is one contiguous piece and a norm over channels is a norm over the last axis.
"""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

PAST = 2
"""Past frames that a kernel of three sees."""

# Winograd F(frames, 3): output = A [(G kernel) * (B input)], points 0, 1, -1, (2, -2,) infinity.
_INPUT = {
    2: [[1, 0, -1, 0], [0, 1, 1, 0], [0, -1, 1, 0], [0, 1, 0, -1]],
    4: [
        [4, 0, -5, 0, 1, 0],
        [0, -4, -4, 1, 1, 0],
        [0, 4, -4, -1, 1, 0],
        [0, -2, -1, 2, 1, 0],
        [0, 2, -1, -2, 1, 0],
        [0, 4, 0, -5, 0, 1],
    ],
}
_KERNEL = {
    2: [[1, 0, 0], [1 / 2, 1 / 2, 1 / 2], [1 / 2, -1 / 2, 1 / 2], [0, 0, 1]],
    4: [
        [1 / 4, 0, 0],
        [-1 / 6, -1 / 6, -1 / 6],
        [-1 / 6, 1 / 6, -1 / 6],
        [1 / 24, 1 / 12, 1 / 6],
        [1 / 24, -1 / 12, 1 / 6],
        [0, 0, 1],
    ],
}
_OUTPUT = {
    2: [[1, 1, 1, 0], [0, 1, -1, -1]],
    4: [[1, 1, 1, 1, 1, 0], [0, 1, -1, 2, -2, 0], [0, 1, 1, 4, 4, 0], [0, 1, -1, 8, -8, 1]],
}


class SpatialSplit(Protocol):
    """How several processes split frames along their height, the first axis of `x_HX`. The network knows no more."""

    def shard(self, x: Tensor, scale: int) -> Tensor: ...

    def with_halo(self, x_HX: Tensor, *, above: bool = True) -> Tensor: ...

    def all_gather(self, x_HX: Tensor) -> Tensor: ...

    def all_true(self, flag: bool) -> bool: ...


class Stream:
    """The memory of all layers between the chunks of one clip: one Stream per clip, for inference only."""

    def __init__(self, winograd: int = 4, split: SpatialSplit | None = None) -> None:
        """`winograd` is the most frames that one short convolution makes; `split` tells which rows the clip has.

        With 4, every output is rounded together with all six frames that go in. With 2, the zeros in the matrices make
        each output depend on its own three frames only, to the last bit, as in the plain convolution.
        """
        self.winograd = winograd
        self.split = split
        self.past: dict[nn.Module, Tensor] = {}
        self._kernels: dict[tuple[nn.Module, int], Tensor] = {}

    def room(self, layer: nn.Module, x_BCTHW: Tensor) -> Tensor:
        """The two frames before a chunk of x's shape, then room for the chunk: fill [:, :, PAST:]."""
        batch, channels, frames, height, width = x_BCTHW.shape
        joined = x_BCTHW.new_empty(batch, frames + PAST, height, width, channels).permute(0, 4, 1, 2, 3)
        if (before := self.past.get(layer)) is None:
            joined[:, :, :PAST].zero_()
        else:
            joined[:, :, :PAST] = before
        return joined

    def join(self, layer: nn.Module, x_BCTHW: Tensor) -> Tensor:
        """The two frames before x, then x."""
        joined = self.room(layer, x_BCTHW)
        joined[:, :, PAST:] = x_BCTHW
        return joined

    def remember(self, layer: nn.Module, joined_BCTHW: Tensor) -> None:
        """Keep a copy of the last two frames, so that the chunk itself can be freed."""
        self.past[layer] = joined_BCTHW[:, :, -PAST:].clone(memory_format=torch.preserve_format)

    def with_halo(self, x_BCTHW: Tensor, *, above: bool = True) -> Tensor:
        """Add the edge row of the shard below and, with `above`, that of the shard above. Without a split, return x."""
        if self.split is None:
            return x_BCTHW
        rows_HBTWC = self.split.with_halo(x_BCTHW.permute(3, 0, 2, 4, 1).contiguous(), above=above)
        return rows_HBTWC.permute(1, 2, 0, 3, 4).contiguous().permute(0, 4, 1, 2, 3)

    def without_halo(self, x_BCTHW: Tensor) -> Tensor:
        """Drop the rows that `with_halo` added, after a convolution that keeps the height."""
        return x_BCTHW if self.split is None else x_BCTHW[:, :, :, 1:-1]

    def memory(self, layer: nn.Module) -> list[Tensor | None]:
        """The frames that the layer and the layers in it remember now."""
        return [self.past.get(module) for module in layer.modules()]

    def kernels(self, conv: CausalConv3d, frames: int) -> Tensor:
        """The two-dimensional kernels (n, C_out, C_in, 3, 3) for chunks of this many frames, computed once per clip."""
        key = (conv, frames)
        if key not in self._kernels:
            weight = conv.weight
            if frames == 1:
                self._kernels[key] = weight.transpose(1, 2).flatten(1, 2)[None]
            else:
                transform = weight.new_tensor(_KERNEL[frames])
                self._kernels[key] = torch.einsum("nt,oithw->nohwi", transform, weight).permute(0, 1, 4, 2, 3)
        return self._kernels[key]


class CausalConv3d(nn.Conv3d):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, 3, padding=(0, 1, 1))

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, x_BCTHW: Tensor, stream: Stream | None = None
    ) -> Tensor:
        if stream is None:
            return super().forward(F.pad(x_BCTHW, (0, 0, 0, 0, PAST, 0)))
        return self.joined(stream.join(self, x_BCTHW), stream)

    def joined(self, joined_BCTHW: Tensor, stream: Stream) -> Tensor:
        """Convolve the next chunk, which follows the two frames before it (`Stream.room`)."""
        begins = self not in stream.past
        stream.remember(self, joined_BCTHW)
        return stream.without_halo(self._convolve(stream.with_halo(joined_BCTHW), begins, stream))

    def _convolve(self, joined_BCTHW: Tensor, begins: bool, stream: Stream) -> Tensor:
        frames = joined_BCTHW.shape[2] - PAST
        if frames == 1 and begins:  # the past is zero: one third of the kernel is enough
            return F.conv2d(joined_BCTHW[:, :, PAST], self.weight[:, :, -1], self.bias, padding=1)[:, :, None]
        short = min(frames, stream.winograd)
        if frames not in (1, 2, 4) or joined_BCTHW.device.type != "cpu" or joined_BCTHW.dtype != torch.float32:
            return super().forward(joined_BCTHW)
        frames_THWC, kernels = joined_BCTHW[0].permute(1, 2, 3, 0), stream.kernels(self, short)
        parts = [self._short(frames_THWC[i : i + short + PAST], kernels) for i in range(0, frames, short)]
        clip_THWC = parts[0] if len(parts) == 1 else torch.cat(parts)
        return clip_THWC.permute(3, 0, 1, 2)[None]

    def _short(self, frames_THWC: Tensor, kernels: Tensor) -> Tensor:
        """1, 2 or 4 output frames from as many input frames and the two before, by two-dimensional convolutions."""
        n, height, width, _ = frames_THWC.shape
        if n == PAST + 1:  # one output frame: its three inputs side by side as channels
            stacked_BCHW = frames_THWC.permute(1, 2, 0, 3).flatten(2).permute(2, 0, 1)[None]
            return F.conv2d(stacked_BCHW, kernels[0], self.bias, padding=1).permute(0, 2, 3, 1)
        transform = kernels.new_tensor(_INPUT[n - PAST])
        inputs_BCHW = (transform @ frames_THWC.reshape(n, -1)).view(frames_THWC.shape).permute(0, 3, 1, 2)
        # Component 1 enters every output frame once (second column of _OUTPUT), so it alone carries the bias.
        outputs = [
            F.conv2d(inputs_BCHW[i : i + 1], kernel, self.bias if i == 1 else None, padding=1).permute(0, 2, 3, 1)
            for i, kernel in enumerate(kernels)
        ]
        transform = kernels.new_tensor(_OUTPUT[n - PAST])
        return (transform @ torch.cat(outputs).view(n, -1)).view(n - PAST, height, width, -1)
