"""The architecture of a VAE, read from its checkpoint."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..errors import CheckpointError

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
