"""ModelWeights: the weights that a network needs, derived from a checkpoint: renamed, LoRAs added, quantised.

    weights = ModelWeights.of_expert(checkpoint, quantise=torch.float8_e4m3fn).with_loras([lora])
    weights.shapes, weights.dtypes          the result, known from the headers
    weights.plain_shapes                    the same without scales, and of weights in blocks the logical shape
    for name, tensor in weights.tensors():  one tensor at a time, derived while it is read; nothing is kept

A tensor without LoRA and quantising comes as it is stored, and matrices in GGUF blocks come in their blocks. LoRAs are
added in float32 and the sum is rounded once, to
the wanted dtype; a quantised weight is dequantised for that and quantised again in its own format.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from typing import Self

import torch
from torch import Tensor

from ..errors import CheckpointError, short_path
from ..progress import UNWATCHED, LoadWatch
from .checkpoint import Checkpoint, Wanted, read_in_order
from .device_checks import DeviceChecks
from .dit_names import wan_names
from .gguf_blocks import BlockFormat, BlockWeights
from .gguf_blocks import dequantise as dequantise_blocks
from .gguf_reader import check_architecture
from .lora import MatchedLora, add_loras
from .other_models import require_expert
from .quant_layout import (
    SCALE,
    QuantLayout,
    check_scale,
    is_expert_matrix,
    is_text_matrix,
    plain_names,
    read_layout,
    require_plain_cast,
)
from .quant_notes import read_notes, unrotated
from .quantization import cosine, dequantise, quantise
from .tensor_file import FLOATS
from .umt5_names import text_encoder_names

IsMatrix = Callable[[str, tuple[int, ...]], bool]
Rename = Callable[[Iterable[str], str], Mapping[str, str]]
"""The model's name for each of a file's, which the second argument names."""


@dataclass(frozen=True, slots=True)
class Helpers:
    """What was read besides a weight to compute it: its scale [rows, 1], and for each of its LoRAs the parts."""

    scale_O1: Tensor | None
    loras: list[dict[str, Tensor]]


class ModelWeights:
    """Weights by Wan's names. `names` maps the file's names to these; `is_matrix` tells which weights may be quantised.

    `quantise` is the 8-bit dtype to quantise to. Quantised weights outside `is_matrix`, which some programs write, and
    weights in blocks with a LoRA come out in float32.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        names: Mapping[str, str],
        *,
        is_matrix: IsMatrix,
        layout: QuantLayout,
        loras: Sequence[MatchedLora] = (),
        quantise: torch.dtype | None = None,
    ) -> None:
        self.checkpoint = checkpoint
        self.source = short_path(checkpoint.path)
        self.file_names = {wan: name for name, wan in names.items()}
        self.layout = layout
        self.loras = tuple(loras)
        self._is_matrix, self._quantise = is_matrix, quantise
        self.fidelity: dict[str, float] | None = None
        """If a dictionary: receives the cosine between each weight and its quantised form."""
        helpers = {*self.layout.scales.values(), *self.layout.unused}
        self.plain_shapes = {
            wan: checkpoint.shapes[name] for wan, name in self.file_names.items() if wan not in helpers
        }
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, torch.dtype] = {}
        self.formats: dict[str, torch.dtype] = {}
        self.blocks: dict[str, BlockFormat] = {}
        """The weights that stay in GGUF blocks."""
        for name, shape in self.plain_shapes.items():
            stored = checkpoint.dtypes[self.file_names[name]]
            as_stored = name in layout.scales and name not in layout.rotations
            wanted = stored if as_stored else quantise if stored in FLOATS or name in layout.scales else None
            blocks = self._blocks(name)
            self.shapes[name] = shape
            if blocks is not None and is_matrix(name, shape) and not self._loras(name):
                self.blocks[name], self.dtypes[name] = blocks.form, stored
                self.shapes[name] = (shape[0], blocks.form.row_bytes(shape[1]))
            elif wanted is not None and is_matrix(name, shape):
                self.formats[name] = self.dtypes[name] = wanted
                scale = scale_name(name)
                self.shapes[scale], self.dtypes[scale] = (shape[0], 1), torch.float32
            else:
                self.dtypes[name] = torch.float32 if self.is_modified(name) else stored

    @classmethod
    def of_expert(cls, checkpoint: Checkpoint, *, quantise: torch.dtype | None = None) -> ModelWeights:
        """The weights of a DiT checkpoint in any layout. CheckpointError names a model of another kind."""
        source = short_path(checkpoint.path)
        check_architecture(checkpoint.metadata, ("wan",), source)
        require_expert(
            {wan: checkpoint.shapes[name] for name, wan in wan_names(checkpoint.shapes, source).items()}, source
        )
        return cls._of(checkpoint, wan_names, is_expert_matrix, quantise)

    @classmethod
    def of_text_encoder(cls, checkpoint: Checkpoint, *, quantise: torch.dtype | None = None) -> ModelWeights:
        """The weights of a UMT5 checkpoint, Wan's, transformers' or llama.cpp's."""
        check_architecture(checkpoint.metadata, ("t5encoder", "t5"), short_path(checkpoint.path))
        return cls._of(checkpoint, text_encoder_names, is_text_matrix, quantise)

    @classmethod
    def _of(cls, checkpoint: Checkpoint, rename: Rename, is_matrix: IsMatrix, quantise: torch.dtype | None) -> Self:
        source = short_path(checkpoint.path)
        names = plain_names(rename(checkpoint.shapes, source))
        layout = read_layout(
            {wan: checkpoint.shapes[name] for name, wan in names.items()},
            {wan: checkpoint.dtypes[name] for name, wan in names.items()},
            source,
            read_notes(checkpoint, names, lambda found: rename(found, source), source),
        )
        plain = [
            name
            for name, wan in names.items()
            if layout.scales.get(wan) == "" and is_matrix(wan, checkpoint.shapes[name])
        ]
        require_plain_cast(checkpoint, plain, source)
        return cls(checkpoint, names, is_matrix=is_matrix, layout=layout, quantise=quantise)

    def with_loras(self, loras: Sequence[MatchedLora]) -> ModelWeights:
        """The same weights with these LoRAs merged instead of the present ones."""
        names = {name: wan for wan, name in self.file_names.items()}
        return ModelWeights(
            *(self.checkpoint, names),
            is_matrix=self._is_matrix,
            layout=self.layout,
            loras=loras,
            quantise=self._quantise,
        )

    @property
    def quantised(self) -> bool:
        return bool(self.formats or self.blocks)

    def _blocks(self, name: str) -> BlockWeights | None:
        return self.checkpoint.blocks.get(self.file_names[name])

    def _loras(self, name: str) -> list[MatchedLora]:
        return [lora for lora in self.loras if name in lora.patches]

    def is_modified(self, name: str) -> bool:
        """Whether this weight comes out other than stored: with a LoRA, quantised or dequantised."""
        if name in self.formats or name in self.layout.scales or self._loras(name):
            return True
        return self._blocks(name) is not None and name not in self.blocks

    @property
    def computes(self) -> bool:
        """Whether loading adds or quantises, which a CPU does slowly."""
        return any(name in self.formats and name not in self.layout.scales or self._loras(name) for name in self.dtypes)

    def tensors(
        self,
        names: Container[str] | None = None,
        *,
        dtype_of: Callable[[str], torch.dtype] | None = None,
        device: torch.device | str = "cpu",
        into: Callable[[str], Tensor | None] = lambda _: None,
        look: Callable[[str, Tensor], None] | None = None,
        watch: LoadWatch = UNWATCHED,
    ) -> Iterator[tuple[str, Tensor]]:
        """(name, tensor) of all weights, or of those in `names`, on `device`, in the order they lie on disk.

        `dtype_of` casts all but quantised weights, unmodified ones while they are read; without it sums come in
        float32. Merging and quantising run on `device`. A weight that stays as stored, for which `into` names a
        tensor, is read into that, and its parts are given to `look`; see `Checkpoint.tensors`.
        """

        order = [name for name in self.names_on_disk() if names is None or name in names]
        checks = DeviceChecks()
        with closing(read_in_order(self._wanted(order, dtype_of, into, look), device, watch)) as reading:
            for name in order:
                helpers = self._take_helpers(name, reading, checks)
                tensor = next(reading)[1]
                if not self.is_modified(name):
                    yield name, tensor
                    continue
                dtype = torch.float32 if dtype_of is None else dtype_of(name)
                parts = self._modified(name, tensor, dtype, helpers, checks)
                del tensor, helpers
                yield from parts
        checks.finish()

    def nbytes(self, names: Container[str] | None = None) -> int:
        """The bytes of files that `tensors` reads."""
        order = [name for name in self.names_on_disk() if names is None or name in names]
        return sum(each.nbytes for each in self._wanted(order))

    def _wanted(
        self,
        order: Iterable[str],
        dtype_of: Callable[[str], torch.dtype] | None = None,
        into: Callable[[str], Tensor | None] = lambda _: None,
        look: Callable[[str, Tensor], None] | None = None,
    ) -> list[Wanted]:
        """What to read for these weights: for each one its helpers, and then itself."""
        wanted = []
        for name in order:
            wanted += self._helpers(name)
            modified = self.is_modified(name)
            kept = name in self.formats and name in self.layout.scales and not self._loras(name)
            dtype = None if dtype_of is None or modified else dtype_of(name)
            as_stored = kept or not modified
            target, looked = into(name) if as_stored else None, partial(look, name) if look and as_stored else None
            wanted.append(self.checkpoint.wanted(self.file_names[name], dtype, target, looked))
        return wanted

    def _helpers(self, name: str) -> list[Wanted]:
        """What is read besides a weight to compute it: its scale, and what its LoRAs are made of."""
        scale = self.layout.scales.get(name)
        wanted = [self.checkpoint.wanted(self.file_names[scale])] if scale else []
        return wanted + [each for lora in self._loras(name) for each in lora.wanted(name)]

    def _take_helpers(self, name: str, reading: Iterator[tuple[str, Tensor]], checks: DeviceChecks) -> Helpers:
        """The helpers of this weight, which come next."""
        tensors = [next(reading)[1] for _ in self._helpers(name)]
        scale_O1 = None
        if (scale := self.layout.scales.get(name)) is not None:
            stored = tensors.pop(0) if scale else torch.ones(())
            scale_O1 = check_scale(stored, self.plain_shapes[name][0], scale, self.source, checks)
        parts = []
        for lora in self._loras(name):
            count = len(lora.patches[name].keys)
            parts.append(lora.checked(name, tensors[:count], checks))
            del tensors[:count]
        return Helpers(scale_O1, parts)

    def names_on_disk(self) -> list[str]:
        """The names of the weights, without scales, in the order they lie on disk."""
        wan_of = {self.file_names[name]: name for name in self.plain_shapes}
        return [wan_of[name] for _, name in self.checkpoint.disk_order() if name in wan_of]

    def chunks(
        self, name: str, dtype_of: Callable[[str], torch.dtype], *, device: torch.device | str = "cpu"
    ) -> Iterator[tuple[str, Tensor]]:
        """One weight, then its scale if it has one, in the dtypes of `dtype_of`.

        An unmodified weight comes flat and in chunks, so that the text encoder's table of 2 GB needs no memory.
        """
        if self.is_modified(name):
            yield from self.tensors({name}, dtype_of=dtype_of, device=device)
        else:
            yield from ((name, chunk) for chunk in self.checkpoint.chunks(self.file_names[name], dtype_of(name)))

    def scale(self, name: str) -> Tensor:
        """The scale of a weight that is stored quantised, float32 [rows, 1]."""
        scale, rows = self.layout.scales[name], self.plain_shapes[name][0]
        stored = self.checkpoint.tensor(self.file_names[scale]) if scale else torch.ones(())
        return check_scale(stored, rows, scale, self.source)

    def _modified(
        self, name: str, tensor: Tensor, dtype: torch.dtype, helpers: Helpers, checks: DeviceChecks
    ) -> list[tuple[str, Tensor]]:
        """The weight in `dtype`, or quantised and followed by its scale."""
        loras = self._loras(name)
        if (blocks := self._blocks(name)) is not None:
            tensor = dequantise_blocks(tensor, blocks.form).view(blocks.shape)
        if helpers.scale_O1 is not None:
            scale_O1 = helpers.scale_O1.to(tensor.device)
            if self.formats.get(name) == tensor.dtype and not loras and name not in self.layout.rotations:
                return [(name, tensor), (scale_name(name), scale_O1)]
            tensor = dequantise(tensor, scale_O1)
            if rotation := self.layout.rotations.get(name):
                tensor = unrotated(tensor, rotation)
        if name not in self.formats:
            return [(name, add_loras(tensor, name, loras, dtype, helpers.loras, checks))]
        if loras:
            tensor = add_loras(tensor, name, loras, torch.float32, helpers.loras, checks)
        checks.finish()  # before quantising, which refuses the same values with other words
        try:
            q_OI, scale_O1 = quantise(tensor, self.formats[name])
        except ValueError as error:
            raise CheckpointError(f"{self.source}: {name} cannot be quantised: {error}.") from None
        if self.fidelity is not None:
            self.fidelity[name] = cosine(tensor, q_OI, scale_O1)
        return [(name, q_OI), (scale_name(name), scale_O1)]


def scale_name(weight: str) -> str:
    return weight.removesuffix(".weight") + SCALE
