"""Encoded prompts that are kept, so that the same text is not encoded twice; above all the default negative prompt."""

from __future__ import annotations

from collections import OrderedDict

from ..models.umt5 import TextEmbedding

KEPT = 16
"""Prompts; up to 4 MB each."""


class PromptCache:
    """The last prompts of one text encoder. What is kept is what the encoder would say again, bit by bit."""

    def __init__(self, size: int = KEPT) -> None:
        self._size = size
        self._kept: OrderedDict[str, TextEmbedding] = OrderedDict()

    def __contains__(self, text: str) -> bool:
        return text in self._kept

    def get(self, text: str) -> TextEmbedding:
        self._kept.move_to_end(text)
        return self._kept[text]

    def put(self, text: str, embedding: TextEmbedding) -> None:
        self._kept[text] = embedding
        self._kept.move_to_end(text)
        while len(self._kept) > self._size:
            self._kept.popitem(last=False)

    def clear(self) -> None:
        self._kept.clear()
