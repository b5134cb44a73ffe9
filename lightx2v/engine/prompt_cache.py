"""PromptCache: the last encoded prompts, so that no text is encoded twice; above all the default negative prompt."""

from collections.abc import Iterable
from contextlib import suppress

import torch

from ..errors import NumericsError
from ..models.umt5 import TextEmbedding, TextEncoder
from ..sampling.checks import is_finite, not_finite

SIZE = 16
"""Prompts, up to 4 MB each."""


class PromptCache(dict[str, TextEmbedding]):
    """The prompts that one text encoder encoded, by text. Keeps the SIZE ones that were used last."""

    def add(self, text: str, encoder: TextEncoder) -> None:
        """Encode a prompt. NumericsError if the encoder makes NaN of it."""
        embedding = encoder.encode(text)
        if not is_finite(embedding.states_LD):
            raise not_finite("text encoder", "the prompt")
        self[text] = embedding

    def add_all(self, texts: Iterable[str], encoder: TextEncoder) -> None:
        """Encode prompts before the run that needs them, which tells of errors."""
        with torch.inference_mode(), suppress(NumericsError):
            for text in texts:
                self.add(text, encoder)

    def __getitem__(self, text: str) -> TextEmbedding:
        self[text] = embedding = self.pop(text)
        return embedding

    def __setitem__(self, text: str, embedding: TextEmbedding) -> None:
        self.pop(text, None)  # so that it moves to the end
        super().__setitem__(text, embedding)
        if len(self) > SIZE:
            del self[next(iter(self))]
