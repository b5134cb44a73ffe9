"""Broadcast of tensors that rank 0 makes or reads: weights, LoRAs, prompts and input images.

Small tensors travel in bundles and large ones alone: a model has a thousand small tensors, and each exchange costs
time. Nothing is held longer than its bundle, so host memory and file reads do not grow with the number of processes.
"""

import math
from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import errors
from ..errors import LightX2VError
from ..progress import CancelToken
from .collectives import Collectives

BUNDLE, ALIGN = 8 << 20, 16
"""Bytes of a bundle, and of the steps at which its tensors begin, so that each can be viewed as any dtype."""

TensorStream = Iterable[tuple[str, Tensor]]


def broadcast_stream(
    collectives: Collectives, device: torch.device, tensors: TensorStream, cancel: CancelToken | None = None
) -> Iterator[tuple[str, Tensor]]:
    """Yield (name, tensor) as rank 0 reads them, on every rank's `device`. Other ranks never start their `tensors`.

    An error that stops rank 0 is raised on every rank.
    """
    if collectives.rank:
        while (header := collectives.broadcast_json(None)) is not None:
            if isinstance(header, dict):
                raise error_from_json(header)
            yield from _receive(collectives, device, header)
        return
    bundles = _bundles(tensors, cancel)
    while True:
        try:
            bundle = next(bundles, None)
            placed = [(name, tensor.to(device)) for name, tensor in bundle or ()]
            flat = [tensor.contiguous().reshape(-1).view(torch.uint8) for _, tensor in placed]
            if len(flat) > 1:
                flat = [torch.cat([F.pad(raw, (0, -raw.numel() % ALIGN)) for raw in flat])]
        except BaseException as error:
            collectives.broadcast_json(error_to_json(error))
            raise
        if not flat:
            break
        collectives.broadcast_json([[name, list(t.shape), str(t.dtype).removeprefix("torch.")] for name, t in placed])
        collectives.broadcast(flat[0])
        del bundle, flat
        yield from placed
    collectives.broadcast_json(None)


def _receive(collectives: Collectives, device: torch.device, header: list[Any]) -> Iterator[tuple[str, Tensor]]:
    """Receive the tensors of one bundle; `header` is [name, shape, dtype] for each."""
    dtypes = [getattr(torch, dtype) for _, _, dtype in header]
    sizes = [math.prod(shape) * dtype.itemsize for (_, shape, _), dtype in zip(header, dtypes, strict=True)]
    places = sizes if len(header) == 1 else [size + -size % ALIGN for size in sizes]
    parts = collectives.broadcast(torch.empty(sum(places), dtype=torch.uint8, device=device)).split(places)
    for (name, shape, _), dtype, size, part in zip(header, dtypes, sizes, parts, strict=True):
        tensor = part[:size].view(dtype).view(shape)
        yield name, tensor if len(header) == 1 else tensor.clone()


def _bundles(tensors: TensorStream, cancel: CancelToken | None) -> Iterator[list[tuple[str, Tensor]]]:
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


def error_to_json(error: BaseException) -> dict[str, str]:
    """An error as JSON, for the other processes."""
    return {"error": type(error).__name__, "message": str(error)}


def error_from_json(message: dict[str, str]) -> LightX2VError:
    """The error that `error_to_json` wrote. An error that is not one of ours becomes a plain LightX2VError."""
    kind = getattr(errors, message["error"], None)
    if isinstance(kind, type) and issubclass(kind, LightX2VError):
        return kind(message["message"])
    return LightX2VError(f"{message['error']} on process 0: {message['message']}")
