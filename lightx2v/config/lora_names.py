"""What the name of a LoRA or an expert's file says: its task, its expert, and the name of the other expert's file.

Names in the wild: `wan2.2_t2v_high_noise_14B_fp8_scaled`, `HighNoise/Wan2.2-T2V-A14B-HighNoise-Q4_K_M`,
`Wan2_2-T2V-A14B_HIGH_fp8_e4m3fn_scaled`, `Wan2.2-Lightning_4steps-lora_LOW`. "high noise" in any spelling decides; the
word "high" alone counts where there is no such phrase. Both are whole words: "highlander" and "highres" say nothing.
"""

import re
from pathlib import PurePath

_PHRASE = re.compile(r"(?:(?<![A-Za-z])(?i:high|low)|High|Low)(?=[ _.-]?(?i:noise))")
_WORD = re.compile(r"(?<![a-z])(?:high|low)(?![a-z])", re.IGNORECASE)
_TASK = re.compile(r"(?<![a-z0-9])(?:t2v|i2v|flf2v)(?![a-z])", re.IGNORECASE)


def task_of(path: str | PurePath) -> str | None:
    """ "t2v", "i2v" or "flf2v" if the file's name says one of them and no other."""
    return _only(_TASK, PurePath(path).name)


def expert_of(path: str | PurePath) -> str | None:
    """ "high" or "low" if the file's name says one of them and not both, or else the name of its folder does.

    Of a folder only the phrase counts: `high/` may hold anything.
    """
    path = PurePath(path)
    return _only(_pattern(path.name), path.name) or _only(_PHRASE, path.parent.name)


def expert_in(text: str) -> str | None:
    """ "high" or "low" if a text, such as a file's metadata, says "high noise" or "low noise" and not both."""
    return _only(_PHRASE, text)


def partner_names(path: str) -> list[str]:
    """What the other expert's file may be called, the likeliest first: a folder that names the expert may change too.

    Empty where the path names no expert.
    """
    expert = expert_of(path)
    folder, slash, name = path.rpartition("/")
    above, parent_slash, parent = folder.rpartition("/")
    if expert is not None and _only(_pattern(name), name) == expert:
        name = _pattern(name).sub(_exchange, name)
    if expert is not None and _only(_PHRASE, parent) == expert:
        parent = _PHRASE.sub(_exchange, parent)
    names = [f"{above}{parent_slash}{parent}{slash}{name}", f"{folder}{slash}{name}"]
    return [other for other in dict.fromkeys(names) if other != path]


def _pattern(name: str) -> re.Pattern[str]:
    return _PHRASE if _PHRASE.search(name) else _WORD


def _only(pattern: re.Pattern[str], text: str) -> str | None:
    """The one word that `pattern` finds in `text`, however often; None for none and for several."""
    words = {word.lower() for word in pattern.findall(text)}
    return words.pop() if len(words) == 1 else None


def _exchange(match: re.Match[str]) -> str:
    word = {"high": "low", "low": "high"}[match[0].lower()]
    return word.upper() if match[0].isupper() else word.title() if match[0].istitle() else word
