"""Tensors that rank 0 makes or reads, on every process: weights, LoRAs, prompts, pictures.

Small tensors travel together, large ones alone: a model has a thousand small ones, and an exchange takes its time.
Nothing is held longer than its bundle, so the host's memory and its reads do not grow with the number of processes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import errors
from ..errors import LightX2VError
from ..progress import CancelToken
from .collectives import Wire

BUNDLE, ALIGN = 8 << 20, 16

TensorStream = Iterable[tuple[str, Tensor]]


def feed(
    wire: Wire, device: torch.device, tensors: TensorStream, cancel: CancelToken | None = None
) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) as rank 0 reads them, on every process's `device`; the others' `tensors` are never begun.

    What stops rank 0 from reading is raised on every process.
    """
    if wire.rank:
        while (heads := wire.tell(None)) is not None:
            if isinstance(heads, dict):
                raise recall(heads)
            yield from _unpacked(wire, device, heads)
        return
    coming = bundles(tensors, cancel)
    while True:
        try:
            bundle = next(coming, None)
            placed = [(name, tensor.to(device)) for name, tensor in bundle or ()]
            flat = [tensor.contiguous().reshape(-1).view(torch.uint8) for _, tensor in placed]
            packed = flat[0] if len(flat) == 1 else torch.cat([padded(raw) for raw in flat]) if flat else None
        except BaseException as error:
            wire.tell(describe(error))
            raise
        if packed is None:
            break
        wire.tell([[name, list(t.shape), str(t.dtype).removeprefix("torch.")] for name, t in placed])
        wire.spread(packed)
        del bundle, flat, packed
        yield from placed
    wire.tell(None)


def _unpacked(wire: Wire, device: torch.device, heads: list[Any]) -> Iterator[tuple[str, Tensor]]:
    """The tensors of one bundle, received."""
    kinds = [getattr(torch, dtype) for _, _, dtype in heads]
    sizes = [math.prod(shape) * kind.itemsize for (_, shape, _), kind in zip(heads, kinds, strict=True)]
    places = sizes if len(heads) == 1 else [size + -size % ALIGN for size in sizes]
    parts = wire.spread(torch.empty(sum(places), dtype=torch.uint8, device=device)).split(places)
    for (name, shape, _), kind, size, part in zip(heads, kinds, sizes, parts, strict=True):
        tensor = part[:size].view(kind).view(shape)
        yield name, tensor if len(heads) == 1 else tensor.clone()


def bundles(tensors: TensorStream, cancel: CancelToken | None) -> Iterator[list[tuple[str, Tensor]]]:
    bundle, size = [], 0
    for name, tensor in tensors:
        if cancel is not None:
            cancel.check()
        nbytes = tensor.numel() * tensor.itemsize
        if bundle and size + nbytes > BUNDLE:
            yield bundle
            bundle, size = [], 0
        bundle.append((name, tensor))
        size += nbytes
    if bundle:
        yield bundle


def padded(raw: Tensor) -> Tensor:
    """Bytes up to a multiple of ALIGN, so that what follows them can be seen as any dtype."""
    return F.pad(raw, (0, -raw.numel() % ALIGN))


def describe(error: BaseException) -> dict[str, str]:
    """An error as JSON, for the other processes."""
    return {"error": type(error).__name__, "message": str(error)}


def recall(message: dict[str, str]) -> LightX2VError:
    """The error that `describe` was given; one that is not ours becomes a plain LightX2VError."""
    kind = getattr(errors, message["error"], None)
    if isinstance(kind, type) and issubclass(kind, LightX2VError):
        return kind(message["message"])
    return LightX2VError(f"{message['error']} on process 0: {message['message']}")
