"""Errors about flags."""

from __future__ import annotations

import argparse

import pytest

from lightx2v.cli.parser import ArgumentParser


@pytest.fixture
def parser() -> ArgumentParser:
    parser = ArgumentParser(prog="program", allow_abbrev=False)
    parser.add_argument("--hidden_switch", help=argparse.SUPPRESS)
    group = parser.add_argument_group("network")
    group.add_argument("--host")
    group.add_mutually_exclusive_group().add_argument("--port", type=int)
    return parser


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--hots", "::1"], "unknown flag --hots. Did you mean --host? --help lists every flag."),
        (["--prot=80"], "unknown flag --prot. Did you mean --port? --help lists every flag."),
        (["--hidden"], "unknown flag --hidden. Did you mean --"),
        (["--host", "a", "b"], "'b' belongs to no flag. Put quotes around text with spaces. --help lists every flag."),
        (["--port", "many"], "argument --port: invalid int value: 'many'. --help lists every flag."),
    ],
)
def test_a_wrong_flag_is_one_line_and_exit_code_2(
    parser: ArgumentParser, words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        parser.parse(words)
    errors = capsys.readouterr().err
    assert stop.value.code == 2 and errors.startswith(f"error: {message}") and errors.count("\n") == 1
    assert "hidden_switch" not in errors


def test_right_flags_are_parsed_as_argparse_does(parser: ArgumentParser) -> None:
    assert vars(parser.parse(["--port", "80"])) == {"hidden_switch": None, "host": None, "port": 80}
