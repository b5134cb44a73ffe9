"""Build the demo's tokenizer: a Unigram model like UMT5's, whose pieces are the grammar's words and characters.

It prefers the fewest pieces. Text that the grammar does not know becomes one <unk>, so that even Wan's long negative
prompt is short here. A prompt ends with </s>. transformers' AutoTokenizer reads the folder.

The engine cleans prompts first, as the official code does, and turns ， into a comma. The tokenizer drops both next to
Chinese text, so a prompt has the same tokens before and after.
"""

from __future__ import annotations

import unicodedata
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from .captions import PUNCTUATION, vocabulary

HALF_WIDTH = unicodedata.normalize("NFKC", PUNCTUATION)
HAN = r"[\u2E80-\u9FFF]"
PAD, END, UNKNOWN = "<pad>", "</s>", "<unk>"


def build_tokenizer() -> Tokenizer:
    pieces = [(PAD, 0.0), (END, 0.0), (UNKNOWN, 0.0)] + [(piece, -1.0) for piece in vocabulary()]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=2, byte_fallback=False))
    tokenizer.normalizer = normalizers.Sequence(
        [
            normalizers.NFC(),
            normalizers.Lowercase(),
            normalizers.Replace(Regex(f"[{PUNCTUATION}]|(?<={HAN})[{HALF_WIDTH}]|[{HALF_WIDTH}](?={HAN})"), ""),
            normalizers.Replace(Regex(r"[^\w\s]+"), " "),
            normalizers.Replace(Regex(r"\s+"), " "),
            normalizers.Strip(),
        ]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="always")
    tokenizer.post_processor = processors.TemplateProcessing(single=f"$A {END}", special_tokens=[(END, 1)])
    tokenizer.add_special_tokens([PAD, END, UNKNOWN])
    return tokenizer


def save_tokenizer(folder: Path) -> None:
    from transformers import PreTrainedTokenizerFast

    fast = PreTrainedTokenizerFast(
        tokenizer_object=build_tokenizer(), pad_token=PAD, eos_token=END, unk_token=UNKNOWN, model_max_length=512
    )
    fast.save_pretrained(folder)
