"""Pairs: which file is the other half of one, by their names."""

from __future__ import annotations

import re
from collections.abc import Sequence
from difflib import SequenceMatcher
from pathlib import Path

from ..config.lora_names import partner_names
from .found_file import FoundFile

ALIKE = 0.86
"""The least likeness of two names, without the words for the expert, that makes a pair: two quantisations of a model
are still alike, two models are not."""
_EXPERT_WORDS = re.compile(r"(?<![a-z])(?:high|low)(?:[ _.-]?noise)?(?:[ _.-]?model)?(?![a-z])", re.IGNORECASE)


def partner(file: FoundFile, files: Sequence[FoundFile]) -> FoundFile | None:
    """The file for the other expert that belongs to `file`; None where there is none, or `file` names no expert."""
    if file.expert is None:
        return None
    other = "low" if file.expert == "high" else "high"
    fitting = [
        each
        for each in files
        if (each.kind, each.expert) == (file.kind, other)
        and (each.width, each.distilled) == (file.width, file.distilled)
        and (file.kind == "LoRA" or each.task == file.task)
    ]
    by_path = {each.path: each for each in fitting}
    for name in partner_names(file.path.as_posix()):
        if (found := by_path.get(Path(name))) is not None:
            return found
    wanted = without_expert(file.name)
    likeness = lambda each: SequenceMatcher(None, wanted, without_expert(each.name)).ratio()  # noqa: E731
    best = max(fitting, key=lambda each: (likeness(each), each.quantisation == file.quantisation), default=None)
    return best if best is not None and likeness(best) >= ALIKE else None


def without_expert(name: str) -> str:
    """A name without its words for the expert, without its ending, and without what then stands twice."""
    stem = re.sub(r"\.(safetensors|gguf|pth|pt)$", "", name, flags=re.IGNORECASE)
    bare = _EXPERT_WORDS.sub("", stem)
    bare = re.sub(r"([ _.-])[ _.-]+", r"\1", bare).strip(" _.-/")
    return bare or stem
