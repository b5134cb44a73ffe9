"""PromptCache: the last encoded prompts, so that no text is encoded twice; above all the default negative prompt."""

from __future__ import annotations

from collections import OrderedDict

from ..models.umt5 import TextEmbedding

SIZE = 16
"""Prompts, up to 4 MB each."""


class PromptCache:
    """The last prompts of one text encoder, bit by bit as it encoded them."""

    def __init__(self, size: int = SIZE) -> None:
        self._size = size
        self._embeddings: OrderedDict[str, TextEmbedding] = OrderedDict()

    def __contains__(self, text: str) -> bool:
        return text in self._embeddings

    def get(self, text: str) -> TextEmbedding:
        self._embeddings.move_to_end(text)
        return self._embeddings[text]

    def put(self, text: str, embedding: TextEmbedding) -> None:
        self._embeddings[text] = embedding
        self._embeddings.move_to_end(text)
        while len(self._embeddings) > self._size:
            self._embeddings.popitem(last=False)

    def clear(self) -> None:
        self._embeddings.clear()
