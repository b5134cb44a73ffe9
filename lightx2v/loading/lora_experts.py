"""LoraFile: which expert a LoRA file is for, and why: the first of these that says so.

    1. what the person chose
    2. the names of its tensors: diffusers' `transformer_2.` is the low-noise one; a file may hold both halves
    3. its metadata: "high noise" in a title or a base model's name, or the timesteps of the training
    4. "high noise" in its name or its folder's
    5. another word for high or low, where a second file's name differs from it in that word only
    6. else it is for both

Of a pair the other half is used for the other expert, if it lies beside the file or is given too.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..config.engine_config import EngineConfig
from ..config.lora_names import expert_by_metadata, noise_of, pair_expert, partners
from ..config.lora_spec import LoraSpec
from ..config.phases import Expert
from ..errors import short_path
from ..hub import find_lora
from ..weights.checkpoint import open_checkpoint
from ..weights.lora_keys import experts_of, parse_key


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraFile:
    """One file for one expert. `reason` ends the sentence "Used for the high-noise expert: …"."""

    path: Path
    strength: float | tuple[float, ...]
    """One for each phase of the video, if it changes."""
    reason: str
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class _Evidence:
    """The expert that a file says it is for, None for both; `halves`: it holds both experts' halves."""

    expert: Expert | None
    reason: str
    halves: bool = False


def lora_files(specs: Iterable[LoraSpec], expert: Expert, config: EngineConfig) -> list[LoraFile]:
    """The files that `specs` put on this expert."""
    specs = list(specs)
    places = [(spec, find_lora(spec.path, config)) for spec in specs]
    given = [path for _, path in places]
    own = {path.resolve() for spec, path in places if spec.expert in (expert, "auto")}
    files = []
    for spec, path in places:
        if spec.expert == "auto":
            files += _automatic(spec, path, expert, given, own)
        elif spec.expert == expert:
            files.append(_chosen(spec, path, expert, given))
    return files


def partner_of(path: Path) -> Path | None:
    """The LoRA for the other expert that belongs to `path` by its name, if there is one."""
    return next((Path(name.path) for name in partners(path.as_posix()) if Path(name.path).is_file()), None)


def _chosen(spec: LoraSpec, path: Path, expert: Expert, given: Sequence[Path]) -> LoraFile:
    evidence = _evidence(path, given)
    warning = (
        f"{short_path(path)} is used for the {expert}-noise expert, as you chose; {evidence.reason}. "
        "If that is a mistake, exchange the two files."
    )
    return _file(spec, path, "you chose it", warning if evidence.expert not in (None, expert) else "")


def _automatic(spec: LoraSpec, path: Path, expert: Expert, given: Sequence[Path], own: set[Path]) -> list[LoraFile]:
    evidence = _evidence(path, given)
    if evidence.expert is None:
        unclear = not evidence.halves and expert == "high" and partners(path.as_posix())  # once is enough
        warning = (
            f"{short_path(path)} is used for both experts: its name has a word for high or low, but no second file "
            "differs from it in that word. If it is for one expert, choose that one."
        )
        return [_file(spec, path, evidence.reason, warning if unclear else "")]
    partner = partner_of(path)
    paired = any(pair_expert(path, other) for other in given if other != path)
    if evidence.expert == expert:
        warning = f"{short_path(path)} is for one expert ({evidence.reason}), and its other half is not beside it."
        return [_file(spec, path, evidence.reason, "" if partner or paired else warning)]
    if partner is None or paired or partner.resolve() in own:
        return []
    return [_file(spec, partner, f"it is the other half of {path.name:.80}")]


def _file(spec: LoraSpec, path: Path, reason: str, warning: str = "") -> LoraFile:
    strength = spec.strengths if spec.varies else spec.strengths[0]
    return LoraFile(path=path, strength=strength, reason=reason, warnings=(warning,) if warning else ())


def _evidence(path: Path, given: Sequence[Path]) -> _Evidence:
    """What a file and its name say. `given` are the files that are used together with it."""
    checkpoint = open_checkpoint(path)
    found = experts_of(parsed[0] for key in checkpoint.shapes if (parsed := parse_key(key)))
    experts = sorted(set(found.values()))
    if len(experts) == 2:
        return _Evidence(None, "it holds a half for each", halves=True)
    if experts:
        return _Evidence(experts[0], f"the names of its tensors say {experts[0]} noise")
    if (by_metadata := expert_by_metadata(checkpoint.metadata)) is not None:
        return _Evidence(by_metadata, f"its metadata says {by_metadata} noise")
    if (by_name := noise_of(path)) is not None:
        return _Evidence(by_name, f"its name says {by_name} noise")
    for other in given:
        if other != path and (expert := pair_expert(path, other)) is not None:
            return _Evidence(expert, f"its name differs from {other.name:.80} in that word")
    for name in partners(path.as_posix()):
        if Path(name.path).is_file():
            return _Evidence(name.expert, f"its name differs from {Path(name.path).name:.80} in that word")
    return _Evidence(None, "nothing says that it is for one expert, so it is used for both")
