"""What a LoRA's name says: the task and the expert it is for, and what its other half is called."""

from __future__ import annotations

import re
from pathlib import PurePath

_LEVEL = re.compile(r"(?<![a-z])(?:high|low)(?![a-z])|(?<![a-z])(?:high|low)(?=noise)", re.IGNORECASE)


_TASK = re.compile(r"(?<![a-z0-9])(?:t2v|i2v|flf2v)(?![a-z])", re.IGNORECASE)


def task_of(path: str | PurePath) -> str | None:
    """ "t2v", "i2v" or "flf2v" if the file's name says one of them and no other."""
    found = {word.lower() for word in _TASK.findall(PurePath(path).name)}
    return found.pop() if len(found) == 1 else None


def expert_of(path: str | PurePath) -> str | None:
    """ "high" or "low" if the file's name says one of them and not both."""
    found = {word.lower() for word in _LEVEL.findall(PurePath(path).name)}
    return found.pop() if len(found) == 1 else None


def partner_name(path: str) -> str | None:
    """The same path with "high" and "low" exchanged in the file's name; None where that says neither, or both."""
    if expert_of(path) is None:
        return None
    folder, slash, name = path.rpartition("/")
    return folder + slash + _LEVEL.sub(_other, name)


def _other(match: re.Match[str]) -> str:
    word = {"high": "low", "low": "high"}[match[0].lower()]
    return word.upper() if match[0].isupper() else word.title() if match[0].istitle() else word
