"""The text encoder's tensor names: Wan's, which the project uses, transformers', and llama.cpp's in GGUF files.

All functions are pure: names in, names out.
"""

import re
from collections.abc import Iterable

from .wrapper_prefixes import each_once, unwrap_text_encoder

EMBEDDING, TABLE = "shared.weight", "token_embedding.weight"
"""The token table's name in transformers and in Wan's file."""

_SCALE = re.compile(
    r"(.+)\.(weight_scale(?:_\w+)?|scale_weight|scale_input|input_scale|output_scale|comfy_quant|weight\._data|weight\._scale)"
)
"""Tensors that belong to a quantised weight carry its name."""

_COPY = "encoder.embed_tokens."
"""transformers' second name for the token table."""
_DECODER = re.compile(r"decoder\.|lm_head\.")

_OUTSIDE = (  # Wan, transformers
    ("token_embedding.weight", EMBEDDING),
    ("norm.weight", "encoder.final_layer_norm.weight"),
)
_BLOCK = (  # after "blocks.<i>." and "encoder.block.<i>.layer."
    ("norm1.weight", "0.layer_norm.weight"),
    *((f"attn.{leaf}.weight", f"0.SelfAttention.{leaf}.weight") for leaf in "qkvo"),
    ("pos_embedding.embedding.weight", "0.SelfAttention.relative_attention_bias.weight"),
    ("norm2.weight", "1.layer_norm.weight"),
    ("ffn.gate.0.weight", "1.DenseReluDense.wi_0.weight"),
    ("ffn.fc1.weight", "1.DenseReluDense.wi_1.weight"),
    ("ffn.fc2.weight", "1.DenseReluDense.wo.weight"),
)
_LLAMA_OUTSIDE = {"token_embd.weight": TABLE, "enc.output_norm.weight": "norm.weight"}
_LLAMA_BLOCK = {  # after "enc.blk.<i>.", and Wan's after "blocks.<i>."; each with ".weight"
    "attn_norm": "norm1",
    **{f"attn_{leaf}": f"attn.{leaf}" for leaf in "qkvo"},
    "attn_rel_b": "pos_embedding.embedding",
    "ffn_norm": "norm2",
    "ffn_gate": "ffn.gate.0",
    "ffn_up": "ffn.fc1",
    "ffn_down": "ffn.fc2",
}


def hf_name(name: str) -> str:
    """transformers' name for one of Wan's T5 tensors; an unknown name is returned unchanged."""
    if match := _SCALE.fullmatch(name):
        return hf_name(f"{match[1]}.weight").removesuffix("weight") + match[2]
    if match := re.fullmatch(r"blocks\.([0-9]+)\.(.+)", name):
        stem = dict(_BLOCK).get(match[2])
        return f"encoder.block.{match[1]}.layer.{stem}" if stem else name
    return dict(_OUTSIDE).get(name, name)


def wan_name(name: str) -> str:
    """Wan's name for one of transformers' or llama.cpp's, in any wrappers; an unknown name is returned unchanged."""
    name = unwrap_text_encoder(name)
    if match := _SCALE.fullmatch(name):
        return wan_name(f"{match[1]}.weight").removesuffix("weight") + match[2]
    if match := re.fullmatch(r"(?:encoder\.)?block\.([0-9]+)\.layer\.(.+)", name):
        stem = {theirs: ours for ours, theirs in _BLOCK}.get(match[2])
        return f"blocks.{match[1]}.{stem}" if stem else name
    if match := re.fullmatch(r"enc\.blk\.([0-9]+)\.(\w+)\.weight", name):
        return f"blocks.{match[1]}.{_LLAMA_BLOCK[match[2]]}.weight" if match[2] in _LLAMA_BLOCK else name
    if name in ("final_layer_norm.weight", "embed_tokens.weight"):
        name = f"encoder.{name}"
    return ({theirs: ours for ours, theirs in _OUTSIDE} | _LLAMA_OUTSIDE).get(name, name)


def text_encoder_names(names: Iterable[str], source: str = "The file") -> dict[str, str]:
    """Wan's name for every tensor name of the file `source`, without the decoder of a whole model and transformers'
    second copy of the token table. CheckpointError where two names become one."""
    wan = {name: wan_name(name) for name in names}
    copy = _COPY if TABLE in wan.values() else ""
    kept = {
        name: _tables(ours)
        for name, ours in wan.items()
        if not (copy and ours.startswith(copy)) and not _DECODER.match(ours)
    }
    return each_once(kept, source)


def _tables(name: str) -> str:
    """The copy's name becomes the table's, where only the copy is there."""
    return TABLE.removesuffix("weight") + name.removeprefix(_COPY) if name.startswith(_COPY) else name


def is_text_encoder(names: Iterable[str]) -> bool:
    """Whether these are the names of a text encoder."""
    return any(wan_name(name) in (TABLE, f"{_COPY}weight") for name in names)
