"""ValueCheck: finds weights that are all zero, constant, NaN or infinite while they are loaded.

A file with a hole where a download stopped, or with NaN, loads like any other and makes a video of noise. The smallest
and the largest value of a tensor find all of these. In host memory the threads that read look at each part as they have
it, in their cache; on an accelerator the results are fetched once, at the end.
"""

import threading
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from ..errors import CheckpointError
from .device_checks import DeviceChecks
from .tensor_file import FLOATS

_CODES = {torch.float8_e4m3fn: 0x7F, torch.float8_e5m2: 0x7C}
"""The first code that is no finite number, without its sign."""
_WHOLE = (torch.int8, torch.uint8)
_WHOLE_NUMBERS = {
    torch.float64: (torch.int64, np.uint64),
    torch.float32: (torch.int32, np.uint32),
    torch.float16: (torch.int16, np.uint16),
    torch.bfloat16: (torch.int16, np.uint16),
    **dict.fromkeys(_CODES, (torch.int8, np.uint8)),
    torch.int8: (torch.int8, np.uint8),
}
"""The whole numbers of the same size, with a sign for torch and without one for numpy, by dtype. The bits of floats in
their order are such numbers: positive ones grow with them, negative ones shrink."""


@dataclass(slots=True)
class _Looked:
    """How many values of a tensor were looked at, and their extremes as whole numbers with a sign and without one."""

    count: int
    least: int
    most: int
    most_unsigned: int


class ValueCheck:
    """`see` each tensor, then `finish`. `source` is the file's name for messages.

    Any thread may `look` at parts of a tensor before it is seen.
    """

    def __init__(self, source: str) -> None:
        self.source = source
        self._checks = DeviceChecks()
        self._looked: dict[str, _Looked] = {}
        self._lock = threading.Lock()

    def look(self, name: str, part: Tensor) -> None:
        """Look at a part of a tensor in host memory, with one thread: torch would start others."""
        kinds = _WHOLE_NUMBERS.get(part.dtype)
        if kinds is None or not part.numel():
            return
        signed = part.view(kinds[0]).numpy()
        found = _Looked(part.numel(), int(signed.min()), int(signed.max()), int(signed.view(kinds[1]).max()))
        with self._lock:
            seen = self._looked.setdefault(name, found)
            if seen is not found:
                seen.count += found.count
                seen.least, seen.most = min(seen.least, found.least), max(seen.most, found.most)
                seen.most_unsigned = max(seen.most_unsigned, found.most_unsigned)

    def see(self, name: str, tensor: Tensor) -> None:
        """CheckpointError for a bad tensor in host memory; one elsewhere is looked at in `finish`."""
        if not tensor.numel() or tensor.is_meta or tensor.dtype not in (*FLOATS, *_CODES, *_WHOLE):
            return
        dims = sum(side > 1 for side in tensor.shape)
        looked = self._looked.pop(name, None)
        if looked is not None and looked.count == tensor.numel() and tensor.is_cpu:
            self._judge(name, tensor.dtype, dims, _ends(looked, tensor.dtype))
            return
        self._checks.ask(_extremes(tensor), partial(self._judge, name, tensor.dtype, dims))

    def finish(self) -> None:
        """Judge the tensors that are not in host memory."""
        self._checks.finish()

    def _judge(self, name: str, dtype: torch.dtype, dims: int, extremes: list[float]) -> None:
        low, high = extremes
        limit = _CODES.get(dtype)
        if limit is not None:
            bad, same = high >= limit or low >= limit + 0x80, False
            zero = (low, high) == (0, 0)
        else:
            bad = not (abs(low) < float("inf") and abs(high) < float("inf"))
            zero, same = low == high == 0, low == high and dims > 1
        if bad:
            raise CheckpointError(
                f"{self.source}: {name} holds NaN or infinity (as {str(dtype).removeprefix('torch.')}). "
                "The file is damaged: download it again."
            )
        if dims and (zero and not name.endswith("bias") or same):
            what = "zero" if zero else f"{low:g}"
            raise CheckpointError(
                f"{self.source}: every value of {name} is {what}. The file is damaged: download it again."
            )


def _extremes(tensor: Tensor) -> tuple[Tensor, Tensor]:
    """Smallest and largest; NaN where one is among them. Of float8 the largest code as uint8 and as int8."""
    if tensor.dtype in _CODES:
        return tensor.view(torch.uint8).amax(), tensor.view(torch.int8).amax()
    return torch.aminmax(tensor)


def _ends(looked: _Looked, dtype: torch.dtype) -> list[float]:
    """What `_extremes` finds, from the bits."""
    if dtype in _CODES:
        return [looked.most_unsigned, looked.most]
    if dtype is torch.int8:
        return [looked.least, looked.most]
    kind = _WHOLE_NUMBERS[dtype][0]
    half = 1 << (8 * dtype.itemsize - 1)
    low = looked.most_unsigned - 2 * half if looked.most_unsigned >= half else looked.least
    high = looked.most if looked.most >= 0 else looked.least
    return torch.tensor([low, high], dtype=kind).view(dtype).tolist()
