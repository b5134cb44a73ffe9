"""UMT5: the text encoder, from a prompt to the states that the DiT attends to.

The network is `UMT5Stack` with the weights of Wan's own file (`models_t5_umt5-xxl-enc-*.pth`), through a mapping of
names. The sizes come from the tensors, so an encoder of any width loads.

A prompt is encoded at its own length. The official code pads to 512 tokens, masks the padding and cuts it off again;
the states are the same, and cost up to four times less this way. The token table (2.1 GB of 11.4) is never loaded: at
most 512 of its 256 384 rows are read from the mapped file.

Legend: L tokens, D width.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from ..config.prompt_cleaning import clean_prompt
from ..errors import CheckpointError, short_path
from ..progress import UNWATCHED, LoadWatch
from ..weights.checkpoint import Checkpoint, open_checkpoint
from ..weights.gguf_blocks import BlockFormat, dequantise
from ..weights.model_weights import ModelWeights
from ..weights.module_loader import DtypeOf, InHost, check_fit, slots_of, stream_into
from ..weights.umt5_names import TABLE, hf_name
from ..weights.value_check import ValueCheck
from .gguf_linear import swap_for_blocks
from .quant_linear import swap_linears
from .umt5_stack import UMT5Sizes, UMT5Stack

if TYPE_CHECKING:
    from tokenizers import Tokenizer


@dataclass(frozen=True, slots=True)
class TextEmbedding:
    """One encoded prompt. `tokens` counts the whole prompt; if `truncated`, only the first ones were encoded."""

    states_LD: torch.Tensor
    tokens: int
    truncated: bool


class TextEncoder(nn.Module):
    """`encode(prompt)`. Moves between devices like any module, but the token table stays in the file."""

    def __init__(
        self,
        stack: UMT5Stack,
        embedding_VD: torch.Tensor,
        tokenizer: Tokenizer,
        *,
        text_len: int,
        table_form: BlockFormat | None = None,
        table_scale_V1: torch.Tensor | None = None,
    ) -> None:
        """Rows of `embedding_VD` are bytes of blocks in the format `table_form`, or 8-bit with `table_scale_V1`."""
        super().__init__()
        self.stack = stack
        self.tokenizer = tokenizer
        self.text_len = text_len
        self.table_form, self.table_scale_V1 = table_form, table_scale_V1
        self.embedding_VD = embedding_VD  # a plain attribute: `.to(device)` must not move 2 GB for 512 rows

    @classmethod
    def load(
        cls,
        checkpoint: Checkpoint | str | Path,
        tokenizer: str | Path,
        *,
        dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str = "cpu",
        text_len: int = 512,
        quantise: torch.dtype | None = None,
        watch: LoadWatch = UNWATCHED,
        in_host: InHost | None = None,
    ) -> TextEncoder:
        """Load Wan's T5 file (or transformers' folder) and the tokenizer's folder; `quantise` is an 8-bit dtype.

        `in_host` gives the weights their memory, if they are to be in the host's.
        """
        if dtype is torch.float16:  # UMT5's activations exceed its range
            dtype = torch.bfloat16
        if not isinstance(checkpoint, Checkpoint):
            checkpoint = open_checkpoint(checkpoint)
        source = short_path(checkpoint.path)
        weights = ModelWeights.of_text_encoder(checkpoint, quantise=quantise)
        try:
            sizes = UMT5Sizes.from_shapes({hf_name(name): shape for name, shape in weights.plain_shapes.items()})
        except (KeyError, ValueError, ZeroDivisionError) as error:
            raise CheckpointError(f"{source} is not a UMT5 encoder: {error} is missing or has another shape.") from None
        stack = build_stack(sizes)
        holder = nn.ModuleDict({"encoder": stack})
        swap_linears(holder, {hf_name(name): kind for name, kind in weights.formats.items()}, fast=False)
        swap_for_blocks(holder, {hf_name(name): form for name, form in weights.blocks.items()}, stack.block)
        dtype_of: Callable[[str], torch.dtype] = lambda name: torch.float32 if name.endswith("_scale") else dtype  # noqa: E731
        shapes = {hf_name(name): shape for name, shape in weights.shapes.items() if name != TABLE}
        dtypes = {hf_name(name): kind for name, kind in weights.dtypes.items() if name != TABLE}
        check_fit(holder, shapes, dtypes, source_name=source)
        if in_host is not None:
            in_host(stack, stack.block, dtype_of)
        slots, check = slots_of(holder) if in_host is not None else {}, ValueCheck(source)
        tensors = _without_table(weights, slots, dtype_of, device, check, watch)
        with ThreadPoolExecutor(1, "lightx2v-tokenizer") as thread:
            reading = thread.submit(load_tokenizer, tokenizer)
            stream_into(holder, tensors, dtype_of=dtype_of, device=device, check=check)
            read_tokenizer = reading.result()
        table = weights.file_names[TABLE]
        encoder = cls(
            stack,
            checkpoint.memory_map(table),
            read_tokenizer,
            text_len=text_len,
            table_form=checkpoint.blocks[table].form if table in checkpoint.blocks else None,
            table_scale_V1=weights.scale(TABLE) if TABLE in weights.layout.scales else None,
        )
        if (size := encoder.tokenizer.get_vocab_size()) > sizes.vocab:  # some ids would have no row in the table
            raise CheckpointError(
                f"{short_path(tokenizer)} is a tokenizer with {size} tokens, but the text encoder has {sizes.vocab}. "
                "Use the tokenizer that came with the model."
            )
        return encoder

    @torch.no_grad()
    def encode(self, prompt: str) -> TextEmbedding:
        """The prompt's states without padding, up to and including the end-of-text token."""
        ids = self.tokenizer.encode(clean_prompt(prompt)).ids
        tokens = len(ids)
        if tokens > self.text_len:
            ids = [*ids[: self.text_len - 1], ids[-1]]  # the last one ends the text
        weight = self.stack.final_layer_norm.weight
        index_L = torch.tensor(ids, dtype=torch.long)
        rows_LD = self.embedding_VD[index_L]
        if self.table_form is not None:
            rows_LD = dequantise(rows_LD, self.table_form)
        if self.table_scale_V1 is not None:
            rows_LD = rows_LD.float() * self.table_scale_V1[index_L]
        rows_LD = rows_LD.to(weight.device).to(weight.dtype)
        return TextEmbedding(self.stack(rows_LD[None])[0], tokens, tokens > self.text_len)


