"""The formats of GGUF weights: the bytes of their blocks, and the mixes of formats that file names such as Q4_K_M mean.

Needs no torch: predictions of memory use it before a file is there.
"""

import re
from pathlib import PurePath

BLOCKS = {
    "Q4_0": (2, 32, 18),
    "Q4_1": (3, 32, 20),
    "Q5_0": (6, 32, 22),
    "Q5_1": (7, 32, 24),
    "Q8_0": (8, 32, 34),
    "Q2_K": (10, 256, 84),
    "Q3_K": (11, 256, 110),
    "Q4_K": (12, 256, 144),
    "Q5_K": (13, 256, 176),
    "Q6_K": (14, 256, 210),
    "IQ4_NL": (20, 32, 18),
    "IQ4_XS": (23, 256, 136),
}
"""{format: (its number in a file, weights in a block, bytes of a block)}."""

_FLOATS = {"F32": 4.0, "F16": 2.0, "BF16": 2.0}

_MIXES = {
    "Q2_K": ("Q2_K", "Q3_K", "Q3_K"),
    "Q3_K_S": ("Q3_K", "Q3_K", "Q3_K"),
    "Q3_K_M": ("Q3_K", "Q4_K", "Q4_K"),
    "Q3_K_L": ("Q3_K", "Q5_K", "Q5_K"),
    "Q4_K_S": ("Q4_K", "Q4_K", "Q5_K"),
    "Q4_K_M": ("Q4_K", "Q6_K", "Q6_K"),
    "Q5_K_S": ("Q5_K", "Q5_K", "Q5_K"),
    "Q5_K_M": ("Q5_K", "Q6_K", "Q6_K"),
}
"""{mix: formats of most matrices, of the attentions' values, of the feed-forward's second matrix}. A mix that is not
here has one format for all. Rules of llama.cpp with the patch of city96/ComfyUI-GGUF, without its few exceptions for
the first blocks."""

MIXES = tuple(dict.fromkeys([*_MIXES, *BLOCKS, *_FLOATS]))

VALUES, SECOND = 0.149, 0.201
"""Shares of the two special kinds among a block's weights: 2 d^2 and d f of 8 d^2 + 2 d f, with A14B's d and f."""

_IN_NAME = re.compile(rf"(?<![A-Z0-9])({'|'.join(sorted(MIXES, key=len, reverse=True))})(?![A-Z0-9])", re.IGNORECASE)


def is_gguf(name: str | None, scheme: str | None) -> bool:
    """Whether the configuration says that a part of the model is a GGUF file."""
    return (name or "").lower().endswith(".gguf") or (scheme or "").startswith("gguf-")


def mix_of(name: str | PurePath) -> str | None:
    """The mix that a file's name or a scheme such as "gguf-Q4_K_M" says; None if it says none."""
    found = _IN_NAME.findall(PurePath(name).name)
    return found[-1].upper() if found else None


def bytes_per_weight(mix: str) -> float:
    """The mean for the matrices of the blocks."""
    base, values, second = (_bytes(form) for form in _MIXES.get(mix, (mix, mix, mix)))
    return base + VALUES * (values - base) + SECOND * (second - base)


def _bytes(form: str) -> float:
    if form in _FLOATS:
        return _FLOATS[form]
    _, weights, nbytes = BLOCKS[form]
    return nbytes / weights
