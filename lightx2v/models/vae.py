"""WanVAE: the causal video VAE of Wan2.1 and Wan2.2-A14B, from frames to latents and back, streamed over time.

The first latent frame represents one video frame, every further one 4; space shrinks by 8. All layers see only the
past, so a clip may be cut anywhere along time, and its chunks give the result of the whole clip. `encode` and `decode`
use that to run in bounded memory; `encode_clip` and `decode_clip` run whole batches with gradients. Parameter names are
those of Wan2.1_VAE.pth.

Shapes: B batch, C channels, T frames, H height, W width; latents are CTHW and normalised to about unit variance.
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from ..progress import CancelToken
from .causal_conv import SpatialSplit, Stream
from .tiling import Tile, Tiling
from .vae_config import LATENT_MEAN, LATENT_STD, VAEConfig
from .vae_layers import Decoder, Encoder


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
    def encode(self, video_CTHW: Tensor, *, tiling: Tiling | None = None, cancel: CancelToken | None = None) -> Tensor:
        """Normalised latents (the mean, not a sample) of a clip in [-1, 1] with 4n+1 frames: float32, CTHW."""
        stride = self.config.temporal_stride
        sizes = [1] + [stride] * ((video_CTHW.shape[1] - 1) // stride)
        return self._encode(list(video_CTHW.split(sizes, dim=1)), tiling, None, cancel)

    @torch.no_grad()
    def encode_condition(
        self,
        frames: int,
        first_CHW: Tensor,
        last_CHW: Tensor | None = None,
        *,
        tiling: Tiling | None = None,
        split: SpatialSplit | None = None,
        cancel: CancelToken | None = None,
    ) -> Tensor:
        """Latents of the clip that conditions image-to-video: the image, then grey, and `last_CHW` at its end if given.

        Equal bit by bit to `encode` of that clip, at about a third of its cost for 81 frames: see `_features`.
        """
        stride = self.config.temporal_stride
        grey_CTHW = torch.zeros_like(first_CHW)[:, None].expand(-1, stride, -1, -1)
        chunks = [first_CHW[:, None]] + [grey_CTHW] * ((frames - 1) // stride)
        if last_CHW is not None:
            chunks[-1] = torch.cat([grey_CTHW[:, 1:], last_CHW[:, None]], dim=1)
        return self._encode(chunks, tiling, split, cancel)

    def _encode(
        self, chunks_CTHW: list[Tensor], tiling: Tiling | None, split: SpatialSplit | None, cancel: CancelToken | None
    ) -> Tensor:
        scale = self.config.spatial_stride
        height, width = (side // scale for side in chunks_CTHW[0].shape[2:])
        tiles = tiling.tiles(height, width, 1) if tiling else []
        if split is not None:
            crops = {id(chunk): split.shard(chunk, scale) for chunk in chunks_CTHW}  # equal chunks stay one object
            chunks_CTHW = [crops[id(chunk)] for chunk in chunks_CTHW]
            shard_CTHW = self._moments(torch.cat(list(self._features(chunks_CTHW, cancel, split)), dim=2))[0][0]
            return split.all_gather(shard_CTHW.movedim(2, 0).contiguous()).movedim(0, 2)
        if len(tiles) < 2:
            return self._moments(torch.cat(list(self._features(chunks_CTHW, cancel)), dim=2))[0][0]
        latents_CTHW = torch.zeros(self.config.z_dim, len(chunks_CTHW), height, width)
        for tile in tiles:
            crops = {id(chunk): tile.crop(chunk, scale) for chunk in chunks_CTHW}  # equal chunks stay one object
            part = self._encode([crops[id(chunk)] for chunk in chunks_CTHW], None, None, cancel)
            tile.add(latents_CTHW, part, 1)
        return latents_CTHW.to(self.conv1.weight.device)

    def _features(
        self, chunks_CTHW: list[Tensor], cancel: CancelToken | None, split: SpatialSplit | None = None
    ) -> Iterator[Tensor]:
        """The encoder's output for each chunk of a clip.

        While the same tensor object repeats, a layer whose memory did not change gives the same output again, bit by
        bit, if the layers before it do. The first layers come to this rest within a few chunks, as each sees only so
        far into the past; resting layers are not computed again. (Convolutions make two frames at once here: with four,
        a chunk's frames would be rounded together, and each layer would come to rest one chunk later.)
        """
        weight = self.conv1.weight
        stream, layers = Stream(winograd=2, split=split), self.encoder.layers()
        previous, resting, output = None, 0, None
        for chunk_CTHW in chunks_CTHW:
            if cancel is not None:
                cancel.check()
            repeats = chunk_CTHW is previous
            previous = chunk_CTHW
            if not repeats or output is None:
                resting = 0
                output = chunk_CTHW[None].to(weight).contiguous(memory_format=torch.channels_last_3d)
            x_BCTHW = output
            for index in range(resting, len(layers)):
                before = stream.memory(layers[index])
                x_BCTHW = layers[index](x_BCTHW, stream)
                if repeats and index == resting:
                    rests = _equal(before, stream.memory(layers[index]))
                    if rests if split is None else split.all_true(rests):
                        resting, output = index + 1, x_BCTHW
            yield x_BCTHW

    @torch.no_grad()
    def decode(
        self,
        latents_CTHW: Tensor,
        *,
        tiling: Tiling | None = None,
        split: SpatialSplit | None = None,
        cancel: CancelToken | None = None,
    ) -> Iterator[Tensor]:
        """Yield float32 frames CTHW in [-1, 1]: one for the first latent frame, then 4 for each.

        Without tiles it yields each chunk once decoded, on the VAE's device; with tiles, all at the end in host memory.
        With `split` it yields only the rows of this process.
        """
        if split is not None:
            latents_CTHW, tiling = split.shard(latents_CTHW, 1), None
        height, width = latents_CTHW.shape[2:]
        tiles = tiling.tiles(height, width, self.config.spatial_stride) if tiling else []
        if len(tiles) > 1:
            yield from self._decode_tiles(latents_CTHW, tiles, cancel)
            return
        stream = Stream(split=split)
        for latent_BCTHW in self._denormalise(latents_CTHW[None].to(self.conv2.weight.device)).split(1, dim=2):
            if cancel is not None:
                cancel.check()
            yield _run(self.decoder.layers(), latent_BCTHW, stream)[0].float().clamp_(-1, 1)

    def _decode_tiles(self, latents_CTHW: Tensor, tiles: list[Tile], cancel: CancelToken | None) -> Iterator[Tensor]:
        scale, stride = self.config.spatial_stride, self.config.temporal_stride
        _, count, height, width = latents_CTHW.shape
        video_CTHW = torch.zeros(3, stride * (count - 1) + 1, height * scale, width * scale)
        sizes = [1] + [stride] * (count - 1)
        for tile in tiles:
            parts = self.decode(tile.crop(latents_CTHW, 1), cancel=cancel)
            for frames_CTHW, part_CTHW in zip(video_CTHW.split(sizes, dim=1), parts, strict=True):
                tile.add(frames_CTHW, part_CTHW, scale)
        yield from video_CTHW.clamp_(-1, 1).split(sizes, dim=1)

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


def _equal(before: list[Tensor | None], after: list[Tensor | None]) -> bool:
    return all(
        a is b or (a is not None and b is not None and torch.equal(a, b)) for a, b in zip(before, after, strict=True)
    )


def _run(layers: list[nn.Module], x_BCTHW: Tensor, stream: Stream | None = None) -> Tensor:
    x_BCTHW = x_BCTHW.contiguous(memory_format=torch.channels_last_3d)
    for layer in layers:
        x_BCTHW = layer(x_BCTHW, stream)
    return x_BCTHW
