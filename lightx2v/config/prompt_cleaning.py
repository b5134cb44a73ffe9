"""Prompt cleaning: what the text encoder reads of a prompt, and whether anything is left to read."""

import html
import re

_KEPT = re.compile(r"[0-9A-Za-z\u4e00-\u9fff]")
"""Characters that cleaning keeps, unless they belong to an entity (&) or to a terminal's escape sequence."""
_BLANK = re.compile(
    r"[\s\x00-\x1f\x7f-\x9f"
    # default ignorable code points (Unicode, DerivedCoreProperties.txt) and other format characters without a shape
    r"\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f\u202a-\u202e"
    r"\u2060-\u206f\u3164\ud800-\udfff\ufe00-\ufe0f\ufeff\uffa0\ufff0-\ufffb"
    r"\U0001bca0-\U0001bca3\U0001d173-\U0001d17a\U000e0000-\U000e0fff"
    # a braille cell without dots, and the signs for an object and for a character that could not be kept
    r"\u2800\ufffc\ufffd]*"
)


def clean_prompt(text: str) -> str:
    """Clean like the official code: repair encodings, resolve HTML entities, make white space single blanks."""
    import ftfy

    text = html.unescape(html.unescape(ftfy.fix_text(text)))
    return re.sub(r"\s+", " ", text).strip()


def is_blank(prompt: str) -> bool:
    """Whether cleaning leaves nothing visible of a prompt: blanks, control and zero-width characters, or nothing.

    A job list checks many prompts, and ftfy takes milliseconds for a long one: most are decided without it.
    """
    if _KEPT.search(prompt) and "&" not in prompt and "\x1b" not in prompt:
        return False
    return _BLANK.fullmatch(clean_prompt(prompt)) is not None
