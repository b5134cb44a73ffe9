"""FoundFile: one model file of a folder, as far as its header and its name describe it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal, Self

from ..config.gguf_formats import MIXES
from ..config.phases import Expert
from ..config.request import Task

Kind = Literal["expert", "text encoder", "VAE", "LoRA", "tokenizer"]
QUANTISED = ("fp8", "int8")
"""Values of `FoundFile.quantisation` for weights of 8 bits. Those of GGUF files are the names of their formats."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FoundFile:
    """A file, or the folder of one model's shards or of a tokenizer. `size` is in bytes.

    `name` identifies it in a catalogue, and tells nothing of the folders above. `expert` is None where neither name nor
    metadata says one, and for a LoRA with `halves`, which holds one for each. `width` is the model's number of
    channels, for a LoRA that of the model it changes. `text_width` is that of a text encoder's output, and of the text
    that an expert takes. `rank`, `triggers` (words that a prompt has to have), `trained_for` and `thumbnail` are those
    of a LoRA. `problem` says why a file that was recognised cannot be used.
    """

    path: Path
    kind: Kind
    size: int
    name: str = ""
    task: Task | None = None
    expert: Expert | None = None
    quantisation: str = ""
    distilled: bool = False
    width: int = 0
    text_width: int = 0
    halves: bool = False
    rank: int = 0
    triggers: tuple[str, ...] = ()
    trained_for: str = ""
    thumbnail: Path | None = None
    problem: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "name", self.name or self.path.name)

    @property
    def quantised(self) -> bool:
        return self.quantisation in QUANTISED or self.gguf

    @property
    def gguf(self) -> bool:
        """Whether its weights are in GGUF's blocks."""
        return self.quantisation in MIXES

    def named(self, name: str) -> Self:
        return replace(self, name=name)

    def to_json(self) -> dict[str, Any]:
        """Every field as plain JSON types. `from_json` returns an equal FoundFile."""
        data = asdict(self)
        return data | {
            "path": str(self.path),
            "triggers": list(self.triggers),
            "thumbnail": str(self.thumbnail) if self.thumbnail else None,
        }

    def to_public_json(self) -> dict[str, Any]:
        """What another person may know of it: no path, and no empty field."""
        hidden = ("path", "thumbnail")
        return {key: value for key, value in self.to_json().items() if value and key not in hidden}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """Raises KeyError or TypeError where the fields are those of another version."""
        values = {field.name: data[field.name] for field in fields(cls)}
        values |= {"path": Path(values["path"]), "triggers": tuple(values["triggers"])}
        values["thumbnail"] = Path(values["thumbnail"]) if values["thumbnail"] else None
        return cls(**values)
