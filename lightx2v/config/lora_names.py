"""What the name of a LoRA or an expert's file says: its task, its expert, and the name of the other expert's file.

Names in the wild: `wan2.2_t2v_high_noise_14B_fp8_scaled`, `HighNoise/Wan2.2-T2V-A14B-HighNoise-Q4_K_M`,
`Wan2_2-T2V-A14B_HIGH_fp8_e4m3fn_scaled`, `SwayHighWan2_2`, `style-22-H-e8`, `style_HN_v1`, `style_高噪`. "high noise"
in any spelling decides. Any other word for high or low may belong to the subject (low light, high heels): it counts
where two files exist whose names differ in it and in nothing else.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from pathlib import PurePath
from typing import Literal, TypeVar

Expert = Literal["high", "low"]
Word = TypeVar("Word", bound=str)

_PHRASE = re.compile(
    r"(?:(?<![A-Za-z])(?i:high|low)|High|Low|(?<![A-Za-z0-9])[HhLl])(?=[ _.-]{0,3}(?i:noise))|[高低](?=噪)"
)
_TOKEN = re.compile(
    r"(?<![A-Za-z])(?:high|low)(?:(?![a-z])|(?=v[0-9]))|(?:High|Low)(?![a-z])|(?<![A-Z])(?:HIGH|LOW)(?![A-Z])"
    r"|(?<![A-Za-z0-9])(?:hi|lo|HI|LO)(?![A-Za-z0-9])|(?<![A-Z0-9])(?:Hi|Lo)(?![A-Za-z0-9])"
    r"|(?<![A-Z])(?:HN|LN|H|L)(?![A-Za-z0-9])|(?<![A-Za-z0-9])(?:hn|ln|h|l)(?![A-Za-z0-9])|[高低]噪?"
)
_GLUED = re.compile(r"high|low", re.IGNORECASE)
"""The words also inside of others, as in `stylehigh`: they count where two files are given that differ in it only."""
_NEXT_WORD = re.compile(r"[ _.-]*([A-Za-z]+)(?![A-Za-z0-9])")
_TECHNICAL = frozenset("noise lora lokr loha dora rank scaled model expert epoch step steps dit transformer".split())
"""Words after "high" or "low" that no subject begins with."""
_TASK = re.compile(r"(?<![a-z0-9])(?:t2v|i2v|flf2v)(?![a-z])", re.IGNORECASE)
_OPPOSITE = {
    "high": "low",
    "low": "high",
    "hi": "lo",
    "lo": "hi",
    "hn": "ln",
    "ln": "hn",
    "h": "l",
    "l": "h",
    "高": "低",
    "低": "高",
}
_OPPOSITE |= {"高噪": "低噪", "低噪": "高噪"}
TITLES = ("title", "name", "model", "base", "expert", "noise")
"""Parts of the names of metadata entries that say what a file is; others quote captions and folders."""
HIGH_FROM, LOW_TO = 700, 950
"""Timesteps: a training that begins above the first is the high-noise one, one that ends below the second the other.
The experts change at 875 (text to video) or 900."""
MOST_WORDS = 4
"""More words for high and low than this in a name are no mark of an expert."""


@dataclass(frozen=True, slots=True)
class Partner:
    """A name that the other expert's file may have. `expert` is that of the first file; `likely`: by its name alone."""

    path: str
    expert: Expert
    likely: bool


def task_of(path: str | PurePath) -> str | None:
    """ "t2v", "i2v" or "flf2v" if the file's name says one of them and no other."""
    return _only({word.lower() for word in _TASK.findall(PurePath(path).name)})


def expert_of(path: str | PurePath) -> Expert | None:
    """ "high" or "low" if the name says so by itself: by the phrase, or by one word that is no part of a subject."""
    path = PurePath(path)
    if (expert := noise_of(path)) or _PHRASE.search(path.name):
        return expert
    return next((partner.expert for partner in partners(str(path)) if partner.likely), None)


def noise_of(path: str | PurePath) -> Expert | None:
    """ "high" or "low" if the file's name says "high noise" or "low noise" and not both, or else its folder's name."""
    path = PurePath(path)
    return expert_in(path.name) or (None if _PHRASE.search(path.name) else expert_in(path.parent.name))


def expert_in(text: str) -> Expert | None:
    """ "high" or "low" if a text, such as a file's metadata, says "high noise" or "low noise" and not both."""
    experts: set[Expert] = {_expert(word) for word in _PHRASE.findall(text)}
    return _only(experts)


def expert_by_metadata(metadata: Mapping[str, object]) -> Expert | None:
    """ "high" or "low" if a LoRA's metadata say so: a title, a base model's name, or the training's timesteps."""
    said = [str(value) for key, value in metadata.items() if any(part in key.lower() for part in TITLES)]
    if (expert := expert_in(" ".join(said))) is not None:
        return expert
    first, last = (_number(metadata.get(f"ss_{end}_timestep")) for end in ("min", "max"))
    if first is not None and HIGH_FROM <= first < 1000:
        return "high"
    return "low" if last is not None and 0 < last <= LOW_TO and not (first or 0) >= HIGH_FROM else None


