"""The layers of the causal video VAE: streamed chunk by chunk for inference, over whole clips for training.

Call every layer with a clip and its `Stream`; None means the whole clip at once, with gradients. Parameter names are
those of Wan2.1_VAE.pth, hence the numbered entries.

Shapes: B batch, C channels, T frames, H height, W width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .causal_conv import PAST, CausalConv3d, Stream
from .vae_config import VAEConfig


class RMSNorm(nn.Module):
    """x / |x| * sqrt(C) * gamma over the channels. The statistics are float32 in any dtype of the module."""

    def __init__(self, channels: int, dims: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(channels, *(1,) * dims))

    def forward(self, x: Tensor) -> Tensor:
        scale = self.gamma.shape[0] ** 0.5
        return F.normalize(x.float(), dim=1).to(x.dtype) * (self.gamma * scale)

    def activate(self, out: Tensor, x: Tensor) -> None:
        """SiLU of `forward`, for inference, written into `out` with little extra memory."""
        channels = self.gamma.shape[0]
        if x.is_cuda:  # two fused kernels: a third fewer passes over memory
            normal = F.rms_norm(x.movedim(1, -1), (channels,), self.gamma.flatten(), 1e-24)
            torch.ops.aten.silu.out(normal.movedim(-1, 1), out=out)
            return
        length = torch.linalg.vector_norm(x, dim=1, keepdim=True, dtype=torch.float32)
        torch.div(x, length.clamp_min_(1e-12), out=out)
        F.silu(out.mul_(self.gamma * channels**0.5), inplace=True)


def _convolve(norm: nn.Module, conv: nn.Module, x_BCTHW: Tensor, stream: Stream | None) -> Tensor:
    """RMSNorm, SiLU, causal convolution."""
    assert isinstance(norm, RMSNorm) and isinstance(conv, CausalConv3d)
    if stream is None:
        return conv(F.silu(norm(x_BCTHW)))
    joined = stream.room(conv, x_BCTHW)
    norm.activate(joined[:, :, PAST:], x_BCTHW)
    return conv.joined(joined, stream)


class ResidualBlock(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.residual = nn.ModuleDict(
            {
                "0": RMSNorm(inputs, 3),
                "2": CausalConv3d(inputs, outputs),
                "3": RMSNorm(outputs, 3),
                "6": CausalConv3d(outputs, outputs),
            }
        )
        self.shortcut = nn.Conv3d(inputs, outputs, 1) if inputs != outputs else None

    def forward(self, x_BCTHW: Tensor, stream: Stream | None = None) -> Tensor:
        residual = self.residual
        h_BCTHW = _convolve(residual["0"], residual["2"], x_BCTHW, stream)
        h_BCTHW = _convolve(residual["3"], residual["6"], h_BCTHW, stream)
        shortcut = x_BCTHW if self.shortcut is None else _mix(self.shortcut, x_BCTHW)
        return h_BCTHW + shortcut if stream is None else h_BCTHW.add_(shortcut)


class Head(nn.ModuleDict):
    def __init__(self, channels: int, outputs: int) -> None:
        super().__init__({"0": RMSNorm(channels, 3), "2": CausalConv3d(channels, outputs)})

    def forward(self, x_BCTHW: Tensor, stream: Stream | None = None) -> Tensor:
        return _convolve(self["0"], self["2"], x_BCTHW, stream)


class Attention(nn.Module):
    """Self-attention with one head over the pixels of each frame."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = RMSNorm(channels, 2)
        self.to_qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.proj = nn.Conv2d(channels, channels, 1)

    def forward(self, x_BCTHW: Tensor, stream: Stream | None = None) -> Tensor:
        frames = _frames(x_BCTHW)
        _, channels, height, width = frames.shape
        qkv = self.to_qkv(self.norm(frames))
        q, k, v = qkv.flatten(2).transpose(1, 2).chunk(3, dim=-1)
        if stream is not None and stream.split is not None:
            rows_HTWC = stream.split.all_gather(qkv[:, channels:].permute(2, 0, 3, 1).contiguous())
            k, v = rows_HTWC.transpose(0, 1).flatten(1, 2).chunk(2, dim=-1)
        out = F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None])[:, 0]
        out = self.proj(out.transpose(1, 2).unflatten(2, (height, width)))
        return x_BCTHW + _clip(out, x_BCTHW.shape[0])


def _mix(conv: nn.Conv3d, x_BCTHW: Tensor) -> Tensor:
    """A 1x1x1 convolution as a matrix product over the channels, which are contiguous in memory."""
    x = F.linear(x_BCTHW.permute(0, 2, 3, 4, 1), conv.weight.flatten(1), conv.bias)
    return x.permute(0, 4, 1, 2, 3)


def _frames(x_BCTHW: Tensor) -> Tensor:
    return x_BCTHW.transpose(1, 2).flatten(0, 1)


def _clip(frames: Tensor, batch: int) -> Tensor:
    return frames.unflatten(0, (batch, -1)).transpose(1, 2)


