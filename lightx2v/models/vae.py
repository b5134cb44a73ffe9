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

State = dict[nn.Module, Tensor]
"""What the layers remember between two chunks of one clip: module -> its last input frames."""

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


class CausalConv3d(nn.Conv3d):
    """Convolution that sees the present and the past: `kernel - 1` frames before the first one are zero."""

    def __init__(self, inputs: int, outputs: int, kernel: int) -> None:
        super().__init__(inputs, outputs, kernel, padding=(0, kernel // 2, kernel // 2))

    def forward(self, x_BCTHW: Tensor, state: State | None = None) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        past = self.kernel_size[0] - 1
        if past:
            x_BCTHW = _with_past(self, x_BCTHW, past, state)
        return super().forward(x_BCTHW)


def _with_past(layer: nn.Module, x_BCTHW: Tensor, past: int, state: State | None) -> Tensor:
    """`past` frames of the chunk before (zeros before the first) and x; remembers the last ones for the chunk after."""
    before = None if state is None else state.get(layer)
    if before is None:
        joined = F.pad(x_BCTHW, (0, 0, 0, 0, past, 0))
    else:
        joined = torch.cat([before, x_BCTHW], dim=2)
    if state is not None:
        state[layer] = joined[:, :, -past:].clone()
    return joined


class RMSNorm(nn.Module):
    """x / |x| * sqrt(C) * gamma over the channels; the statistics are float32 whatever the module's dtype."""

    def __init__(self, channels: int, dims: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(channels, *(1,) * dims))

    def forward(self, x: Tensor) -> Tensor:
        scale = self.gamma.shape[0] ** 0.5
        return F.normalize(x.float(), dim=1).to(x.dtype) * (self.gamma * scale)


class ResidualBlock(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.residual = nn.ModuleDict(
            {
                "0": RMSNorm(inputs, 3),
                "2": CausalConv3d(inputs, outputs, 3),
                "3": RMSNorm(outputs, 3),
                "6": CausalConv3d(outputs, outputs, 3),
            }
        )
        self.shortcut = CausalConv3d(inputs, outputs, 1) if inputs != outputs else nn.Identity()

    def forward(self, x_BCTHW: Tensor, state: State | None = None) -> Tensor:
        residual = self.residual
        h = residual["2"](F.silu(residual["0"](x_BCTHW)), state)
        h = residual["6"](F.silu(residual["3"](h)), state)
        return self.shortcut(x_BCTHW) + h


class Attention(nn.Module):
    """Self-attention with one head over the pixels of each frame."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = RMSNorm(channels, 2)
        self.to_qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.proj = nn.Conv2d(channels, channels, 1)

    def forward(self, x_BCTHW: Tensor, state: State | None = None) -> Tensor:
        frames = _frames(x_BCTHW)
        _, channels, height, width = frames.shape
        q, k, v = self.to_qkv(self.norm(frames)).flatten(2).transpose(1, 2).chunk(3, dim=-1)
        out = F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None])[:, 0]
        out = self.proj(out.transpose(1, 2).reshape(-1, channels, height, width))
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

    def forward(self, x_BCTHW: Tensor, state: State | None = None) -> Tensor:
        frames = F.pad(_frames(x_BCTHW), (0, 1, 0, 1))
        x_BCTHW = _clip(self.resample["1"](frames), x_BCTHW.shape[0])
        if self.time_conv is None:
            return x_BCTHW
        before = None if state is None else state.get(self)
        if state is not None:
            state[self] = x_BCTHW[:, :, -1:].clone()
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

    def forward(self, x_BCTHW: Tensor, state: State | None = None) -> Tensor:
        if self.time_conv is not None:
            x_BCTHW = self._double_time(self.time_conv, x_BCTHW, state)
        frames = F.interpolate(_frames(x_BCTHW), scale_factor=2, mode="nearest-exact")
        return _clip(self.resample["1"](frames), x_BCTHW.shape[0])

    def _double_time(self, time_conv: nn.Conv3d, x_BCTHW: Tensor, state: State | None) -> Tensor:
        first = None
        if state is None or self not in state:  # the first frame of a clip passes through and is not remembered
            first, x_BCTHW = x_BCTHW[:, :, :1], x_BCTHW[:, :, 1:]
            if state is not None:
                state[self] = first  # only a mark: "the first frame has been"
            if x_BCTHW.shape[2] == 0:
                return first
        pairs = time_conv(_with_past(time_conv, x_BCTHW, 2, state))
        even, odd = pairs.chunk(2, dim=1)
        doubled = torch.stack([even, odd], dim=3).flatten(2, 3)
        return doubled if first is None else torch.cat([first, doubled], dim=2)


def _head(channels: int, outputs: int) -> nn.ModuleDict:
    return nn.ModuleDict({"0": RMSNorm(channels, 3), "2": CausalConv3d(channels, outputs, 3)})


def _middle(channels: int) -> nn.ModuleList:
    return nn.ModuleList([ResidualBlock(channels, channels), Attention(channels), ResidualBlock(channels, channels)])


class Encoder(nn.Module):
    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        width = config.dim
        self.conv1 = CausalConv3d(3, width, 3)
        self.downsamples = nn.ModuleList()
        for stage, multiplier in enumerate(config.multipliers):
            for _ in range(config.res_blocks):
                self.downsamples.append(ResidualBlock(width, config.dim * multiplier))
                width = config.dim * multiplier
            if stage < len(config.temporal_down):
                self.downsamples.append(Downsample(width, config.temporal_down[stage]))
        self.middle = _middle(width)
        self.head = _head(width, 2 * config.z_dim)

    def forward(self, x_BCTHW: Tensor, state: State | None = None) -> Tensor:
        x_BCTHW = self.conv1(x_BCTHW, state)
        for layer in (*self.downsamples, *self.middle):
            x_BCTHW = layer(x_BCTHW, state)
        return self.head["2"](F.silu(self.head["0"](x_BCTHW)), state)


class Decoder(nn.Module):
    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        width = config.dim * config.multipliers[-1]
        self.conv1 = CausalConv3d(config.z_dim, width, 3)
        self.middle = _middle(width)
        self.upsamples = nn.ModuleList()
        for stage, multiplier in enumerate(reversed(config.multipliers)):
            for _ in range(config.res_blocks + 1):
                self.upsamples.append(ResidualBlock(width, config.dim * multiplier))
                width = config.dim * multiplier
            if stage < len(config.temporal_down):
                self.upsamples.append(Upsample(width, config.temporal_down[-1 - stage]))
                width //= 2
        self.head = _head(width, 3)

    def forward(self, x_BCTHW: Tensor, state: State | None = None) -> Tensor:
        x_BCTHW = self.conv1(x_BCTHW, state)
        for layer in (*self.middle, *self.upsamples):
            x_BCTHW = layer(x_BCTHW, state)
        return self.head["2"](F.silu(self.head["0"](x_BCTHW)), state)


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
        return self._moments(self.encoder(video_BCTHW.to(self.conv1.weight.dtype)))

    def decode_clip(self, latents_BCTHW: Tensor) -> Tensor:
        """Whole clips from normalised latents, float32, not clamped; keeps gradients."""
        return self.decoder(self._denormalise(latents_BCTHW)).float()

    @torch.no_grad()
    def encode(self, video_CTHW: Tensor, *, cancel: CancelToken | None = None) -> Tensor:
        """Normalised latents (the mean, not a sample) of a clip in [-1, 1] with 4n+1 frames: float32, CTHW."""
        state: State = {}
        video_BCTHW = video_CTHW[None].to(self.conv1.weight.dtype)
        latents = []
        for chunk in _cut(video_BCTHW, self.config.temporal_stride):
            if cancel is not None:
                cancel.check()
            latents.append(self._moments(self.encoder(chunk, state))[0])
        return torch.cat(latents, dim=2)[0]

    @torch.no_grad()
    def decode(self, latents_CTHW: Tensor, *, cancel: CancelToken | None = None) -> Iterator[Tensor]:
        """Yields float32 frames CTHW in [-1, 1]: one for the first latent frame, then 4 for each."""
        state: State = {}
        for chunk in self._denormalise(latents_CTHW[None]).split(1, dim=2):
            if cancel is not None:
                cancel.check()
            yield self.decoder(chunk, state)[0].float().clamp_(-1, 1)

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
