"""LoraSpec: one LoRA file, the expert that it is for, and its strength."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Self

from ..errors import BadRequest
from .checks import Checks
from .phases import MAX_PHASES, Expert

check = Checks(BadRequest)

MAX_STRENGTH = 100.0

_LORA_NAMES = {"high": "high_noise_model", "low": "low_noise_model", "auto": "auto"}


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraSpec:
    """One LoRA file for one expert. In JSON, as in LightX2V: {"name": "high_noise_model", "path", "strength"}.

    A `strength` of several numbers is one for each phase of the video.
    With "auto", or without a name, the file goes to the expert in its file name, and its partner beside it goes to the
    other expert. A file whose name has no expert goes to both.
    """

    expert: Expert | Literal["auto"] = "auto"
    path: str
    strength: float | tuple[float, ...] = 1.0

    def __post_init__(self) -> None:
        if self.expert not in tuple(_LORA_NAMES):  # a file may have a list here, which cannot be a key of a dict
            check.bad("LoRA name", self.expert, "high_noise_model, low_noise_model or auto")
        if not isinstance(self.path, str) or not self.path.strip() or "\0" in self.path:
            check.bad("LoRA path", self.path, "a file or a Hub name such as owner/repo/file.safetensors")
        object.__setattr__(self, "strength", _strength(self.strength))

    @property
    def strengths(self) -> tuple[float, ...]:
        """One for all phases, or one for each."""
        return self.strength if isinstance(self.strength, tuple) else (self.strength,)

    @property
    def varies(self) -> bool:
        """Whether its strength changes within a video."""
        return len(set(self.strengths)) > 1

    def to_json(self) -> dict[str, Any]:
        strength = list(self.strength) if isinstance(self.strength, tuple) else self.strength
        return {"name": _LORA_NAMES[self.expert], "path": self.path, "strength": strength}

    @classmethod
    def from_json(cls, data: Any) -> Self:
        if not isinstance(data, Mapping):
            check.bad("LoRA", data, 'an object such as {"name": "high_noise_model", "path": "…", "strength": 1.0}')
        check.known_keys(data, ("name", "expert", "path", "strength"), "LoRA")
        if "path" not in data or ("name" in data and "expert" in data):
            check.bad("LoRA", dict(data), "a path, and a name (high_noise_model, low_noise_model or auto)")
        experts = {"high": "high", "low": "low", "high_noise_model": "high", "low_noise_model": "low"}
        name = data.get("name", data.get("expert", "auto"))
        expert: Any = experts.get(name, name) if isinstance(name, str) else name
        return cls(expert=expert, **{key: data[key] for key in ("path", "strength") if key in data})


def _strength(value: Any) -> float | tuple[float, ...]:
    if isinstance(value, (list, tuple)):
        if not 1 <= len(value) <= MAX_PHASES:
            check.bad("LoRA strength", value, f"one number, or 1 to {MAX_PHASES}: one for each phase")
        return tuple(check.real("LoRA strength", each, -MAX_STRENGTH, MAX_STRENGTH) for each in value)
    return check.real("LoRA strength", value, -MAX_STRENGTH, MAX_STRENGTH)
