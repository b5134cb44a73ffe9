"""Runs of the tiny models."""

from __future__ import annotations

import torch

from lightx2v.config.request import Request
from lightx2v.models.dit import WanDiT
from lightx2v.pipeline import LightX2VPipeline


def latents(pipe: LightX2VPipeline, request: Request) -> torch.Tensor:
    result = pipe.run(request, return_latents=True)
    assert result.latents is not None
    return result.latents


def experts(pipe: LightX2VPipeline) -> list[WanDiT]:
    """Both experts of a model that stays on its device, high noise first."""
    placement, found = pipe._loaded().placement, []
    for which in ("high", "low"):
        with placement.expert(which) as dit:  # type: ignore[arg-type]
            found.append(dit)
    return found
