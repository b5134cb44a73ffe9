"""Runs of the tiny models."""

from __future__ import annotations

import torch

from lightx2v.config.request import Request
from lightx2v.pipeline import LightX2VPipeline


def latents(pipe: LightX2VPipeline, request: Request) -> torch.Tensor:
    result = pipe.run(request, return_latents=True)
    assert result.latents is not None
    return result.latents
