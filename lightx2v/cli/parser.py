"""The argument parser of every command line: a wrong flag ends the program with one line and exit code 2."""

import argparse
import difflib
import re
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from ..errors import MAX_SHOWN, quoted
from ..step_file import SAVE_EVERY


class ArgumentParser(argparse.ArgumentParser):
    """argparse's parser with one-line errors that name the nearest flag."""

    def parse(self, argv: Sequence[str] | None = None) -> argparse.Namespace:
        """The parsed flags; `parse_args` does the same without naming the nearest flag."""
        options, unknown = self.parse_known_args(argv)
        if flag := next((word.partition("=")[0] for word in unknown if word.startswith("-")), ""):
            flags = re.findall(r"--\w+", self.format_help())
            self.error(f"unknown flag {flag}. Did you mean {difflib.get_close_matches(flag, flags, 1, 0.0)[0]}?")
        if unknown:
            self.error(f"{quoted(unknown[0])} belongs to no flag. Put quotes around text with spaces.")
        return options

    def error(self, message: str) -> NoReturn:
        """End the program. argparse repeats in its messages whole arguments, which may be long."""
        message = re.sub(rf"\S{{{MAX_SHOWN},}}", lambda word: word[0][: MAX_SHOWN - 1] + "…", message)
        self.exit(2, f"error: {message}{'' if message.endswith(('.', '?')) else '.'} --help lists every flag.\n")


def amount(text: str) -> float:
    """The type of a flag that takes a number from 0 on."""
    value = float(text)
    if not 0 <= value <= 1e9:
        raise argparse.ArgumentTypeError("expected a number from 0 to 1e9")
    return value


def add_save_every(add: Callable[..., Any]) -> None:
    add(
        "--save_every",
        type=amount,
        default=SAVE_EVERY,
        metavar="SECONDS",
        help="save the step of a run this often, for a restart (default: %(default)g; 0: never)",
    )
