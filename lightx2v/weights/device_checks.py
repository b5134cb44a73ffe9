"""DeviceChecks: judge values that a device computes, fetched once for many tensors: each fetch waits for the device."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Judge = Callable[[list[float]], None]
"""Looks at a few numbers, and raises where they are wrong."""


class DeviceChecks:
    """`ask` for each tensor, then `finish`, which raises the first error."""

    def __init__(self) -> None:
        self._asked: list[tuple[Sequence[Tensor], Judge]] = []

    def ask(self, values: Sequence[Tensor], judge: Judge) -> None:
        """Have `judge` look at these numbers, which are tensors without dimensions: at once if they are in host memory
        and nothing waits, else in `finish`."""
        if not self._asked and all(value.is_cpu for value in values):
            judge([value.item() for value in values])
        else:
            self._asked.append((values, judge))

    def finish(self) -> None:
        asked, self._asked = self._asked, []
        waiting = [value for values, _ in asked for value in values]
        numbers = iter(torch.stack(waiting).tolist() if waiting else ())
        for values, judge in asked:
            judge([next(numbers) for _ in values])
