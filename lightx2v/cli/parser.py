"""Wrong flags are told as all else here: what, what was got, what was expected, what to do next."""

from __future__ import annotations

import argparse
import difflib
import re
from typing import NoReturn

PLAINER = {
    "expected (one|at least one) argument": "its value is missing",
    r"expected (\d+) arguments": r"it takes \1 values",
    r"ignored explicit argument (.+)": r"it takes no value, and this is \1",
    r"invalid int value: (.+)": r"\1 is no whole number",
    r"invalid float value: (.+)": r"\1 is no number",
    r"invalid choice: (.+) \(choose from .+\)": r"\1 is none of its choices",
    "not allowed with argument": "cannot be used together with",
}
"""argparse's words, and ours for a person."""


class Flags(argparse.ArgumentParser):
    """A parser of flags that ends with 2 and one line on standard error where one of them is wrong."""

    def error(self, message: str) -> NoReturn:
        about, _, wrong = message.partition(": ")
        if about == "unrecognized arguments":
            message = self._unknown(wrong.split())
        elif name := about.removeprefix("argument ") if about.startswith("argument ") else "":
            for found, said in PLAINER.items():
                wrong = re.sub(found, said, wrong)
            message = f"{name}: {wrong}. {self._usage(name.partition('/')[0])}"
        self.exit(2, f"error: {message.strip(' .')}. --help shows every flag.\n")

    def _usage(self, flag: str) -> str:
        action = self._option_string_actions.get(flag)
        if action is None or action.help == argparse.SUPPRESS:
            return ""
        values = self._get_formatter()._format_args(action, action.dest.upper())
        return f"Usage: {flag} {values}".rstrip() + (f", {action.help}" if action.help else "")

    def _unknown(self, words: list[str]) -> str:
        flag = next((word.partition("=")[0] for word in words if word.startswith("-")), "")
        if not flag:
            return f"{words[0]!r} belongs to no flag. Text with spaces needs quotes."
        known = [name for name, action in self._option_string_actions.items() if action.help != argparse.SUPPRESS]
        return f"There is no flag {flag}. The nearest is {difflib.get_close_matches(flag, known, n=1, cutoff=0.0)[0]}."
