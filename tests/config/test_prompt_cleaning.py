"""Prompts of which cleaning leaves nothing visible are blank; all others are not, in any script."""

from __future__ import annotations

import time
import unicodedata

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from lightx2v.config.prompt_cleaning import clean_prompt, is_blank
from lightx2v.config.request import MAX_PROMPT, Request
from lightx2v.errors import BadRequest

BLANK = {
    "nothing": "",
    "blanks": " \t\r\n\v\f\u00a0\u2003\u3000\u2028",
    "entities": "&nbsp;&NBSP;&#160;&#xA0;&Tab;&NewLine;&ensp;",
    "an entity without its end": "&nbsp",
    "double entities": "&amp;nbsp; &amp;#8203;",
    "zero-width characters": "\u200b\u200c\u200d\u2060\ufeff",
    "zero-width entities": "&ZeroWidthSpace;&#8203;&zwnj;&zwj;&NoBreak;&shy;&#xFEFF;",
    "control characters": "\x01\x07\x1b\x7f",
    "control entities": "&#0;&#1;&#x7F;",
    "terminal escapes": "\x1b[31m\x1b[0;1m",
    "directions": "\u200e\u200f\u202a\u202e\u2066\u2069\u061c",
    "variation selectors": "\ufe0f\ufe00\U000e0100",
    "tags": "\U000e0001\U000e0041",
    "fillers": "\u3164\u115f\u1160\uffa0\u2800",
    "wrongly decoded blanks": "Â\u00a0â€‹ï»¿",
    "lost characters": "\ufffd\ufffc",
}
VISIBLE = {
    "letters": "a",
    "one Chinese character": "猫",
    "Arabic": "كرة حمراء",
    "emoji": "🎈",
    "emoji of parts": "👨\u200d👩\u200d👧",
    "emoji that this Python does not know": "\U0001fae9",
    "private use": "\ue000",
    "punctuation": "…",
    "an entity of a letter": "&eacute;",
    "among invisible ones": "\u200b\u200bx\u200b",
    "behind an escape": "\x1b[31mx",
    "an entity's name": "nbsp;",
    "an Arabic sign of the format class": "\u0601",
}


@pytest.mark.parametrize("name", BLANK)
def test_a_prompt_of_which_nothing_is_left_is_refused(name: str) -> None:
    assert is_blank(BLANK[name])
    with pytest.raises(
        BadRequest, match=r"^prompt is .*; expected a description of the video; .*(empty|nothing visible)"
    ):
        Request(prompt=BLANK[name])


@pytest.mark.parametrize("name", VISIBLE)
def test_a_prompt_that_shows_something_is_kept(name: str) -> None:
    assert not is_blank(VISIBLE[name])
    assert Request(prompt=VISIBLE[name]).prompt == VISIBLE[name]


def test_the_message_repeats_little_of_the_prompt() -> None:
    with pytest.raises(BadRequest) as caught:
        Request(prompt="&nbsp;" * 1500)
    assert len(str(caught.value)) < 250


C1 = "".join(map(chr, range(0x80, 0xA0)))
"""Control characters that the official cleaning reads as Windows-1252: the first one becomes a euro sign."""


def invisible(character: str) -> bool:
    """By Unicode's categories: control, format without a shape, surrogate, separator."""
    return unicodedata.category(character) in ("Cc", "Cs", "Zs", "Zl", "Zp")


@given(st.text(st.characters(categories=["Cc", "Zs", "Zl", "Zp"], exclude_characters=C1), max_size=20))
def test_control_characters_and_separators_are_blank(text: str) -> None:
    assert is_blank(text)


@given(st.text(max_size=30))
@example("&#120;")
@example("A&\x1b[1m")
def test_the_short_way_agrees_with_cleaning(text: str) -> None:
    """A letter or number that is left of cleaning makes a prompt visible; only invisible text is blank."""
    cleaned: str = clean_prompt(text)
    if any(
        unicodedata.category(character)[0] in "LN" and character not in "\u3164\u115f\u1160\uffa0"
        for character in cleaned
    ):
        assert not is_blank(text)
    if all(invisible(character) for character in cleaned):
        assert is_blank(text)


def test_a_long_prompt_is_checked_soon() -> None:
    for text in (
        "x" * MAX_PROMPT,
        "x" * (MAX_PROMPT - 1) + "&",
        "&" * MAX_PROMPT,
        "猫 " * (MAX_PROMPT // 2),
        "é" * MAX_PROMPT,
    ):
        started = time.thread_time()
        assert not is_blank(text)
        assert time.thread_time() - started < 0.5