class Downsample(nn.Module):
    """Halves height and width; with `temporal` also time, where the very first frame stays alone."""

    def __init__(self, channels: int, temporal: bool) -> None:
        super().__init__()
        self.resample = nn.ModuleDict({"1": nn.Conv2d(channels, channels, 3, stride=2)})
        self.time_conv = nn.Conv3d(channels, channels, (3, 1, 1), stride=(2, 1, 1)) if temporal else None

    def forward(self, x_BCTHW: Tensor, stream: Stream | None = None) -> Tensor:
        if stream is not None and stream.split is not None:
            frames = F.pad(_frames(stream.with_halo(x_BCTHW, above=False)), (0, 1))
        else:
            frames = F.pad(_frames(x_BCTHW), (0, 1, 0, 1))
        x_BCTHW = _clip(self.resample["1"](frames), x_BCTHW.shape[0])
        if self.time_conv is None:
            return x_BCTHW
        before = None if stream is None else stream.past.get(self)
        if stream is not None:
            stream.past[self] = x_BCTHW[:, :, -1:].clone(memory_format=torch.preserve_format)
        if before is not None:
            return self.time_conv(torch.cat([before, x_BCTHW], dim=2))
        if x_BCTHW.shape[2] == 1:
            return x_BCTHW
        return torch.cat([x_BCTHW[:, :, :1], self.time_conv(x_BCTHW)], dim=2)


class Upsample(nn.Module):
    """Doubles height and width, halves the channels; with `temporal`, doubles every frame except the very first."""

    def __init__(self, channels: int, temporal: bool) -> None:
        super().__init__()
        self.resample = nn.ModuleDict({"1": nn.Conv2d(channels, channels // 2, 3, padding=1)})
        self.time_conv = nn.Conv3d(channels, 2 * channels, (3, 1, 1)) if temporal else None

    def forward(self, x_BCTHW: Tensor, stream: Stream | None = None) -> Tensor:
        if self.time_conv is not None:
            x_BCTHW = self._double_time(self.time_conv, x_BCTHW, stream)
        frames = F.interpolate(_frames(x_BCTHW), scale_factor=2, mode="nearest-exact")
        if stream is None or stream.split is None:
            return _clip(self.resample["1"](frames), x_BCTHW.shape[0])
        with_halo = _frames(stream.with_halo(_clip(frames, x_BCTHW.shape[0])))
        return stream.without_halo(_clip(self.resample["1"](with_halo), x_BCTHW.shape[0]))

    def _double_time(self, time_conv: nn.Conv3d, x_BCTHW: Tensor, stream: Stream | None) -> Tensor:
        """The first frame of a clip passes through, and for the frames after it the past is zero."""
        first = x_BCTHW[:, :, :0]
        if stream is None or self not in stream.past:
            first, x_BCTHW = x_BCTHW[:, :, :1], x_BCTHW[:, :, 1:]
            if stream is not None:
                stream.past[self] = x_BCTHW[:, :, :0]  # a mark without data: the first frame is done
            if x_BCTHW.shape[2] == 0:
                return first
        if stream is None:
            joined = F.pad(x_BCTHW, (0, 0, 0, 0, PAST, 0))
        else:
            joined = stream.join(time_conv, x_BCTHW)
            stream.remember(time_conv, joined)
        even, odd = time_conv(joined).chunk(2, dim=1)
        return torch.cat([first, torch.stack([even, odd], dim=3).flatten(2, 3)], dim=2)


def _middle(channels: int) -> nn.ModuleList:
    return nn.ModuleList([ResidualBlock(channels, channels), Attention(channels), ResidualBlock(channels, channels)])


class Encoder(nn.Module):
    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        width = config.dim
        self.conv1 = CausalConv3d(3, width)
        self.downsamples = nn.ModuleList()
        for stage, multiplier in enumerate(config.multipliers):
            for _ in range(config.res_blocks):
                self.downsamples.append(ResidualBlock(width, config.dim * multiplier))
                width = config.dim * multiplier
            if stage < len(config.temporal_down):
                self.downsamples.append(Downsample(width, config.temporal_down[stage]))
        self.middle = _middle(width)
        self.head = Head(width, 2 * config.z_dim)

    def layers(self) -> list[nn.Module]:
        """The layers in the order in which a clip passes them."""
        return [self.conv1, *self.downsamples, *self.middle, self.head]


class Decoder(nn.Module):
    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        width = config.dim * config.multipliers[-1]
        self.conv1 = CausalConv3d(config.z_dim, width)
        self.middle = _middle(width)
        self.upsamples = nn.ModuleList()
        for stage, multiplier in enumerate(reversed(config.multipliers)):
            for _ in range(config.res_blocks + 1):
                self.upsamples.append(ResidualBlock(width, config.dim * multiplier))
                width = config.dim * multiplier
            if stage < len(config.temporal_down):
                self.upsamples.append(Upsample(width, config.temporal_down[-1 - stage]))
                width //= 2
        self.head = Head(width, 3)

    def layers(self) -> list[nn.Module]:
        """The layers in the order in which a clip passes them."""
        return [self.conv1, *self.middle, *self.upsamples, self.head]
