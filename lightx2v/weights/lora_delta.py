"""Deltas: what a LoRA's tensors add to one tensor of the model, in each of the forms that files have.

    Pair         scale * up @ down
    Difference   scale * difference
    Kronecker    scale * kron(w1, w2)                            LoKr
    Hadamard     scale * (w1_a @ w1_b) * (w2_a @ w2_b)           LoHa
    Dora         strength * (magnitude * V / |V| - W), where V = W + an inner delta

`add_to(rows, start)` adds in place to some rows of the tensor. Only Dora looks at the weights W themselves: `measure`
sees the whole tensor first, and `add_to` the rows before any delta was added.

Formulas: LyCORIS (arXiv:2309.14859) and DoRA (arXiv:2402.09353).
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Self

import torch
from torch import Tensor

EPS = torch.finfo(torch.float32).eps


Rows = Callable[[int], Tensor]
"""The unchanged weights from a row on, a fixed number of rows, in float32 or wider."""


class Delta:
    """The common part: a factor, and what `add_deltas` calls."""

    scale: float

    def to(self, device: torch.device, dtype: torch.dtype) -> Self:
        """The same with its tensors on `device` in `dtype`."""
        parts = {field.name: getattr(self, field.name) for field in fields(self)}  # type: ignore[arg-type]
        for name, part in parts.items():
            if isinstance(part, Delta):
                parts[name] = part.to(device, dtype)
            elif isinstance(part, Tensor):
                parts[name] = part.to(device, non_blocking=True).to(dtype)
        return type(self)(**parts)

    def measure(self, rows_from: Rows, shape: Sequence[int], rows: int) -> None:
        """Look at the unchanged tensor, `rows` at a time."""

    def add_to(self, rows: Tensor, start: int = 0, base: Tensor | None = None) -> None:
        """Add it in place to some rows of the tensor, of which `start` is the first and `base` the unchanged values."""
        raise NotImplementedError


def add_deltas(deltas: Sequence[Delta], rows_from: Rows, result: Tensor, rows: int) -> Iterator[Tensor]:
    """Write the weights with all `deltas` into `result`, which rounds them once. Yields each part as it is written."""
    for delta in deltas:
        delta.measure(rows_from, result.shape, rows)
    keeps_base = any(isinstance(delta, Dora) for delta in deltas)
    for start in range(0, len(result), rows):
        base = rows_from(start)
        part = base.clone() if keeps_base else base
        for delta in deltas:
            delta.add_to(part, start, base)
        result[start : start + rows] = part
        yield result[start : start + rows]


@dataclass(slots=True)
class Pair(Delta):
    up_OR: Tensor
    down_RI: Tensor
    scale: float

    def add_to(self, rows: Tensor, start: int = 0, base: Tensor | None = None) -> None:
        up = self.up_OR[start : start + len(rows)]
        rows.view(len(rows), -1).addmm_(up, self.down_RI, alpha=self.scale)


@dataclass(slots=True)
class Difference(Delta):
    values: Tensor
    scale: float

    def add_to(self, rows: Tensor, start: int = 0, base: Tensor | None = None) -> None:
        part = self.values.reshape(-1, *rows.shape[1:])[start : start + len(rows)]
        rows.add_(part, alpha=self.scale)


@dataclass(slots=True)
class Kronecker(Delta):
    w1_AB: Tensor
    w2_CD: Tensor
    scale: float

    def add_to(self, rows: Tensor, start: int = 0, base: Tensor | None = None) -> None:
        index = torch.arange(start, start + len(rows), device=rows.device)
        left, right = self.w1_AB[index // len(self.w2_CD)], self.w2_CD[index % len(self.w2_CD)]
        rows.view(len(rows), -1).add_((left[:, :, None] * right[:, None, :]).flatten(1), alpha=self.scale)


@dataclass(slots=True)
class Hadamard(Delta):
    w1_a_OR: Tensor
    w1_b_RI: Tensor
    w2_a_OR: Tensor
    w2_b_RI: Tensor
    scale: float

    def add_to(self, rows: Tensor, start: int = 0, base: Tensor | None = None) -> None:
        some = slice(start, start + len(rows))
        first, second = self.w1_a_OR[some] @ self.w1_b_RI, self.w2_a_OR[some] @ self.w2_b_RI
        rows.view(len(rows), -1).add_(first.mul_(second), alpha=self.scale)


@dataclass(slots=True)
class Dora(Delta):
    """`magnitude` has one value per output, or with `per_input` one per input channel, as LyCORIS may write it."""

    inner: Delta
    magnitude: Tensor
    per_input: bool
    scale: float
    norm_I: Tensor | None = None

    def measure(self, rows_from: Rows, shape: Sequence[int], rows: int) -> None:
        if not self.per_input:
            return
        total = self.magnitude.new_zeros(shape[1])
        for start in range(0, shape[0], rows):
            part = self._sum(rows_from(start), start)
            total += part.view(len(part), len(total), -1).square().sum((0, 2))
        self.norm_I = total.sqrt()

    def add_to(self, rows: Tensor, start: int = 0, base: Tensor | None = None) -> None:
        assert base is not None, "DoRA needs the unchanged weights"
        total = self._sum(base, start)
        if self.norm_I is not None:
            factors = (self.magnitude / (self.norm_I + EPS)).view(1, -1, *[1] * (rows.dim() - 2))
        else:
            norm_O = total.flatten(1).norm(dim=1)
            factors = self.magnitude[start : start + len(rows)] / (norm_O + EPS)
            factors = factors.view(-1, *[1] * (rows.dim() - 1))
        rows.add_(total.mul_(factors).sub_(base), alpha=self.scale)

    def _sum(self, base: Tensor, start: int) -> Tensor:
        total = base.clone()
        self.inner.add_to(total, start)
        return total


def contracted(core: Tensor, a_RO: Tensor, b_RI: Tensor) -> Tensor:
    """LyCORIS' Tucker form of a convolution's weight: core [R, R, ...] with its two sides, flat to [O, ...]."""
    return torch.einsum("ij...,jr,ip->pr...", core, b_RI, a_RO).flatten(1)
