"""KeptParts: what a closed engine leaves for the next one, which then need not load it: text encoder, VAE, host memory.

A part is used again only if it would be loaded from the same files in the same way: its `key` says how it was loaded.
"""

from collections.abc import Hashable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from ..config.engine_config import EngineConfig
from ..loading.model_files import ModelFiles
from ..loading.networks import Precision
from ..models.preview import FACTORS_NAME
from .host_slabs import HostSlabs
from .packed_weights import PackedModule


@dataclass(frozen=True, slots=True)
class KeptPart:
    """A network in memory; in host memory, for a GPU, if it is `packed`. `extra` is what was made with it."""

    key: Hashable
    module: nn.Module
    packed: PackedModule | None = None
    extra: Any = None

    @property
    def device_bytes(self) -> int:
        tensors = (*self.module.parameters(), *self.module.buffers())
        return 0 if self.packed else sum(tensor.nbytes for tensor in tensors)


@dataclass(slots=True)
class KeptParts:
    """`parts` by name: "text" and "vae". `slabs` hold the packed ones, and room for other weights."""

    parts: dict[str, KeptPart] = field(default_factory=dict)
    slabs: HostSlabs | None = None
    slabs_are_taken: bool = False

    def take(self, name: str, key: Hashable, *, in_host: bool) -> KeptPart | None:
        """The part with this key, which leaves this store. It may be packed if the plan has it in host memory."""
        part = self.parts.pop(name, None)
        if part is None:
            return None
        if part.key == key and (in_host or part.packed is None):
            return part
        if part.packed is not None and self.slabs is not None:
            part.packed.give_back(self.slabs)
        return None

    @property
    def device_bytes(self) -> int:
        return sum(part.device_bytes for part in self.parts.values())

    @property
    def host_bytes(self) -> int:
        return self.slabs.nbytes if self.slabs is not None else 0

    def take_slabs(self) -> HostSlabs | None:
        """The slabs, once. Parts that are packed in them are still in this store."""
        if self.slabs_are_taken:
            return None
        self.slabs_are_taken = True
        return self.slabs

    def close(self) -> None:
        """Free what nobody took."""
        for name in [*self.parts]:
            self.take(name, None, in_host=False)
        if self.slabs is not None and not self.slabs_are_taken:
            self.slabs.close()
        self.slabs = None


def text_key(files: ModelFiles, config: EngineConfig, precision: Precision) -> Hashable:
    """How the text encoder is loaded."""
    path = (files.prebuilt.t5 if files.prebuilt else None) or files.t5
    scheme = config.t5_quant_scheme if config.t5_quantized and config.build else None
    return _content(path), _content(files.tokenizer), precision.compute, precision.device, config.text_len, scheme


def vae_key(files: ModelFiles, precision: Precision) -> Hashable:
    """How the VAE is loaded, and what its preview is made of."""
    return _content(files.vae), _content(files.vae.parent / FACTORS_NAME), precision.vae, precision.device


def _content(path: Path) -> Hashable:
    """Names the content of a file, or of the files in a folder, as long as nobody writes to them."""
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    found = ((file.resolve(), file.stat()) for file in files if file.is_file())
    return tuple((file, stat.st_size, stat.st_mtime_ns) for file, stat in found)
