"""diffusers' WanTransformer3DModel with the weights of a WanDiT, for comparing the two."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from lightx2v.models.dit import WanDiT
from lightx2v.weights.dit_names import wan_to_diffusers

if TYPE_CHECKING:
    from diffusers import WanTransformer3DModel


def diffusers_twin(ours: WanDiT, compute: torch.dtype = torch.float32) -> WanTransformer3DModel:
    """Their model with our tensors, shared where the dtype is the same: `compute`, with the parts in float32
    that diffusers' own loader keeps there."""
    from diffusers import WanTransformer3DModel

    config, device = ours.config, next(ours.parameters()).device
    with torch.device("meta"):
        theirs = WanTransformer3DModel(
            num_attention_heads=config.num_heads,
            attention_head_dim=config.head_dim,
            in_channels=config.in_dim,
            text_dim=config.text_dim,
            freq_dim=config.freq_dim,
            ffn_dim=config.ffn_dim,
            num_layers=config.num_layers,
            eps=config.eps,
        )
    kept = tuple(theirs._keep_in_fp32_modules or ())
    weights = {}
    for name, tensor in ours.state_dict().items():
        called = wan_to_diffusers(name)
        weights[called] = tensor.float() if any(part in called for part in kept) else tensor.to(compute)
    theirs.load_state_dict(weights, assign=True)
    theirs.rope = type(theirs.rope)(config.head_dim, theirs.config.patch_size, theirs.config.rope_max_seq_len)
    return theirs.to(device).eval().requires_grad_(False)
