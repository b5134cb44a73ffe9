"""Sample whole batches of clips with the engine's schedules and solvers, for tests during training."""

from __future__ import annotations

import torch
from torch import Tensor

from lightx2v.models.dit import WanDiT
from lightx2v.models.vae import WanVAE
from lightx2v.sampling import Euler, Schedule, UniPC, shifted_schedule, step_list_schedule

from .detector import detect
from .latents import condition, decode
from .model import LATENT
from .vae import autocast
from .world import Clips

Experts = dict[str, WanDiT]
BOUNDARY = {"t2v": 0.875, "i2v": 0.9}
SHIFT = {"t2v": 12.0, "i2v": 5.0}
GUIDANCE = {"t2v": (4.0, 3.0), "i2v": (3.5, 3.5)}
STEP_LIST = (1000, 750, 500, 250)
DISTILL = step_list_schedule(STEP_LIST, 5.0, 2)


def noise(count: int, device: torch.device, seed: int) -> Tensor:
    return torch.randn((count, *LATENT), generator=torch.Generator().manual_seed(seed)).to(device)


def velocity(dit: WanDiT, latents: Tensor, timestep: float | Tensor, text: Tensor, given: Tensor | None) -> Tensor:
    """One forward without gradients, with the arithmetic of training: residuals are not written in place."""
    times = torch.as_tensor(timestep, dtype=torch.float32, device=latents.device).expand(len(latents))
    with autocast(latents.device):
        return dit.forward_batch(latents, times, text, given)


@torch.no_grad()
def guided(
    dit: WanDiT, latents: Tensor, timestep: float, text: Tensor, empty: Tensor, given: Tensor | None, scale: float
) -> Tensor:
    conditional = velocity(dit, latents, timestep, text, given)
    if scale == 1:
        return conditional
    unconditional = velocity(dit, latents, timestep, empty, given)
    return unconditional + scale * (conditional - unconditional)


@torch.no_grad()
def sample_base(
    experts: Experts,
    latents: Tensor,
    text: Tensor,
    empty: Tensor,
    images: Tensor | None = None,
    *,
    steps: int = 20,
    shift: float,
    boundary: float,
    guidance: tuple[float, float],
) -> Tensor:
    schedule = shifted_schedule(steps, shift, boundary)
    given = None if images is None else condition(images)
    solver = UniPC(schedule)
    for i in range(schedule.steps):
        expert = schedule.experts[i]
        scale = guidance[0] if expert == "high" else guidance[1]
        v = guided(experts[expert], latents, schedule.timesteps[i], text, empty, given, scale)
        latents = solver.step(v, i, latents)
    return latents


@torch.no_grad()
def sample_distilled(
    experts: Experts, latents: Tensor, text: Tensor, images: Tensor | None = None, *, schedule: Schedule = DISTILL
) -> Tensor:
    given = None if images is None else condition(images)
    solver = Euler(schedule)
    for i in range(schedule.steps):
        v = velocity(experts[schedule.experts[i]], latents, schedule.timesteps[i], text, given)
        latents = solver.step(v, i, latents)
    return latents


def judge(
    vae: WanVAE, latents: Tensor, clips: Clips, held_out: Tensor, first_frames: Tensor | None = None
) -> dict[str, float]:
    """Detector scores of generated clips, separately for seen and held-out combinations; dB of the first frame if
    given."""
    video = decode(vae, latents)
    readings = [detect(part) for part in video.split(64)]
    right = [reading.matches(clips[i * 64 : (i + 1) * 64]) for i, reading in enumerate(readings)]
    joined = {name: torch.cat([part[name] for part in right]).float() for name in right[0]}
    result = {name: value.mean().item() for name, value in joined.items()}
    sharp = [reading.crispness(clips[i * 64 : (i + 1) * 64]) for i, reading in enumerate(readings)]
    result["outline"] = torch.cat(sharp).mean().item()
    result["seen"] = joined["all"][~held_out].mean().item()
    result["held_out"] = joined["all"][held_out].mean().item()
    if first_frames is not None:
        error = ((video[:, :, 0] - first_frames) / 2).square().flatten(1).mean(1).clamp(min=1e-10)
        result["first_dB"] = (-10 * error.log10()).mean().item()
    return result


def describe(result: dict[str, float]) -> str:
    return " ".join(f"{name} {value:.3f}" for name, value in result.items())
