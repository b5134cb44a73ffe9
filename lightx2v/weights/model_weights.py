"""A model's weights as they will be used: renamed, LoRAs merged, quantised. One tensor at a time, nothing kept.

    weights = ModelWeights(checkpoint, names, matrix=is_expert_matrix, loras=[...], quantise=torch.float8_e4m3fn)
    weights.shapes, weights.dtypes          what will come out, known from the headers
    for name, tensor in weights.tensors():  made while it is read

What has no LoRA and is not quantised comes as it is stored. A tensor that a LoRA changes is added up in float32 and
rounded once, to what is asked for; a quantised one is dequantised for that and quantised again in its own format.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from ..errors import CheckpointError, short_path
from .checkpoint import Checkpoint
from .lora import MatchedLora
from .quantization import SCALE, QuantLayout, check_scale, cosine, dequantise, quantise, read_layout
from .tensor_file import FLOATS

ROWS = 256
"""Of a weight that a LoRA is added to: 5 MB of float32 at full width."""

IsMatrix = Callable[[str, tuple[int, ...]], bool]


class ModelWeights:
    """`names` maps the file's names to Wan's. `matrix` tells which weights may be quantised; `quantise` makes them so.

    Quantised weights outside of `matrix`, which some programs write, come out in float32.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        names: Mapping[str, str],
        *,
        matrix: IsMatrix,
        loras: Sequence[MatchedLora] = (),
        quantise: torch.dtype | None = None,
    ) -> None:
        self.checkpoint = checkpoint
        self.source = short_path(checkpoint.path)
        self.file_names = {ours: name for name, ours in names.items()}
        self.layout: QuantLayout = read_layout(
            {ours: checkpoint.shapes[name] for name, ours in names.items()},
            {ours: checkpoint.dtypes[name] for name, ours in names.items()},
            self.source,
        )
        self.loras = tuple(loras)
        self._matrix, self._quantise = matrix, quantise
        self.fidelity: dict[str, float] | None = None
        """Where to note, if anywhere, the cosine of each weight that is quantised to what it was."""
        helpers = {*self.layout.scales.values(), *self.layout.extras}
        self.plain_shapes = {
            ours: checkpoint.shapes[name] for ours, name in self.file_names.items() if ours not in helpers
        }
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, torch.dtype] = {}
        self.formats: dict[str, torch.dtype] = {}
        for ours, shape in self.plain_shapes.items():
            stored = checkpoint.dtypes[self.file_names[ours]]
            wanted = stored if ours in self.layout.scales else quantise if stored in FLOATS else None
            self.shapes[ours] = shape
            if wanted is not None and matrix(ours, shape):
                self.formats[ours] = self.dtypes[ours] = wanted
                scale = scale_name(ours)
                self.shapes[scale], self.dtypes[scale] = (shape[0], 1), torch.float32
            else:
                touched = ours in self.layout.scales or any(ours in lora.patches for lora in loras)
                self.dtypes[ours] = torch.float32 if touched else stored

    def with_loras(self, loras: Sequence[MatchedLora]) -> ModelWeights:
        """The same weights with these LoRAs merged instead of the present ones."""
        names = {name: ours for ours, name in self.file_names.items()}
        return ModelWeights(self.checkpoint, names, matrix=self._matrix, loras=loras, quantise=self._quantise)

    @property
    def quantised(self) -> bool:
        return bool(self.formats)

    def tensors(
        self,
        names: Container[str] | None = None,
        *,
        dtype_of: Callable[[str], torch.dtype] | None = None,
        device: torch.device | str = "cpu",
    ) -> Iterator[tuple[str, Tensor]]:
        """(name, tensor) of all weights, or of those in `names`, in the order they lie on disk.

        `dtype_of` casts, while they are read, what is not quantised; without it sums come in float32. What is made is
        made on `device`; all comes there where that is not the CPU.
        """
        passing = torch.device(device).type != "cpu"

        def cast(name: str) -> torch.dtype:
            ours = by_file[name]
            stored = self.checkpoint.dtypes[name]
            return stored if dtype_of is None or self.is_modified(ours) else dtype_of(ours)

        by_file = {self.file_names[ours]: ours for ours in self.plain_shapes if names is None or ours in names}
        for name, tensor in self.checkpoint.tensors(by_file, dtype_of=cast, passing=passing):
            ours = by_file[name]
            if not self.is_modified(ours):
                yield ours, tensor.to(device)
                continue
            wanted = torch.float32 if dtype_of is None else dtype_of(ours)
            parts = self._make(ours, tensor.to(device), wanted)
            del tensor
            yield from parts

    def order(self) -> list[str]:
        """The names of the weights, without scales, in the order they lie on disk."""
        ours = {self.file_names[name]: name for name in self.plain_shapes}
        entries = (sorted(file.entries, key=lambda name: file.entries[name].start) for file in self.checkpoint.files)
        return [ours[name] for names in entries for name in names if name in ours]

    def parts(
        self, name: str, dtype_of: Callable[[str], torch.dtype], *, device: torch.device | str = "cpu"
    ) -> Iterator[tuple[str, Tensor]]:
        """One weight, and its scale where it has one, in the dtypes that are asked for.

        What is not made here comes flat and in pieces, so that the text encoder's table of 2 GB takes no memory.
        """
        file_name = self.file_names[name]
        if not self.is_modified(name):
            yield from ((name, piece) for piece in self.checkpoint.chunks(file_name, dtype_of(name)))
            return
        yield from self._make(name, self.checkpoint.tensor(file_name).to(device), dtype_of(name))

    def is_modified(self, name: str) -> bool:
        """Whether this weight is changed, or quantised, or was; else it comes as it is stored."""
        return name in self.formats or name in self.layout.scales or any(name in lora.patches for lora in self.loras)

    def _make(self, name: str, tensor: Tensor, dtype: torch.dtype) -> list[tuple[str, Tensor]]:
        """The weight, in `dtype` unless it is quantised; then its scale too."""
        loras = [lora for lora in self.loras if name in lora.patches]
        if name in self.layout.scales:
            scale = self.layout.scales[name]
            stored = self.checkpoint.tensor(self.file_names[scale])
            scale_O1 = check_scale(stored, tensor.shape[0], scale, self.source).to(tensor.device)
            if name in self.formats and not loras:
                return [(name, tensor), (scale_name(name), scale_O1)]
            tensor = dequantise(tensor, scale_O1)
        if name not in self.formats:
            return [(name, add_loras(tensor, name, loras, dtype))]
        if loras:
            tensor = add_loras(tensor, name, loras, torch.float32)
        try:
            q_OI, scale_O1 = quantise(tensor, self.formats[name])
        except ValueError as error:
            raise CheckpointError(f"{self.source}: {name} cannot be quantised, {error}.") from None
        if self.fidelity is not None:
            self.fidelity[name] = cosine(tensor, q_OI, scale_O1)
        return [(name, q_OI), (scale_name(name), scale_O1)]


def add_loras(tensor: Tensor, name: str, loras: Sequence[MatchedLora], dtype: torch.dtype) -> Tensor:
    """The sum of a weight, which may be overwritten, and all that the LoRAs add to it, made in float32 at least.

    On a CPU some rows at a time: the wide copies stay in its cache, and are no memory.
    """
    wide = torch.promote_types(tensor.dtype, torch.float32)
    changes = [lora.change(name, tensor.device, wide) for lora in loras]
    if not changes or not tensor.dim():
        return tensor.to(dtype)
    result = torch.empty_like(tensor, dtype=dtype)
    rows = ROWS if tensor.device.type == "cpu" else len(tensor)
    for start in range(0, len(tensor), max(rows, 1)):
        part = tensor[start : start + rows].to(wide)
        for change in changes:
            change.add_to(part, start)
        result[start : start + rows] = part
    return result


def scale_name(weight: str) -> str:
    return weight.removesuffix(".weight") + SCALE
