"""Optimisation for all trainers: Muon for matrices, AdamW for the rest, a moving average of the weights, a clock.

Muon (Jordan et al. 2024): the momentum of a weight matrix is replaced by the nearest orthogonal matrix before the
step. Convolutions count as matrices outputs x (inputs * taps). It reaches a given reconstruction error in clearly
fewer steps than AdamW here.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable

import torch
from torch import Tensor, nn


class Muon(torch.optim.Optimizer):
    def __init__(self, params: Iterable[nn.Parameter], lr: float, momentum: float = 0.95, weight_decay: float = 0.0):
        super().__init__(list(params), {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        for group in self.param_groups:
            same_shape: dict[tuple[int, int], list[nn.Parameter]] = {}
            for parameter in group["params"]:
                if parameter.grad is not None:
                    same_shape.setdefault((len(parameter), parameter[0].numel()), []).append(parameter)
            for (rows, columns), parameters in same_shape.items():
                self._step_shape(group, rows, columns, parameters)

    def _step_shape(self, group: dict, rows: int, columns: int, parameters: list[nn.Parameter]) -> None:
        gradients = torch.stack([p.grad.reshape(rows, columns) for p in parameters])
        state = self.state[parameters[0]]
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(gradients)
        buffer = state["momentum"].lerp_(gradients, 1 - group["momentum"])
        update = orthogonalise(gradients.lerp(buffer, group["momentum"])) * max(1.0, rows / columns) ** 0.5
        if group["weight_decay"]:
            torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
        updates = [u.reshape(p.shape).to(p.dtype) for u, p in zip(update, parameters, strict=True)]
        torch._foreach_add_(parameters, updates, alpha=-group["lr"])


def orthogonalise(matrices: Tensor, steps: int = 5) -> Tensor:
    """About U V' of each matrix of a batch, by a quintic Newton-Schulz iteration in bfloat16 (float32 on the CPU)."""
    x = matrices.bfloat16() if matrices.is_cuda else matrices.float()
    tall = x.shape[-2] > x.shape[-1]
    if tall:
        x = x.mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return (x.mT if tall else x).float()


class Average:
    """Exponential moving average of a module's weights, warm from the first step."""

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay = decay
        self.steps = 0
        self.weights = {name: p.detach().clone().float() for name, p in module.named_parameters()}

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        self.steps += 1
        decay = min(self.decay, (1 + self.steps) / (10 + self.steps))
        mine = list(self.weights.values())
        torch._foreach_lerp_(mine, [p.detach() for p in module.parameters()], 1 - decay)

    @torch.no_grad()
    def copy_to(self, module: nn.Module) -> None:
        for name, parameter in module.named_parameters():
            parameter.copy_(self.weights[name])


class Clock:
    """The progress of a run, 0..1: by steps if their number is given, or else by minutes. Schedules follow it."""

    def __init__(self, minutes: float, steps: int | None = None) -> None:
        self.seconds = 60 * minutes
        self.steps = steps
        self.step = 0
        self.born = self.start = time.perf_counter()

    def restart(self) -> None:
        """Start the schedule now, with the time that is left (after compiling, for example)."""
        self.seconds -= self.elapsed
        self.start = time.perf_counter()

    @property
    def total(self) -> float:
        return time.perf_counter() - self.born

    @property
    def elapsed(self) -> float:
        return time.perf_counter() - self.start

    def tick(self) -> None:
        self.step += 1

    @property
    def progress(self) -> float:
        return min(1.0, self.step / self.steps if self.steps else self.elapsed / self.seconds)

    @property
    def done(self) -> bool:
        return self.progress >= 1.0

    def every(self, seconds: float) -> Timer:
        return Timer(self, seconds)


class Timer:
    """True once per interval of seconds."""

    def __init__(self, clock: Clock, seconds: float) -> None:
        self.clock, self.seconds, self.last = clock, seconds, clock.elapsed

    def due(self) -> bool:
        if self.clock.elapsed - self.last < self.seconds:
            return False
        self.last = self.clock.elapsed
        return True


def learning_rate(progress: float, *, warmup: float = 0.01, flat: float = 0.3, floor: float = 0.01) -> float:
    """Factor of the peak rate: linear warm-up, a plateau, a cosine down to `floor`."""
    if progress < warmup:
        return max(progress / warmup, 0.02)
    if progress < flat:
        return 1.0
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * (progress - flat) / (1 - flat)))


class Optimizers:
    """Several optimisers as one; their peak rates are scaled together."""

    def __init__(self, *optimizers: torch.optim.Optimizer) -> None:
        self.optimizers = optimizers
        self.peaks = [[group["lr"] for group in optimizer.param_groups] for optimizer in optimizers]

    def step(self, factor: float) -> None:
        for optimizer, peaks in zip(self.optimizers, self.peaks, strict=True):
            for group, peak in zip(optimizer.param_groups, peaks, strict=True):
                group["lr"] = peak * factor
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
