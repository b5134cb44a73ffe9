"""The causal video VAE of Wan2.1, which Wan2.2-A14B uses too: frames to latents and back, streamed over time.

One latent frame stands for the first video frame, every further one for 4 frames; space shrinks by 8. All layers look
into the past only, so a clip may be cut anywhere along time: each layer keeps the last inputs it needs in a `State`,
and a clip in chunks gives what the whole clip gives. `encode` and `decode` use that to run in bounded memory;
`encode_clip` and `decode_clip` run whole batches with gradients. Parameter names are those of Wan2.1_VAE.pth.

Shapes: B batch, C channels, T frames, H height, W width; latents are CTHW and normalised to about unit variance.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import CheckpointError
from ..progress import CancelToken
from .causal_conv import PAST, CausalConv3d, Stream

# fmt: off
LATENT_MEAN = (-0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
               0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921)
LATENT_STD = (2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
              3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160)
# fmt: on


@dataclass(frozen=True, slots=True, kw_only=True)
class VAEConfig:
    """Widths and depths; the defaults are the released VAE."""

    dim: int = 96
    multipliers: tuple[int, ...] = (1, 2, 4, 4)
    res_blocks: int = 2
    temporal_down: tuple[bool, ...] = (False, True, True)

    z_dim = len(LATENT_MEAN)

    @property
    def spatial_stride(self) -> int:
        return 2 ** len(self.temporal_down)

    @property
    def temporal_stride(self) -> int:
        return 2 ** sum(self.temporal_down)

    @classmethod
    def from_shapes(cls, shapes: Mapping[str, Sequence[int]]) -> VAEConfig:
        """Reads the architecture off a checkpoint's tensor shapes, so that a VAE of any width loads."""
        try:
            dim = shapes["encoder.conv1.weight"][0]
            z_dim = shapes["conv2.weight"][0]
        except KeyError as missing:
            raise CheckpointError(
                f"Not a Wan2.1 VAE: the file has no tensor {missing}. Use Wan2.1_VAE.pth of the Wan-AI repository."
            ) from None
        if z_dim != cls.z_dim:
            raise CheckpointError(
                f"This VAE has {z_dim} latent channels, Wan2.2-A14B needs {cls.z_dim}. Use Wan2.1_VAE.pth "
                "(Wan2.2_VAE.pth belongs to the 5B model)."
            )
        stages: list[list[int]] = [[]]
        temporal: list[bool] = []
        index = 0
        while True:
            layer = f"encoder.downsamples.{index}"
            if (weight := shapes.get(f"{layer}.residual.2.weight")) is not None:
                stages[-1].append(weight[0])
            elif f"{layer}.resample.1.weight" in shapes:
                temporal.append(f"{layer}.time_conv.weight" in shapes)
                stages.append([])
            else:
                break
            index += 1
        widths = {tuple(width / dim for width in stage) for stage in stages}
        depths = {len(stage) for stage in stages}
        regular = depths != {0} and len(depths) == 1 and all(len(set(w)) == 1 and w[0] == int(w[0]) for w in widths)
        if not regular:
            raise CheckpointError(
                f"The VAE's encoder stages have widths {stages}; expected the same number of blocks in each stage "
                f"and multiples of the first width {dim}. Use Wan2.1_VAE.pth or a VAE of the same architecture."
            )
        return cls(
            dim=dim,
            multipliers=tuple(stage[0] // dim for stage in stages),
            res_blocks=len(stages[0]),
            temporal_down=tuple(temporal),
        )


class RMSNorm(nn.Module):
    """x / |x| * sqrt(C) * gamma over the channels; the statistics are float32 whatever the module's dtype."""

    def __init__(self, channels: int, dims: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(channels, *(1,) * dims))

    def forward(self, x: Tensor) -> Tensor:
        scale = self.gamma.shape[0] ** 0.5
        return F.normalize(x.float(), dim=1).to(x.dtype) * (self.gamma * scale)

    def into(self, out: Tensor, x: Tensor) -> None:
        """The same for inference, written into `out` without temporaries of x's size."""
        length = torch.linalg.vector_norm(x, dim=1, keepdim=True, dtype=torch.float32)
        torch.div(x, length.clamp_min_(1e-12), out=out)
        out.mul_(self.gamma * self.gamma.shape[0] ** 0.5)


def _convolve(norm: RMSNorm, conv: CausalConv3d, x_BCTHW: Tensor, stream: Stream | None) -> Tensor:
    """norm, SiLU, causal convolution."""
    if stream is None:
        return conv(F.silu(norm(x_BCTHW)))
    joined = stream.room(conv, x_BCTHW)
    active = joined[:, :, PAST:]
    norm.into(active, x_BCTHW)
    F.silu(active, inplace=True)
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
        self.shortcut = nn.Conv3d(inputs, outputs, 1) if inputs != outputs else nn.Identity()

    def forward(self, x_BCTHW: Tensor, stream: Stream | None = None) -> Tensor:
        residual = self.residual
        h_BCTHW = _convolve(residual["0"], residual["2"], x_BCTHW, stream)
        h_BCTHW = _convolve(residual["3"], residual["6"], h_BCTHW, stream)
        shortcut = self.shortcut(x_BCTHW)
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
        q, k, v = self.to_qkv(self.norm(frames)).flatten(2).transpose(1, 2).chunk(3, dim=-1)
        out = F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None])[:, 0]
        out = self.proj(out.transpose(1, 2).unflatten(2, (height, width)))
        return x_BCTHW + _clip(out, x_BCTHW.shape[0])