def _without_table(
    weights: ModelWeights,
    slots: Mapping[str, torch.Tensor],
    dtype_of: DtypeOf,
    device: torch.device | str,
    check: ValueCheck,
    watch: LoadWatch,
) -> Iterator[tuple[str, torch.Tensor]]:
    """(transformers' name, tensor) of all weights but the token table, into `slots` where they fit."""
    tensors = weights.tensors(
        weights.plain_shapes.keys() - {TABLE},
        dtype_of=dtype_of,
        device=device,
        into=lambda name: slots.get(hf_name(name)),
        look=lambda name, part: check.look(hf_name(name), part),
        watch=watch,
    )
    return ((hf_name(name), tensor) for name, tensor in tensors)


_IMPORTING = threading.Lock()


def preload() -> None:
    """Import the packages that a text encoder needs: `preload.start` does it in the background.

    Two threads that import one package at once could see half-initialised modules, so the second one waits here.
    """
    with _IMPORTING:
        import ftfy  # noqa: F401
        import tokenizers  # noqa: F401


def build_stack(sizes: UMT5Sizes) -> UMT5Stack:
    """The encoder without weights, on the meta device. The token table is read outside of it."""
    with torch.device("meta"):
        return UMT5Stack(sizes).eval()


def load_tokenizer(folder: str | Path) -> Tokenizer:
    """The tokenizer exactly as `tokenizer.json` describes it: equal to AutoTokenizer's, in a fraction of its time."""
    preload()
    from tokenizers import Tokenizer

    path = Path(folder) / "tokenizer.json"
    if not path.is_file():
        raise CheckpointError(f"{short_path(folder)} has no tokenizer.json. Download the tokenizer folder again.")
    try:
        text = path.read_text("utf-8")
        described = json.loads(text)["model"]["type"]  # the library raises only plain Exceptions
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{short_path(path)} is damaged ({error!s:.100}). Download it again.") from None
    if described != "Unigram":
        raise CheckpointError(f"{short_path(path)} is a {described!s:.40} tokenizer; UMT5 uses Unigram.")
    tokenizer = Tokenizer.from_str(text)
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer
