"""A pool of encoded clips on the device: the training data of the diffusion transformers.

Encoding is the slow part, so the pool is kept in a file next to the runs, and later stages on the same machine reuse
it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from lightx2v.models.vae import WanVAE

from .vae import autocast, load_vae, to_layout
from .world import FRAMES, SIZE, Clips, place_clips, render, sample_clips


@dataclass(frozen=True, kw_only=True)
class Pool:
    """N clips: latents N,16,5,12,12 float16, latents of (first frame, then grey) likewise or None, combinations N."""

    latents: Tensor
    images: Tensor | None
    combination: Tensor

    def __len__(self) -> int:
        return len(self.combination)


@torch.no_grad()
def encode(vae: WanVAE, video: Tensor) -> Tensor:
    if video.is_cuda:
        video = video.contiguous(memory_format=torch.channels_last_3d)
    with autocast(video.device):
        return vae.encode_clip(video)[0]


@torch.no_grad()
def decode(vae: WanVAE, latents: Tensor, batch: int = 64) -> Tensor:
    """Video in [-1, 1]."""
    with autocast(latents.device):
        return torch.cat([vae.decode_clip(part).clamp(-1, 1) for part in latents.float().split(batch)])


def first_frame_only(video: Tensor) -> Tensor:
    """The clip that image-to-video encodes."""
    alone = torch.zeros_like(video)
    alone[:, :, 0] = video[:, :, 0]
    return alone


def condition(images: Tensor) -> Tensor:
    """B,20,T,h,w: the mask that marks the given frame, then the latents of the image."""
    mask = torch.zeros_like(images[:, :4])
    mask[:, :, 0] = 1
    return torch.cat([mask, images], dim=1)


def open_vae(path: Path, device: torch.device) -> WanVAE:
    vae = load_vae(path, device).requires_grad_(False)
    to_layout(vae, device.type == "cuda")
    return vae


def make_pool(
    vae: WanVAE, count: int, seed: int, device: torch.device, *, images: bool, latents: Tensor | None, batch: int = 128
) -> Pool:
    """The same seed gives the same clips. `latents` that are known are not computed again."""
    clips = sample_clips(count, torch.Generator().manual_seed(seed), split="train")
    shape = (count, 16, 5, 12, 12)
    whole = torch.empty(shape, dtype=torch.float16, device=device) if latents is None else latents
    alone = torch.empty(shape, dtype=torch.float16, device=device) if images else None
    for start in range(0, count, batch):
        part = clips[start : start + batch]
        if latents is None:
            whole[start : start + batch] = encode(vae, render(part, device=device)).half()
        if alone is not None:
            still = torch.zeros(len(part), 3, FRAMES, SIZE, SIZE, device=device)
            still[:, :, :1] = render(part, 1, device=device)
            alone[start : start + batch] = encode(vae, still).half()
    return Pool(latents=whole, images=alone, combination=clips.combination.to(device))


def open_pool(
    vae_path: Path,
    cache: Path,
    count: int,
    seed: int,
    device: torch.device,
    *,
    images: bool,
    say: Callable[[str], None],
) -> Pool:
    """The pool of this VAE, from the cache if possible."""
    stamp = hashlib.sha256(vae_path.read_bytes()).hexdigest()[:12]
    plain, with_images = (cache / f"pool_{stamp}_{count}_{seed}{end}.pt" for end in ("", "_images"))
    wanted = with_images if images else plain
    if wanted.exists():
        say(f"pool from {wanted.name}")
        return Pool(**torch.load(wanted, map_location=device, weights_only=True))
    latents = torch.load(plain, map_location=device, weights_only=True)["latents"] if plain.exists() else None
    pool = make_pool(open_vae(vae_path, device), count, seed, device, images=images, latents=latents)
    say(f"pool of {count} clips: mean {pool.latents.float().mean():.3f} deviation {pool.latents.float().std():.3f}")
    cache.mkdir(parents=True, exist_ok=True)
    torch.save({"latents": pool.latents, "images": pool.images, "combination": pool.combination}, wanted)
    return pool


@torch.no_grad()
def test_set(vae: WanVAE, combination: Tensor, seed: int, device: torch.device) -> tuple[Clips, Tensor, Tensor]:
    """Clips of these combinations, their first frames B,3,H,W and the latents that image-to-video gets."""
    clips = place_clips(combination, torch.Generator().manual_seed(seed))
    video = render(clips, device=device)
    images = torch.cat([encode(vae, first_frame_only(part)) for part in video.split(64)])
    return clips, video[:, :, 0], images