def _frames(x_BCTHW: Tensor) -> Tensor:
    return x_BCTHW.transpose(1, 2).flatten(0, 1)


def _clip(frames: Tensor, batch: int) -> Tensor:
    return frames.unflatten(0, (batch, -1)).transpose(1, 2)


class Downsample(nn.Module):
    """Halves height and width; with `temporal` also time, where the very first frame stays on its own."""

    def __init__(self, channels: int, temporal: bool) -> None:
        super().__init__()
        self.resample = nn.ModuleDict({"1": nn.Conv2d(channels, channels, 3, stride=2)})
        self.time_conv = nn.Conv3d(channels, channels, (3, 1, 1), stride=(2, 1, 1)) if temporal else None

    def forward(self, x_BCTHW: Tensor, stream: Stream | None = None) -> Tensor:
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
    """Doubles height and width, halves the channels; with `temporal` doubles every frame but the very first."""

    def __init__(self, channels: int, temporal: bool) -> None:
        super().__init__()
        self.resample = nn.ModuleDict({"1": nn.Conv2d(channels, channels // 2, 3, padding=1)})
        self.time_conv = nn.Conv3d(channels, 2 * channels, (3, 1, 1)) if temporal else None

    def forward(self, x_BCTHW: Tensor, stream: Stream | None = None) -> Tensor:
        if self.time_conv is not None:
            x_BCTHW = self._double_time(self.time_conv, x_BCTHW, stream)
        frames = F.interpolate(_frames(x_BCTHW), scale_factor=2, mode="nearest-exact")
        return _clip(self.resample["1"](frames), x_BCTHW.shape[0])

    def _double_time(self, time_conv: nn.Conv3d, x_BCTHW: Tensor, stream: Stream | None) -> Tensor:
        """The first frame of a clip passes through, and for the frames after it the past is zero."""
        first = x_BCTHW[:, :, :0]
        if stream is None or self not in stream.past:
            first, x_BCTHW = x_BCTHW[:, :, :1], x_BCTHW[:, :, 1:]
            if stream is not None:
                stream.past[self] = x_BCTHW[:, :, :0]  # a mark without data: the first frame has been
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
        """In the order in which a clip passes them; each is called with the clip and its stream."""
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
        """In the order in which a clip passes them; each is called with the clip and its stream."""
        return [self.conv1, *self.middle, *self.upsamples, self.head]


def _run(layers: list[nn.Module], x_BCTHW: Tensor, stream: Stream | None = None) -> Tensor:
    x_BCTHW = x_BCTHW.contiguous(memory_format=torch.channels_last_3d)
    for layer in layers:
        x_BCTHW = layer(x_BCTHW, stream)
    return x_BCTHW


class WanVAE(nn.Module):
    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.conv1 = nn.Conv3d(2 * config.z_dim, 2 * config.z_dim, 1)
        self.conv2 = nn.Conv3d(config.z_dim, config.z_dim, 1)
        self.decoder = Decoder(config)

    def encode_clip(self, video_BCTHW: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log variance of the normalised latents of whole clips in [-1, 1], 4n+1 frames; keeps gradients."""
        return self._moments(_run(self.encoder.layers(), video_BCTHW.to(self.conv1.weight.dtype)))

    def decode_clip(self, latents_BCTHW: Tensor) -> Tensor:
        """Whole clips from normalised latents, float32, not clamped; keeps gradients."""
        return _run(self.decoder.layers(), self._denormalise(latents_BCTHW)).float()

    @torch.no_grad()
    def encode(self, video_CTHW: Tensor, *, cancel: CancelToken | None = None) -> Tensor:
        """Normalised latents (the mean, not a sample) of a clip in [-1, 1] with 4n+1 frames: float32, CTHW."""
        stream = Stream()
        video_BCTHW = video_CTHW[None].to(self.conv1.weight.dtype)
        latents = []
        for chunk in _cut(video_BCTHW, self.config.temporal_stride):
            if cancel is not None:
                cancel.check()
            latents.append(self._moments(_run(self.encoder.layers(), chunk, stream))[0])
        return torch.cat(latents, dim=2)[0]

    @torch.no_grad()
    def decode(self, latents_CTHW: Tensor, *, cancel: CancelToken | None = None) -> Iterator[Tensor]:
        """Yields float32 frames CTHW in [-1, 1]: one for the first latent frame, then 4 for each."""
        stream = Stream()
        for chunk in self._denormalise(latents_CTHW[None]).split(1, dim=2):
            if cancel is not None:
                cancel.check()
            yield _run(self.decoder.layers(), chunk, stream)[0].float().clamp_(-1, 1)

    def _moments(self, features_BCTHW: Tensor) -> tuple[Tensor, Tensor]:
        mean, log_variance = self.conv1(features_BCTHW).float().chunk(2, dim=1)
        centre, spread = _statistics(mean)
        return (mean - centre) / spread, log_variance - 2 * spread.log()

    def _denormalise(self, latents_BCTHW: Tensor) -> Tensor:
        centre, spread = _statistics(latents_BCTHW)
        return self.conv2((latents_BCTHW.float() * spread + centre).to(self.conv2.weight.dtype))


def _statistics(like: Tensor) -> tuple[Tensor, Tensor]:
    values = torch.tensor([LATENT_MEAN, LATENT_STD], device=like.device)[..., None, None, None]
    return values[0], values[1]


def _cut(video_BCTHW: Tensor, stride: int) -> Iterator[Tensor]:
    yield video_BCTHW[:, :, :1]
    yield from video_BCTHW[:, :, 1:].split(stride, dim=2)
