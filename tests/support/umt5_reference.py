"""transformers' whole text encoder on the tensors of the official file."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from transformers import UMT5EncoderModel


def same_in_transformers(weights: dict[str, torch.Tensor]) -> UMT5EncoderModel:
    """UMT5EncoderModel of the sizes in tiny.T5Sizes, filled through a mapping written out by hand."""
    from transformers.models.umt5.configuration_umt5 import UMT5Config
    from transformers.models.umt5.modeling_umt5 import UMT5EncoderModel

    vocabulary, width = weights["token_embedding.weight"].shape
    config = UMT5Config(
        vocab_size=vocabulary, d_model=width, d_kv=8, d_ff=64, num_layers=2, num_heads=4, dropout_rate=0.0
    )
    state = {
        "shared.weight": weights["token_embedding.weight"],
        "encoder.embed_tokens.weight": weights["token_embedding.weight"],
        "encoder.final_layer_norm.weight": weights["norm.weight"],
    }
    for i in range(2):
        old, attention, dense = f"blocks.{i}", f"encoder.block.{i}.layer.0", f"encoder.block.{i}.layer.1"
        state[f"{attention}.layer_norm.weight"] = weights[f"{old}.norm1.weight"]
        state[f"{attention}.SelfAttention.q.weight"] = weights[f"{old}.attn.q.weight"]
        state[f"{attention}.SelfAttention.k.weight"] = weights[f"{old}.attn.k.weight"]
        state[f"{attention}.SelfAttention.v.weight"] = weights[f"{old}.attn.v.weight"]
        state[f"{attention}.SelfAttention.o.weight"] = weights[f"{old}.attn.o.weight"]
        bias = weights[f"{old}.pos_embedding.embedding.weight"]
        state[f"{attention}.SelfAttention.relative_attention_bias.weight"] = bias
        state[f"{dense}.layer_norm.weight"] = weights[f"{old}.norm2.weight"]
        state[f"{dense}.DenseReluDense.wi_0.weight"] = weights[f"{old}.ffn.gate.0.weight"]
        state[f"{dense}.DenseReluDense.wi_1.weight"] = weights[f"{old}.ffn.fc1.weight"]
        state[f"{dense}.DenseReluDense.wo.weight"] = weights[f"{old}.ffn.fc2.weight"]
    model = UMT5EncoderModel(config).eval()
    model.load_state_dict(state, strict=True)
    return model
