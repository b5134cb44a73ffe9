"""LCM: jump to x0, then add fresh noise down to the next noise level. The sampler that few-step models are trained for.

x0 = x - sigma v;  x' = (1 - sigma') x0 + sigma' noise. Multistep consistency sampling: Song et al. 2023, "Consistency
Models", algorithm 1, and Luo et al. 2023, "Latent Consistency Models", algorithm 3; here for rectified flow, as in
diffusers' FlowMatchLCMScheduler. LightX2V distils its 4-step models with DMD, whose students are trained on samples of
this kind (Yin et al. 2024, DMD2).
"""

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from ..config.schedule import Schedule


class LCM:
    """Draws the noise of step i on the CPU from a generator of its own: the same for a seed on every device, and after
    a restart."""

    def __init__(self, schedule: Schedule, seed: int) -> None:
        self.schedule = schedule
        self._seed = seed

    def step(self, velocity: Tensor, i: int, latents: Tensor) -> Tensor:
        here, there = self.schedule.sigmas[i : i + 2]
        x0 = torch.sub(latents, velocity, alpha=here)
        if there == 0:
            return x0
        noise = torch.randn(latents.shape, generator=self._generator(i), dtype=torch.float32)
        return ((1 - there) * x0).add_(noise.to(x0), alpha=there)

    def state(self) -> Mapping[str, Tensor]:
        """Nothing: a step depends on its latents, its number and the seed only."""
        return {}

    def restore(self, state: Mapping[str, Tensor], step: int) -> None:
        pass

    def _generator(self, i: int) -> torch.Generator:
        # SeedSequence mixes seed and step, so that no step repeats the initial noise of any seed that a person types.
        (mixed,) = np.random.SeedSequence((self._seed, i + 1)).generate_state(1)
        return torch.Generator("cpu").manual_seed(int(mixed))
