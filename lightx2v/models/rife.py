"""Rife: the network of RIFE 4.25, which makes the frame between two frames, at any time between them.

It estimates, from coarse to fine, how each pixel of the new frame has moved from both neighbours (the flow), and how
much of it either neighbour shows (the mask). Source: Practical-RIFE by Zhewei Huang (MIT). The names of the parameters
are those of the file that ComfyUI reads.

Shapes: B batch, C channels, H height, W width; both sides are multiples of `ALIGN`. A flow has channels x, y towards
the first frame, then x, y towards the second, in pixels.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ALIGN = 64
"""The coarsest block works on sixteenths, whose sides it halves twice."""
SCALES = (16, 8, 4, 2, 1)
WIDTHS = (192, 128, 96, 64, 32)
FEATURES = 4
"""Channels of a frame's features."""
STATE = 8
"""Channels that a block hands to the next, besides flow and mask."""


class Rife(nn.Module):
    """`features` of each frame, once; then `forward` for each time between two frames."""

    def __init__(self) -> None:
        super().__init__()
        self.encode = Head()
        pair = 2 * (3 + FEATURES) + 1  # both frames, their features, and the time
        inputs = [pair] + [pair + 1 + STATE + 4] * 4
        self.blocks = nn.ModuleList(Block(size, width) for size, width in zip(inputs, WIDTHS, strict=True))

    def features(self, frame_BCHW: Tensor) -> Tensor:
        """The features (B, FEATURES, H, W) of a frame (B, 3, H, W) in [0, 1]."""
        return self.encode(frame_BCHW)

    def forward(
        self, first: Tensor, second: Tensor, first_features: Tensor, second_features: Tensor, time: float
    ) -> Tensor:
        """The frame (B, 3, H, W) at `time`, from 0 (the first) to 1 (the second). It may leave [0, 1] a little."""
        when = torch.full_like(first[:, :1], time)
        pair = torch.cat([first, second, first_features, second_features, when], dim=1)
        flow, mask, state = self.blocks[0](pair, None, SCALES[0])
        for block, scale in zip(self.blocks[1:], SCALES[1:], strict=True):
            warped = _warp_pair(torch.cat([first, first_features], 1), torch.cat([second, second_features], 1), flow)
            change, mask, state = block(torch.cat([*_in_order(*warped), when, mask, state], dim=1), flow, scale)
            flow = flow + change
        first, second = _warp_pair(first, second, flow)
        return torch.lerp(second, first, torch.sigmoid(mask))


class Head(nn.Module):
    """Features of a frame at its full size."""

    def __init__(self) -> None:
        super().__init__()
        self.cnn0 = nn.Conv2d(3, 16, 3, stride=2, padding=1)
        self.cnn1 = nn.Conv2d(16, 16, 3, padding=1)
        self.cnn2 = nn.Conv2d(16, 16, 3, padding=1)
        self.cnn3 = nn.ConvTranspose2d(16, FEATURES, 4, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        for layer in (self.cnn0, self.cnn1, self.cnn2):
            x = F.leaky_relu(layer(x), 0.2)
        return self.cnn3(x)


class Block(nn.Module):
    """One estimate, at 1 / scale of the size: the change of the flow, the mask, and a state for the next block."""

    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        self.conv0 = nn.Sequential(_halving(inputs, width // 2), _halving(width // 2, width))
        self.convblock = nn.Sequential(*(Residual(width) for _ in range(8)))
        self.lastconv = nn.Sequential(
            nn.ConvTranspose2d(width, 4 * (4 + 1 + STATE), 4, stride=2, padding=1), nn.PixelShuffle(2)
        )

    def forward(self, x: Tensor, flow: Tensor | None, scale: int) -> tuple[Tensor, Tensor, Tensor]:
        x = _resize(x, 1 / scale)
        if flow is not None:
            x = torch.cat([x, _resize(flow, 1 / scale) / scale], dim=1)
        x = _resize(self.lastconv(self.convblock(self.conv0(x))), scale)
        return x[:, :4] * scale, x[:, 4:5], x[:, 5:]


class Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)
        self.beta = nn.Parameter(torch.ones(1, width, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return F.leaky_relu(self.conv(x) * self.beta + x, 0.2)


def _halving(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, stride=2, padding=1), nn.LeakyReLU(0.2))


def _resize(x: Tensor, factor: float) -> Tensor:
    return x if factor == 1 else F.interpolate(x, scale_factor=factor, mode="bilinear", align_corners=False)


def _in_order(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Two frames with their features, as the blocks take them: both frames first."""
    return first[:, :3], second[:, :3], first[:, 3:], second[:, 3:]


def _warp_pair(first: Tensor, second: Tensor, flow: Tensor) -> tuple[Tensor, Tensor]:
    return warp(first, flow[:, :2]), warp(second, flow[:, 2:])


def warp(x: Tensor, flow: Tensor) -> Tensor:
    """`x` (B, C, H, W) looked up at each pixel's place plus `flow` (B, 2, H, W); beyond the edge, the edge."""
    height, width = x.shape[-2:]
    across = torch.arange(width, dtype=x.dtype, device=x.device) + flow[:, 0]
    down = torch.arange(height, dtype=x.dtype, device=x.device)[:, None] + flow[:, 1]
    grid = torch.stack([across * (2 / (width - 1)) - 1, down * (2 / (height - 1)) - 1], dim=-1)
    return F.grid_sample(x, grid, mode="bilinear", padding_mode="border", align_corners=True)