def _number(value: object) -> float | None:
    try:
        return float(str(value))
    except ValueError:
        return None


def partner_names(path: str) -> list[str]:
    """What the other expert's file is called, the likeliest first, as far as the name says that there is one."""
    return [partner.path for partner in partners(path) if partner.likely]


def partners(path: str) -> list[Partner]:
    """Every name that the other expert's file may have, the likeliest first: a folder that names the expert may change
    too. Only a file that exists makes an unlikely one a partner."""
    above, name = (path.rpartition("/")[0], path.rpartition("/")[2])
    root, slash, folder = above.rpartition("/")
    found: dict[str, Partner] = {}
    for expert, new_folder, new_name, likely in _exchanged(folder, name):
        other = f"{root}{slash}{new_folder}/{new_name}" if above else new_name
        if other != path:
            found.setdefault(other, Partner(other, expert, likely))
    return sorted(found.values(), key=lambda partner: not partner.likely)


def pair_expert(path: str | PurePath, other: str | PurePath) -> Expert | None:
    """The expert of `path` if the two belong together: their names, or their folders' where these are equal, differ in
    words for high and low, and else in numbers at most."""
    one, two = PurePath(path), PurePath(other)
    if one.name == two.name:
        return _difference(one.parent.name, two.parent.name)
    return _difference(one.name, two.name)


def _difference(one: str, two: str) -> Expert | None:
    if _PHRASE.search(one) and _PHRASE.search(two):
        return _difference_in(_PHRASE, one, two)
    return _difference_in(_TOKEN, one, two) or _difference_in(_GLUED, one, two)


def _difference_in(pattern: re.Pattern[str], one: str, two: str) -> Expert | None:
    texts = [[re.sub(r"[0-9]+", "0", text) for text in pattern.split(name)] for name in (one, two)]
    words = [[_expert(word) for word in pattern.findall(name)] for name in (one, two)]
    if texts[0] != texts[1]:
        return None
    return _only({a for a, b in zip(*words, strict=True) if a != b})


def _exchanged(folder: str, name: str) -> Iterator[tuple[Expert, str, str, bool]]:
    """(expert, folder, name, likely) for each way to exchange its words for high and low, one way for all of them."""
    if _PHRASE.search(name) or _PHRASE.search(folder):
        expert = expert_in(name) or (None if _PHRASE.search(name) else expert_in(folder))
        if expert is not None:
            other = _PHRASE.sub(_opposite, name)
            if expert_in(folder) == expert:
                yield expert, _PHRASE.sub(_opposite, folder), other, True
            yield expert, folder, other, True
        return
    in_name, in_folder = list(_TOKEN.finditer(name)), list(_TOKEN.finditer(folder))
    if len(in_name) > MOST_WORDS or len(in_folder) > MOST_WORDS:
        return
    both = len({_expert(word[0]) for word in in_name}) > 1
    experts: tuple[Expert, ...] = ("high", "low")
    for expert in experts:
        ours = [word for word in in_name if _expert(word[0]) == expert]
        theirs = [word for word in in_folder if _expert(word[0]) == expert]
        for words in _some(ours):
            likely = bool(words) and not both and len(words) == len(ours) and not any(map(_is_subject, words))
            yield expert, folder, _replaced(name, words), likely
            yield expert, _replaced(folder, theirs), _replaced(name, words), False


def _some(words: list[re.Match[str]]) -> list[list[re.Match[str]]]:
    """All of the words, then every smaller choice of them."""
    chosen = [
        [word for word, taken in zip(words, choice, strict=True) if taken]
        for choice in product((1, 0), repeat=len(words))
    ]
    return sorted(chosen, key=len, reverse=True)


def _is_subject(word: re.Match[str]) -> bool:
    """Whether the word says something about the next one, as in "low light"."""
    after = _NEXT_WORD.match(word.string, word.end())
    return after is not None and after.end() < len(word.string) and after[1].lower() not in _TECHNICAL


def _replaced(text: str, words: list[re.Match[str]]) -> str:
    for word in reversed(words):
        text = text[: word.start()] + _opposite(word) + text[word.end() :]
    return text


def _opposite(match: re.Match[str]) -> str:
    word = _OPPOSITE[match[0].lower()]
    return word.upper() if match[0].isupper() else word.title() if match[0].istitle() else word


def _expert(word: str) -> Expert:
    return "high" if word[0] in "hH高" else "low"


def _only(words: set[Word]) -> Word | None:
    """The one element of a set; None for none and for several."""
    return next(iter(words)) if len(words) == 1 else None
