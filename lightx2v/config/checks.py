"""Checks of settings. An error names the setting, its value, the expected values and the nearest valid one.

`Request` checks with `Checks(BadRequest)`, `EngineConfig` with `Checks(ConfigError)`.
"""

import difflib
import math
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import UnionType
from typing import Any, Literal, NoReturn, Union, get_args, get_origin

from ..errors import LightX2VError, quoted

_JSON_WORDS = {True: "true", False: "false", None: "null"}
_GRIDS = {1: "", 4: " of the form 4n + 1", 16: " and a multiple of 16"}


@dataclass(frozen=True, slots=True)
class Checks:
    """Every failed check raises `error`. Every other one returns the checked value."""

    error: type[LightX2VError]

    def bad(self, name: str, got: Any, expected: str, *, nearest: Any = None) -> NoReturn:
        hint = "" if nearest is None else f" Nearest valid value: {nearest}."
        raise self.error(f"{name} is {quoted(got)}; expected {expected}.{hint}")

    def known_keys(self, data: Any, known: Sequence[str], where: str) -> Mapping[str, Any]:
        """An object whose keys are all in `known`."""
        if not isinstance(data, Mapping):
            self.bad(where, data, "an object")
        for key in data:
            if key not in known:
                raise self.error(f"{where}: unknown key {quoted(key)}. {did_you_mean(str(key), known)}")
        return data

    def one_of(self, name: str, value: Any, allowed: Sequence[Any]) -> Any:
        # `1 == True`, so the types are compared too: a number is not a flag.
        if not any(value == item and type(value) is type(item) for item in allowed):
            *words, last = (item if isinstance(item, str) else _JSON_WORDS[item] for item in allowed)
            self.bad(name, value, f"{', '.join(words)} or {last}")
        return value

    def flag(self, name: str, value: Any) -> bool:
        return self.one_of(name, value, (True, False))

    def whole(self, name: str, value: Any, low: int, high: int, *, step: int = 1) -> int:
        """An int from `low` to `high`, a multiple of `step` above `low`. A bool, a float or a text is not an int."""
        try:
            number = None if isinstance(value, bool) else operator.index(value)
        except TypeError:
            number = None
        if number is not None and low <= number <= high and (number - low) % step == 0:
            return number
        near = number if number is not None else value if isinstance(value, float) and math.isfinite(value) else None
        nearest = None if near is None else _nearest(near, low, high, step)
        self.bad(name, value, f"a whole number from {low} to {high}{_GRIDS[step]}", nearest=nearest)

    def real(self, name: str, value: Any, low: float, high: float) -> float:
        expected = f"a number from {low:g} to {high:g}"
        if isinstance(value, bool) or not isinstance(value, (int, float)) or value != value:
            self.bad(name, value, expected)
        if not low <= value <= high:
            self.bad(name, value, expected, nearest=f"{min(max(value, low), high):g}")
        return float(value)


def allowed_values(hint: Any) -> tuple[Any, ...]:
    """The values of an annotation made of bool, Literal and None; () for any other annotation."""
    if hint in (bool, type(None)):
        return (True, False) if hint is bool else (None,)
    if get_origin(hint) is Literal:
        return get_args(hint)
    union = get_origin(hint) in (UnionType, Union)  # bool | Literal is a typing.Union
    parts = [allowed_values(part) for part in get_args(hint)] if union else []
    return tuple(value for part in parts for value in part) if all(parts) else ()


def did_you_mean(word: str, known: Sequence[str]) -> str:
    """A question with the entry of `known` nearest to `word`. One that has all parts of `word` and more comes first."""
    parts = set(word.split("_"))
    whole = [name for name in known if parts <= set(name.split("_"))]
    return f"Did you mean {difflib.get_close_matches(word[:100], whole or known, n=1, cutoff=0.0)[0]!r}?"


def _nearest(value: float, low: int, high: int, step: int) -> int:
    top = low + (high - low) // step * step
    return top if value >= top else low if value <= low else low + round((value - low) / step) * step
