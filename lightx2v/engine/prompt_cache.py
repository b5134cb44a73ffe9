"""PromptCache: the last encoded prompts, so that no text is encoded twice; above all the default negative prompt."""

from ..models.umt5 import TextEmbedding

SIZE = 16
"""Prompts, up to 4 MB each."""


class PromptCache(dict[str, TextEmbedding]):
    """The prompts that one text encoder encoded, by text. Keeps the SIZE ones that were used last."""

    def __getitem__(self, text: str) -> TextEmbedding:
        self[text] = embedding = self.pop(text)
        return embedding

    def __setitem__(self, text: str, embedding: TextEmbedding) -> None:
        self.pop(text, None)  # so that it moves to the end
        super().__setitem__(text, embedding)
        if len(self) > SIZE:
            del self[next(iter(self))]
