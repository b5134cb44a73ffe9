"""What the demo model has no word for. Its tokenizer knows its small world's words, and marks all others as unknown."""

from __future__ import annotations

from functools import cache

from tokenizers import Tokenizer

from lightx2v.config import PROJECT

TOKENIZER = PROJECT / "assets" / "demo" / "Wan2.2-T2V-Demo" / "google" / "umt5-xxl" / "tokenizer.json"
UNKNOWN = "<unk>"


@cache
def _tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(TOKENIZER))


def unknown_words(prompt: str) -> list[str]:
    """The pieces of a prompt, in English or Chinese, that the demo model never saw; in order, each once."""
    tokenizer = _tokenizer()
    encoding = tokenizer.encode(prompt)
    unknown = tokenizer.token_to_id(UNKNOWN)
    found = [
        prompt[slice(*span)].strip()
        for number, span in zip(encoding.ids, encoding.offsets, strict=True)
        if number == unknown
    ]
    return [word for word in dict.fromkeys(found) if any(letter.isalnum() for letter in word)]
