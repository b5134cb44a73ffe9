"""Pairs: which file is the other half of one, by their names."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from difflib import SequenceMatcher
from functools import lru_cache
from pathlib import Path

from ..config.lora_names import partner_names, partners
from .found_file import FoundFile

ALIKE = 0.86
"""The least likeness of two names, without the words for the expert, that makes a pair: two quantisations of a model
are still alike, two models are not."""
_EXPERT_WORDS = re.compile(r"(?<![a-z])(?:high|low)(?:[ _.-]?noise)?(?:[ _.-]?model)?(?![a-z])", re.IGNORECASE)


def partner(expert: FoundFile, files: Sequence[FoundFile]) -> FoundFile | None:
    """The other expert that belongs to `expert`; None where there is none, or its name says neither high nor low."""
    fitting = [each for each in files if _fit(expert, each) and each.task == expert.task]
    by_path = {each.path: each for each in fitting}
    for name in partner_names(expert.path.as_posix()) if expert.expert else ():
        if (found := by_path.get(Path(name))) is not None:
            return found
    wanted = without_expert(expert.name)
    alike = ((_likeness(wanted, without_expert(each.name)), each) for each in fitting)
    order = lambda found: (found[0], found[1].quantisation == expert.quantisation)  # noqa: E731
    return max((found for found in alike if found[0] >= ALIKE), key=order, default=(0.0, None))[1]


def _likeness(one: str, other: str) -> float:
    """How alike two names are, from 0 to 1; 0 for less than ALIKE, which is known at once of most."""
    matcher = SequenceMatcher(None, one, other)
    return matcher.ratio() if matcher.real_quick_ratio() >= ALIKE and matcher.quick_ratio() >= ALIKE else 0.0


def lora_pairs(loras: Sequence[FoundFile]) -> dict[Path, FoundFile]:
    """{path of a LoRA: the other half of it, with its expert}. Names of halves differ in the words for the expert, and
    in numbers at most where that leaves no choice: `style_high-e8`, `style_low-e10`. Two styles with names alike are no
    pair. A word for high or low that stands alone makes no half: loading/lora_experts.py has the same rule."""
    by_path = {each.path: each for each in loras}
    pairs: dict[Path, FoundFile] = {}
    halves: list[FoundFile] = []
    for one in loras:
        names = [each for each in partners(one.path.as_posix()) if one.expert in (None, each.expert)]
        for each in names:
            if (other := by_path.get(Path(each.path))) is not None:
                _join(replace(one, expert=each.expert), other, pairs)
        likely = next((each.expert for each in names if each.likely), None)
        halves += [replace(one, expert=one.expert or likely)] if one.expert or likely else []
    for pattern in ("", r"[0-9]+"):  # the same name, then the same but for numbers
        groups: dict[str, list[FoundFile]] = defaultdict(list)
        for one in halves:
            if one.path not in pairs:
                name = without_expert(one.path.name)
                groups[re.sub(pattern, "0", name) if pattern else name].append(one)
        for group in groups.values():
            if len(group) == 2:
                _join(group[0], group[1], pairs)
    return pairs


def _join(one: FoundFile, other: FoundFile, pairs: dict[Path, FoundFile]) -> None:
    """Note that `other` is the other half of `one`, whose expert is known, if it can be."""
    other = replace(other, expert=other.expert or ("low" if one.expert == "high" else "high"))
    if _fit(one, other) and not (one.halves or other.halves) and not {one.path, other.path} & pairs.keys():
        pairs.update({one.path: other, other.path: one})


def _fit(one: FoundFile, other: FoundFile) -> bool:
    """Whether these are for the two experts of one model, as far as their headers say."""
    return (
        {one.expert, other.expert} == {"high", "low"}
        and (one.kind, one.width, one.distilled) == (other.kind, other.width, other.distilled)
        and (one.task == other.task or None in (one.task, other.task))
    )


@lru_cache(maxsize=100_000)
def without_expert(name: str) -> str:
    """A name without its words for the expert, without its ending, and without what then stands twice."""
    stem = re.sub(r"\.(safetensors|gguf|pth|pt)$", "", name, flags=re.IGNORECASE)
    bare = _EXPERT_WORDS.sub("", stem)
    bare = re.sub(r"([ _.-])[ _.-]+", r"\1", bare).strip(" _.-/")
    return bare or stem
