"""SideBranch: LoRAs that run beside a linear layer, whose weights stay as they are."""

from collections.abc import Mapping

import torch.nn.functional as F
from torch import Tensor, nn


class SideBranch:
    """A forward hook that adds x · (Σ up · down)^T to a layer's output, and the products of LoKr, times `share`."""

    def __init__(self, parts: Mapping[str, Tensor], share: float) -> None:
        self.share = share
        self._down, self._up, self._delta = (parts.get(name) for name in ("down", "up", "delta"))
        self._factors = [(parts[f"w1.{name[3:]}"], w2) for name, w2 in parts.items() if name.startswith("w2.")]

    def __call__(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        if not self.share:
            return output
        x = inputs[0]
        if self._down is not None and self._up is not None:
            rows_MR = F.linear(x.to(self._down.dtype), self._down).flatten(0, -2)
            output.view(-1, output.shape[-1]).addmm_(rows_MR, self._up, alpha=self.share)
        for w1_AB, w2_CD in self._factors:
            x_MBD = x.to(w2_CD.dtype).reshape(-1, w1_AB.shape[1], w2_CD.shape[1])
            product_MAC = F.linear(F.linear(x_MBD, w2_CD).mT, w1_AB).mT
            output.view(product_MAC.shape).add_(product_MAC, alpha=self.share)
        if self._delta is not None:
            output.add_(F.linear(x.to(self._delta.dtype), self._delta), alpha=self.share)
        return output
