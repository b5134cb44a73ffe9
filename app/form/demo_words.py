"""Words that the demo model does not know: its tokenizer has the words of its small world and marks all others."""

import re
from functools import cache

from tokenizers import Tokenizer

from lightx2v.config.model_paths import PROJECT

TOKENIZER = PROJECT / "assets" / "demo" / "Wan2.2-T2V-Demo" / "google" / "umt5-xxl" / "tokenizer.json"
UNKNOWN = "<unk>"
WORD = re.compile(r"[A-Za-z]+")


@cache
def _tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(TOKENIZER))


def unknown_words(prompt: str) -> list[str]:
    """The parts of a prompt, in English or Chinese, that the demo model does not know; in order, each once."""
    tokenizer = _tokenizer()
    encoding = tokenizer.encode(prompt)
    unknown = tokenizer.token_to_id(UNKNOWN)
    whole = {place: word[0] for word in WORD.finditer(prompt) for place in range(*word.span())}
    unknown_parts = []
    for number, (start, end) in zip(encoding.ids, encoding.offsets, strict=True):
        piece = prompt[start:end].strip()
        if number == unknown:  # it knows "to" of "too"; show the whole word and not "o"
            unknown_parts.append(whole.get(end - 1, piece))
    return [word for word in dict.fromkeys(unknown_parts) if any(letter.isalnum() for letter in word)]
