"""A model's weights as they will be used: renamed, LoRAs merged, quantised. One tensor at a time, nothing kept.

    weights = ModelWeights(checkpoint, names, matrix=is_expert_matrix, loras=[...], quantise=torch.float8_e4m3fn)
    weights.shapes, weights.dtypes          what will come out, known from the headers
    for name, tensor in weights.tensors():  made while it is read

What has no LoRA and is not quantised comes as it is stored. A tensor that a LoRA changes is added up in float32 and
leaves in float32, so it is rounded once, by whoever takes it; a quantised one is dequantised for that and quantised
again in its own format.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from ..errors import CheckpointError, short_path
from .checkpoint import Checkpoint
from .lora import Lora
from .quant import SCALE, Layout, check_scale, cosine, dequantise, quantise, read_layout
from .safetensors_file import FLOATS

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
        loras: Sequence[Lora] = (),
        quantise: torch.dtype | None = None,
    ) -> None:
        self.checkpoint = checkpoint
        self.source = short_path(checkpoint.path)
        self.file_names = {ours: name for name, ours in names.items()}
        self.layout: Layout = read_layout(
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

    def with_loras(self, loras: Sequence[Lora]) -> ModelWeights:
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

        `dtype_of` casts, while they are read, those that come as they are stored. The others are made on `device`.
        """

        def cast(name: str) -> torch.dtype:
            ours = by_file[name]
            stored = self.checkpoint.dtypes[name]
            return stored if dtype_of is None or self.made(ours) else dtype_of(ours)

        by_file = {self.file_names[ours]: ours for ours in self.plain_shapes if names is None or ours in names}
        for name, tensor in self.checkpoint.tensors(by_file, dtype_of=cast):
            ours = by_file[name]
            if not self.made(ours):
                yield ours, tensor
                continue
            parts = self._make(ours, tensor.to(device))
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
        if not self.made(name):
            yield from ((name, piece) for piece in self.checkpoint.pieces(file_name, dtype_of(name)))
            return
        for part, tensor in self._make(name, self.checkpoint.tensor(file_name).to(device)):
            yield part, tensor.to(dtype_of(part))

    def made(self, name: str) -> bool:
        """Whether this weight is changed, or quantised, or was; else it comes as it is stored."""
        return name in self.formats or name in self.layout.scales or any(name in lora.patches for lora in self.loras)

    def _make(self, name: str, tensor: Tensor) -> list[tuple[str, Tensor]]:
        loras = [lora for lora in self.loras if name in lora.patches]
        scale_O1 = None
        if name in self.layout.scales:
            scale = self.layout.scales[name]
            stored = self.checkpoint.tensor(self.file_names[scale])
            scale_O1 = check_scale(stored, tensor.shape[0], scale, self.source).to(tensor.device)
            if name in self.formats and not loras:
                return [(name, tensor), (scale_name(name), scale_O1)]
            tensor = dequantise(tensor, scale_O1)
        if loras:
            # The accumulator must be a tensor of its own and at least float32; a cast makes one where it changes.
            wide = torch.promote_types(tensor.dtype, torch.float32)
            tensor = tensor.to(wide)
            for lora in loras:
                lora.add_to(name, tensor)
        if name not in self.formats:
            return [(name, tensor.float())]
        try:
            q_OI, scale_O1 = quantise(tensor, self.formats[name])
        except ValueError as error:
            raise CheckpointError(f"{self.source}: {name} cannot be quantised, {error}.") from None
        if self.fidelity is not None:
            self.fidelity[name] = cosine(tensor, q_OI, scale_O1)
        return [(name, q_OI), (scale_name(name), scale_O1)]


def scale_name(weight: str) -> str:
    return weight.removesuffix(".weight") + SCALE
